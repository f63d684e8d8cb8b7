"""The stages of the throughput benchmark: some that sleep for a set time, some that compute."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel.decoder.balance import profile_modules
from fourfold.parallel.pipeline import balanced_ranges


class _Sleep(torch.autograd.Function):
    """The identity; sleeps on the way there and on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_s)
        return gradient, None, None


class SleepingStage(nn.Module):
    """Sleeps `unit_s` in the forward, for the input's gradient, and for the weight's.

    The first stage, whose input needs no gradient, sleeps for both in the latter: stages are balanced.
    """

    def __init__(self, unit_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.unit_s = unit_s

    def forward(self, x: Tensor) -> Tensor:
        weight_s = self.unit_s * (1 if x.requires_grad else 2)
        return _Sleep.apply(x, self.unit_s, self.unit_s) + _Sleep.apply(self.weight, 0.0, weight_s)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.mix(attended)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(F.relu(self.norms[0](x)))
        return self.skip(x) + self.second(F.relu(self.norms[1](hidden)))


def real(kind: str, num_stages: int) -> tuple[Callable[[], list[nn.Module]], Tensor]:
    """Stages of a transformer (8 blocks of width 256 on [4, 64, 256]) or of a GroupNorm ResNet (12 blocks on
    [8, 16, 32, 32]), balanced by the time that the first rank measures; and an input."""
    torch.manual_seed(0)
    if kind == "transformer":
        layers: list[nn.Module] = [_Block(256, 4) for _ in range(8)]
        example = torch.randn(4, 64, 256)
    else:
        plan = [(16, 16, 1)] * 4 + [(16, 32, 2)] + [(32, 32, 1)] * 3 + [(32, 64, 2)] + [(64, 64, 1)] * 3
        layers = [_Residual(*block) for block in plan]
        example = torch.randn(8, 16, 32, 32)
    seconds = torch.tensor(profile_modules(layers, example, repeats=3))
    torch.distributed.broadcast(seconds, 0)
    ranges = balanced_ranges(seconds.tolist(), num_stages)
    return lambda: [nn.Sequential(*(layers[i] for i in run)) for run in ranges], example
