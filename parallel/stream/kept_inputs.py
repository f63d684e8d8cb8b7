"""What a streamed step keeps between forward and backward, and where: layers' inputs looked up again or in host memory.

The first layer's input is the embedding table's rows for the tokens, so backward looks them up again instead of keeping
[B, T, d]; and the table's gradient is added where it is, instead of in a second table that autograd would make and add.

At long sequences the other layers' inputs are what is left of a streamed step's memory (stream.memory). A layer's work
on T tokens grows faster than the copy of its input, so on CUDA the copies hide behind it: each layer's input leaves on
a stream of its own while the next layer computes, and comes back while the layer above goes backward. torch's
save_on_cpu copies on the computing stream, and waits. Own code, because autograd's saved-tensor hooks know no next
tensor to fetch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fourfold.parallel.stream.gradients import gradient_in_place

Tensors = tuple[Tensor, ...]

# Copies to the host that may be under way: their sources stay on the device until then.
IN_FLIGHT = 2
# Tokens whose looked-up rows are compared at a time, so that the comparison needs little memory.
COMPARED_TOKENS = 1024


class Lookup:
    """The token embedding's lookup in one run.

    Args:
        module: an embedding that can_look_up_again.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._weight, self._padding = module.weight, module.padding_idx
        self._tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens
        out: Tensor = _Lookup.apply(tokens, self._weight, self._padding)  # type: ignore[no-untyped-call]
        return out

    def sources(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(tokens, table) if x is what a lookup gives now; asked once, by the first layer that runs.

        The values are compared: a hook may have changed what was looked up, and a model may scale it.
        """
        tokens, self._tokens = self._tokens, None
        if tokens is None or x.dtype != self._weight.dtype or x.shape[:-1] != tokens.shape:
            return None
        with torch.no_grad():
            for start in range(0, tokens.shape[1], COMPARED_TOKENS):
                here = slice(start, start + COMPARED_TOKENS)
                if not torch.equal(x[:, here], F.embedding(tokens[:, here], self._weight)):
                    return None
        return tokens, self._weight


def can_look_up_again(module: nn.Module, model: nn.Module) -> bool:
    """Whether `module`, the model's token embedding, is a plain one whose table is whole until backward ends."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return False
    weight = module.weight
    whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() and not hasattr(weight, "ds_id")
    return weight.is_leaf and whole and not any(isinstance(part, FSDPModule) for part in model.modules())


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        total = gradient_in_place(ctx.weight)
        if total is None:
            padding = -1 if ctx.padding is None else ctx.padding
            rows = len(ctx.weight)
            return None, torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, False), None
        kept = None if ctx.padding is None else total[ctx.padding].clone()
        total.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(total.dtype))
        if kept is not None:
            total[ctx.padding] = kept
        return None, total.new_zeros(()).expand_as(total), None


class HostMemory:
    """Moves the tensors of one pass, put in order and fetched in reverse.

    On another device than CUDA tensors stay as they are: there is no other memory to move them to.

    Args:
        device: where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._count = 0
        self._leaving: list[tuple[torch.cuda.Event, Tensors]] = []
        self._waiting: dict[int, Tensors] = {}
        self._fetched: dict[int, tuple[Tensors, torch.cuda.Event | None]] = {}

    def put(self, *tensors: Tensor) -> tuple[int, Tensors]:
        """(place, tensors on the host), which `get` wants back. Waits for the copy before the last but one."""
        host = tensors
        if self._stream is not None:
            host = tuple(torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors)
            left = self._copy(tensors, host, self._stream)
            # The sources stay referenced until their copy is done, so that the allocator cannot give their memory away
            # before; and the host waits for it, because else it would run ahead and no source be freed in time.
            self._leaving.append((left, tensors))
            if len(self._leaving) > IN_FLIGHT:
                self._leaving.pop(0)[0].synchronize()
        place = self._count
        self._count += 1
        self._waiting[place] = host
        return place, host

    def get(self, place: int, host: Tensors) -> Tensors:
        """The tensors on the device, for the current stream; starts fetching those put before them."""
        if self._stream is not None and self._leaving:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._leaving.clear()
        tensors, ready = self._fetched.pop(place) if place in self._fetched else self._fetch(host)
        self._waiting.pop(place, None)
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
        below = self._waiting.pop(place - 1, None)
        if below is not None:
            self._fetched[place - 1] = self._fetch(below)
        return tensors

    def _fetch(self, host: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        if self._stream is None:
            return host, None
        # They are used and freed on the current stream, once it has waited for the event.
        tensors = tuple(torch.empty_like(x, device=self._device) for x in host)
        return tensors, self._copy(host, tensors, self._stream)

    def _copy(self, sources: Tensors, targets: Tensors, stream: torch.cuda.Stream) -> torch.cuda.Event:
        # What the current stream has yet to do writes the sources, or reads what was in the targets' memory before.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        return done
