"""stream_backprop's self-check: one tiny batch, streamed and plain, loss and every gradient compared.

Nothing of a step is left behind. The parameters' places hold detached leaves meanwhile, so neither their .grad nor any
hook on them sees the comparison, and of each gradient only a product with a random vector is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from fourfold.parallel.stream.gradients import own_saved_tensors
from fourfold.parallel.stream.patching import num_changes, swapped_parameters, without_checkpointing
from fourfold.parallel.stream.random_numbers import RandomStates, random_numbers

Mode = Callable[[], AbstractContextManager[None]]
# A gradient below this part of the largest is zero but for rounding.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest relative L2 errors that are rounding.

    Attributes:
        fine: of fp32 and fp64.
        coarse: of lower precisions, fp32 products in TF32 among them; it only finds wrong formulas.
        negligible: gradients below this part of the largest count against the largest.
    """

    fine: float
    coarse: float
    negligible: float


# What is asked for tells roundings of fp32 from mistakes; what runs by itself must never stop a right model.
ASKED = Bounds(fine=2e-5, coarse=0.05, negligible=NEGLIGIBLE)
BY_ITSELF = Bounds(fine=1e-3, coarse=0.15, negligible=1e-3)


def verify_gradients(
    model: PreTrainedModel, loss: Callable[[Tensor], Tensor], streamed: Mode, plain: Mode, *, bounds: Bounds = ASKED,
    seq_len: int = 12,
) -> float:  # fmt: skip
    """Compare a streaming model with itself, plain, on two rows of random tokens.

    Args:
        loss: the model's for tokens [B, T], a scalar.
        streamed, plain: while entered, the model streams in chunks of a few tokens, or not at all.
    Returns:
        The largest relative error of the loss and of any parameter's gradient, as a random projection shows it.
    Raises:
        ValueError: loss or gradients differ by more than rounding; names the parameter. Or the streamed step fails.
        Incomparable: the model cannot be compared: the plain step fails, or draws random numbers with dropout off.
    Cost: two steps on 2 * seq_len tokens; one set of gradients at a time.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, seq_len), generator=torch.Generator().manual_seed(0)).to(model.device)
    with _same_dropout(model), own_saved_tensors(), torch.enable_grad():
        with plain():
            expected = _plain_step(model, loss, ids)
        with streamed(), _same_buffers(model):
            try:
                found = _step(model, loss, ids)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, IndexError, AttributeError) as failure:
                raise ValueError(
                    f"{type(model).__name__} runs plain and fails in chunks ({type(failure).__name__}: {failure}): do "
                    "not stream this model"
                ) from failure
    largest = max((float(value.norm()) for name, value in expected.items() if name != "the loss"), default=0.0)
    worst, where = 0.0, "the loss"
    for name, value in expected.items():
        own = float(value.norm())
        size = own if name == "the loss" or own > bounds.negligible * largest else largest
        error = float((found[name] - value).norm()) / max(size, 1e-30)
        if not error <= worst:  # nan is worse than any number
            worst, where = error, name
    if not worst <= (bounds.fine if is_exact(model) else bounds.coarse):
        raise ValueError(
            f"{type(model).__name__}: streamed and plain backpropagation differ by {worst:.2g} in {where}: "
            "do not stream this model, or give verify=False if you know why"
        )
    return worst


class Incomparable(Exception):
    """Why a model cannot be compared with itself."""


def _plain_step(model: PreTrainedModel, loss: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Tensor]:
    """_step; if it draws random numbers, once more in evaluation mode, which stays on."""
    for _ in range(2):
        numbers = RandomStates(model.device)
        try:
            with _same_buffers(model), random_numbers(numbers, ("step", 0), replay=False):
                found = _step(model, loss, ids)
        except Exception as error:
            raise Incomparable(f"it does not take a tiny batch ({type(error).__name__}: {error})") from error
        if not numbers.drawn():
            return found
        numbers.set(numbers.states["step", 0])
        model.eval()
    raise Incomparable("it draws random numbers, also in evaluation")


def _step(model: PreTrainedModel, loss: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The loss and each parameter's gradient times a random vector, in fp64, by name."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if (
        not named
    ):  # prompts are trained, and not the model: a small parameter of the lowest layer sees the same gradient
        lowest = cast(nn.ModuleList, model.base_model.layers)[0]
        first = min(lowest.parameters(), key=Tensor.numel)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter is first}
    with swapped_parameters(model, list(named.values())) as leaves:
        value = loss(ids)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    found = {"the loss": value.detach().double()}
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        found[name] = _projected(torch.zeros_like(parameter) if gradient is None else gradient)
    return found


def _projected(gradient: Tensor) -> Tensor:
    if gradient.dim() < 2:
        return gradient.double()
    return projected(gradient.flatten(0, -2)).double()


def projected(x: Tensor) -> Tensor:
    """x [..., n] times a random vector that is the same each time."""
    return x @ _random(x.shape[-1], x)


def _random(size: int, like: Tensor) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(like)


def is_exact(model: PreTrainedModel) -> bool:
    """Whether products are of fp32 or fp64 all through."""
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type) or model.dtype not in (torch.float32, torch.float64):
        return False
    return device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"


@contextmanager
def _same_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off, which streamed and plain draw in another order; where there is none, the mode is as it is.

    Some modules do something else in training, and not all of it to each token alone.
    """
    training = [module for module in model.modules() if module.training]
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in training):
        model.eval()
    try:
        with ExitStack() as stack:
            for module in model.modules():
                stack.enter_context(without_checkpointing(module))
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that a step changes (running means, counts) are put back."""
    before = [(buffer, num_changes(buffer), buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for buffer, version, values in before:
            if num_changes(buffer) != version:
                buffer.copy_(values)
