"""Gradients of parameters summed over chunks, without a second tensor of a weight's size a chunk.

autograd makes a new gradient of each weight for each chunk and adds it: for small chunks, memory traffic that shows.
`summed_linears` lets the weights' products accumulate in place instead, and where a parameter has its .grad already
(a later micro-batch), in that one: Megatron-LM's fused gradient accumulation does the same in a buffer of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fourfold.parallel.attention.kernels import accumulation_dtype, widen
from fourfold.parallel.stream.patching import Patches, accumulates_now


def gradient_in_place(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """The parameter's .grad, where this backward may add to it and then hand autograd zeros; None where it must not.

    Args:
        dtype: that it must have; None is what is summed in.

    Only while autograd runs: it must be about to accumulate there (not autograd.grad, nor backward's `inputs`), and
    no hook may be waiting to see the gradient by itself. Hooks after accumulation, which DDP, FSDP and DeepSpeed use,
    find the whole sum.
    """
    grad = parameter.grad
    if grad is None or grad.requires_grad:
        return None
    if grad.layout != torch.strided or grad.dtype != (dtype or accumulation_dtype(parameter.dtype)):
        return None
    return grad if accumulates_now(parameter) else None


class ParameterSums:
    """Gradients of parameters summed over chunks, in fp32 (fp64 for fp64) from the second summand on.

    What has one summand, as where all tokens are one chunk, stays in its own dtype: it is rounded once, and no wider
    copy of it is made. So does what has a few: a product is added inside the kernel that makes it, whose sums are fp32,
    and each addition rounds once more, which few of them do not show.

    Args:
        parameters: what autograd differentiates in a chunk.
        leaves: inside a backward, the model's parameters they stand for: those that gradient_in_place allows are
            summed in their .grad.
        few: whether there are at most FEW_PIECES summands.
    """

    def __init__(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor] = (), *, few: bool = False) -> None:
        self._differentiated = parameters
        self._few = few
        self._sums: list[Tensor | None] = [None] * max(len(parameters), len(leaves))
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._in_place: set[int] = set()
        for index, leaf in enumerate(leaves):
            self._sums[index] = gradient_in_place(leaf)
            if self._sums[index] is not None:
                self._in_place.add(index)

        # Sums of some rows of a parameter, by the parameter's place: (first row, the one after the last) to sum.
        self._rows: dict[int, dict[tuple[int, int], Tensor]] = {}

        # Linears whose output nothing reads: see find_unread.
        self.unread: set[nn.Linear] = set()

    def index(self, parameter: Tensor | None) -> int | None:
        """The parameter's place, or None where it needs no gradient."""
        return self._index.get(id(parameter))

    def backward(self, outs: Sequence[Tensor], inputs: list[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The inputs' gradients, from those of `outs`; the parameters' are added."""
        gradients = torch.autograd.grad(outs, [*inputs, *self._differentiated], grads, allow_unused=True)
        for index, part in enumerate(gradients[len(inputs) :]):
            if part is not None:
                self.add(index, part)
        return [
            torch.zeros_like(x) if part is None else part
            for x, part in zip(inputs, gradients[: len(inputs)], strict=True)
        ]

    def add(self, index: int, part: Tensor, rows: slice | None = None) -> None:
        """Add `part` to the parameter's sum, or to the sum of these rows of it."""
        if rows is None:
            self._sums[index] = self._added(self._sums[index], part)
        elif index in self._in_place:
            self._whole(index)[rows].add_(part)
        else:
            sums, key = self._rows.setdefault(index, {}), (rows.start, rows.stop)
            sums[key] = self._added(sums.get(key), part)

    def add_product(self, index: int, a: Tensor, b: Tensor, rows: slice | None = None) -> None:
        """Add a @ b, in place where the dtypes allow, to the parameter's sum or to that of these rows of it."""
        if rows is None:
            self._sums[index] = self._added_product(self._sums[index], a, b)
        elif index in self._in_place:
            self._added_product(self._whole(index)[rows], a, b)
        else:
            sums, key = self._rows.setdefault(index, {}), (rows.start, rows.stop)
            sums[key] = self._added_product(sums.get(key), a, b)

    def total(self, index: int, like: Tensor) -> Tensor:
        """The sum so far, to be added to; zeros of like's shape at first."""
        total = self._sums[index]
        if total is None:
            total = self._sums[index] = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
        return total

    def values(self, like: Sequence[Tensor]) -> list[Tensor | None]:
        """What autograd is to accumulate, in the dtype of `like`; zeros without memory where it is done."""
        assert len(like) == len(self._sums)
        return [self._value(index, parameter) for index, parameter in enumerate(like)]

    def _value(self, index: int, parameter: Tensor) -> Tensor | None:
        total, rows = self._sums[index], self._rows.pop(index, None)
        if rows is not None:
            # Rows that no sum is of had no gradient.
            whole = torch.zeros_like(parameter)
            for (first, last), part in rows.items():
                whole[first:last] = part
            return whole if total is None else whole.add_(total)
        if total is None:
            return None
        return total.new_zeros(()).expand_as(total) if index in self._in_place else total.to(parameter.dtype)

    def _added(self, total: Tensor | None, part: Tensor) -> Tensor:
        """total + part: `part` itself where it is the first, else in place in the dtype that is summed in."""
        if total is None:
            return part
        return (total if self._few else widen(total)).add_(part)

    def _added_product(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """total + a @ b, likewise."""
        if total is None:
            return a @ b
        total = total if self._few else widen(total)
        return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)

    def _whole(self, index: int) -> Tensor:
        total = self._sums[index]
        assert total is not None
        return total


class SummedLinears:
    """The plain nn.Linear modules of a layer, whose weights' gradients go to sums and not through autograd.

    Args:
        module: the layer.
        patches: takes the linears' new forwards.
    """

    def __init__(self, module: nn.Module, patches: Patches) -> None:
        self._sums: ParameterSums | None = None
        self._skipped: Sequence[nn.Module | None] = ()
        self._rows: Mapping[nn.Module, slice] = {}
        self.linears: set[nn.Module] = set()
        # OLMo clamps its projections' output in place, which a tensor without memory does not allow.
        self._clamped = any(
            getattr(getattr(part, "config", None), "clip_qkv", None) is not None for part in module.modules()
        )
        for part in module.modules():
            if type(part) is nn.Linear and "forward" not in part.__dict__:
                patches.add(part, partial(self._forward, part))
                self.linears.add(part)

    @contextmanager
    def into(self, sums: ParameterSums) -> Iterator[None]:
        """Meanwhile the weights' gradients are added to `sums`."""
        before, self._sums = self._sums, sums
        try:
            yield
        finally:
            self._sums = before

    @contextmanager
    def without(self, linears: Sequence[nn.Module | None]) -> Iterator[None]:
        """Meanwhile these, whose output nobody reads, compute none."""
        before, self._skipped = self._skipped, linears
        try:
            yield
        finally:
            self._skipped = before

    @contextmanager
    def rows(self, rows: Mapping[nn.Module, slice]) -> Iterator[None]:
        """Meanwhile these linears compute, or leave out, these rows of their output alone."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def _forward(self, linear: nn.Linear, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        rows = self._rows.get(linear)
        if any(linear is skipped for skipped in self._skipped):
            return _no_output(linear, x, rows, writable=self._clamped)
        sums, weight, bias = self._sums, linear.weight, linear.bias
        autocast = autocast_now(x.device.type)
        dtype = weight.dtype if autocast is None else autocast[1]
        # Autocast casts every other dtype to its own, but for fp64.
        usable = x.dtype == dtype if autocast is None else torch.float64 not in (x.dtype, weight.dtype)
        if sums is None or not usable or not torch.is_grad_enabled() or sums.index(weight) is None:
            if rows is None:
                return plain(x)
            return F.linear(x, weight[rows], None if bias is None else bias[rows])
        out: Tensor = _SummedLinear.apply(x.to(dtype), weight, bias, sums, linear, rows)  # type: ignore[no-untyped-call]
        return out


def _no_output(linear: nn.Linear, x: Tensor, rows: slice | None = None, *, writable: bool = False) -> Tensor:
    """Something of the output's shape, without memory unless it must be `writable`."""
    shape = (*x.shape[:-1], linear.out_features if rows is None else rows.stop - rows.start)
    return x.new_zeros(shape) if writable else x.new_zeros(()).expand(shape)


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sums: ParameterSums, linear: nn.Linear,
        rows: slice | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.linear, ctx.rows = linear, rows
        ctx.sums, ctx.bias_index = sums, sums.index(bias)
        # An alias's id is gone once autograd hands the saved one back.
        ctx.weight_index = sums.index(weight)
        if linear in sums.unread:
            return _no_output(linear, x, rows)
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        # Under autocast x is in its dtype, and the weight is cast again in backward, not kept.
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        ctx.sums.add_product(ctx.weight_index, flat.T, x.reshape(-1, x.shape[-1]), ctx.rows)
        if ctx.bias_index is not None:
            ctx.sums.add(ctx.bias_index, flat.sum(0), ctx.rows)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        weight = weight if ctx.rows is None else weight[ctx.rows]
        return grad @ weight.to(grad.dtype), None, None, None, None, None


def find_unread(out: Tensor) -> set[nn.Linear]:
    """Summed linears whose output only reaches `out` through additions, so that no backward reads its value.

    A recomputation whose result is thrown away, as a layer's output is, need not compute it.
    """
    if out.grad_fn is None:
        return set()
    added, ends, frontier = set(), set(), [out.grad_fn]
    while frontier:
        node = frontier.pop()
        if node in added:
            continue
        if node.name() == "AddBackward0":
            added.add(node)
            frontier += [after for after, _ in node.next_functions if after is not None]
        elif node.name() == f"{_SummedLinear.__name__}Backward":
            ends.add(node)
    # What any other node reads is read, and where that is a sum, so is all that is added in it.
    read: set[Any] = set()
    seen, frontier = set(added), list(added)
    while frontier:
        node = frontier.pop()
        for after, _ in node.next_functions:
            if after is None:
                continue
            if node not in added:
                read.add(after)
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    frontier = list(read & added)
    while frontier:
        for after, _ in frontier.pop().next_functions:
            if after is not None and after not in read:
                read.add(after)
                if after in added:
                    frontier.append(after)
    ends -= read
    return {node.linear for node in ends}  # type: ignore[attr-defined]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that refuses create_graph: torch's once_differentiable would return constants for it."""
    without_graph = torch.autograd.function.once_differentiable(backward)  # type: ignore[no-untyped-call]

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: a streamed backward cannot be differentiated; stream_backprop_disable first"
            )
        return without_graph(ctx, *grads)

    return checked


def autocast_now(kind: str) -> tuple[str, torch.dtype] | None:
    """(device type, dtype) of autocast where it is enabled for this kind of device."""
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def entered_autocast(settings: tuple[str, torch.dtype] | None) -> Iterator[None]:
    """The autocast (device type, dtype) that was enabled in the forward pass; None is none, whatever is on now."""
    with ExitStack() as stack:
        if settings is not None:
            stack.enter_context(torch.autocast(settings[0], dtype=settings[1]))
        for kind in ("cpu", "cuda") if settings is None else ():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def own_saved_tensors() -> saved_tensors_hooks:
    """While entered, autograd keeps what it saves as it is: for graphs that begin and end inside a forward.

    The hooks of a torch.utils.checkpoint around the model would run the whole model again for each of them.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
