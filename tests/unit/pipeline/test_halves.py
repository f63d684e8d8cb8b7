"""A backward in two halves against a whole one, where torch before 2.13 gives wrong gradients without a word."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from fourfold.parallel.pipeline.stage import PipelineStage


class Several(nn.Module):
    """Uses its weight twice, one after the other or side by side."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.weight, self.chained = nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), chained

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(x @ self.weight)
        return torch.sin(first @ self.weight) if self.chained else first * (x @ self.weight.T)


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, x + weight

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return product * weight + total, (product * x + total).sum(0)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        product, total = TwoOutputs.apply(x, self.weight)
        return torch.sin(product) * torch.cos(total)


class Recurrent(nn.Module):
    """An operator of torch's own with several outputs, two of them used."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        every, (last, _) = self.lstm(x.float())
        return (every * last).double()


def gradients(module: nn.Module, halves: bool) -> list[Tensor]:
    module.zero_grad()
    made = PipelineStage(
        module, index=1, delay=0, optimizer=partial(torch.optim.SGD, lr=0.1), mitigation="none",
        loss_fn=lambda out, target: (out * target).sum(),
    )  # fmt: skip
    made.begin()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    flight = made.forward(x, torch.arange(4.0, dtype=torch.float64), None, 0)
    if halves:
        back = made.backward_input(flight, None, 1.0)
        made.backward_weight(flight)
    else:
        back = made.backward(flight, None, 1.0)
    return [*back, *(p.grad.clone() for p in module.parameters())]  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [True, False], ids=["torch before 2.13", "this torch"])
@pytest.mark.parametrize(
    ("made", "told"),
    [
        (partial(Several, True), "several times"),
        (partial(Several, False), ""),
        (Own, r"autograd\.Function"),
        (Recurrent, "several outputs"),
    ],
    ids=["one after the other", "side by side", "own function", "several outputs"],
)
def test_halves_give_a_whole_backwards_gradients_or_are_refused(made, told, before, monkeypatch):
    torch.manual_seed(0)
    module = made()
    right = gradients(module, halves=False)
    if before:
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    if told and torch.__version__ < "2.13":
        with pytest.raises(ValueError, match=rf"stage 1 .*{told}.*torch {re.escape(torch.__version__)}.*another"):
            gradients(module, halves=True)
        return
    for mine, whole in zip(gradients(module, halves=True), right, strict=True):
        torch.testing.assert_close(mine, whole)
