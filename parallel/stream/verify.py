"""stream_backprop's self-check: one tiny batch, streamed and plain, loss and every gradient compared."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Of fp32 and fp64 models; lower precisions differ by their own rounding, so their bound only finds wrong formulas.
FINE, COARSE = 2e-5, 0.05

Mode = Callable[[], AbstractContextManager[None]]


def verify_gradients(model: PreTrainedModel, streamed: Mode, plain: Mode, seq_len: int = 12) -> float:
    """Compare a streaming model with itself, plain, on two rows of random tokens; existing gradients are kept.

    Args:
        streamed, plain: while entered, the model streams in chunks of a few tokens, or not at all.
    Returns:
        The largest relative L2 error of any parameter's gradient.
    Raises:
        ValueError: loss or gradients differ by more than rounding; names the parameter.
    Cost: two steps on 2 * seq_len tokens, and a second set of gradients while they are compared.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (2, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    with _kept_gradients(model), _same_dropout(model):
        with streamed():
            loss, gradients = _step(model, ids)
        with plain():
            plain_loss, plain_gradients = _step(model, ids)
    worst, where = _difference(loss, plain_loss), "the loss"
    for name, expected in plain_gradients.items():
        error = _difference(gradients.get(name, torch.zeros_like(expected)), expected)
        if not error <= worst:  # nan is worse than any number
            worst, where = error, name
    if not worst <= (FINE if model.dtype in (torch.float32, torch.float64) else COARSE):
        raise ValueError(
            f"{type(model).__name__}: streamed and plain backpropagation differ by {worst:.2g} in {where}: "
            "do not stream this model"
        )
    return worst


def _step(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _difference(found: Tensor, expected: Tensor) -> float:
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size) if size > 1e-10 else float(difference)


@contextmanager
def _kept_gradients(model: PreTrainedModel) -> Iterator[None]:
    before = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextmanager
def _same_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off: streamed and plain draw it in another order."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
