"""The networks of the accuracy benchmark, as lists of stages, for several seeds at once.

At batch-one-style micro-batches nearly all the time goes into starting operators. So one process trains the networks of
all seeds side by side: every weight has a leading seed axis E, no number of one seed enters another's, and elementwise
optimizers do to each what they would do to it alone. The loss is the sum over seeds of each seed's mean.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Draws:
    """Initial weights, uniform in +-1/sqrt(fan_in) as torch's defaults are, each seed from a generator of its own."""

    def __init__(self, seeds: Sequence[int], *, separate: bool = False) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.separate = separate

    def __len__(self) -> int:
        return len(self.generators)

    def weight(self, *shape: int, fan_in: int) -> "Stacked":
        bound = fan_in**-0.5
        drawn = [torch.empty(shape).uniform_(-bound, bound, generator=generator) for generator in self.generators]
        return Stacked(drawn, self.separate)

    def constant(self, *shape: int, value: float) -> "Stacked":
        return Stacked([torch.full(shape, value) for _ in self.generators], self.separate)


class Stacked(nn.Module):
    """One weight of every seed; calling it gives [E, ...].

    Muon orthogonalises matrices, so for it (`separate`) every seed's is a parameter of its own.
    """

    def __init__(self, drawn: Sequence[Tensor], separate: bool) -> None:
        super().__init__()
        self.parts = nn.ParameterList(drawn if separate else [torch.stack(list(drawn))])
        self.separate = separate

    def forward(self) -> Tensor:
        return torch.stack(list(self.parts)) if self.separate else self.parts[0]


class Linear(nn.Module):
    """[E, ..., inputs] -> [E, ..., outputs]."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = draws.weight(inputs, outputs, fan_in=inputs)
        self.bias = draws.weight(1, outputs, fan_in=inputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)
        out = torch.bmm(rows, self.weight()) if self.bias is None else torch.baddbmm(self.bias(), rows, self.weight())
        return out.view(*x.shape[:-1], -1)


class _Perceptron(nn.Module):
    """Linear, LayerNorm, ReLU on [E, B, inputs]."""

    def __init__(self, draws: Draws, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = Linear(draws, inputs, width)
        self.gain, self.shift = draws.constant(1, width, value=1.0), draws.constant(1, width, value=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.relu(torch.addcmul(self.shift(), F.layer_norm(x, x.shape[-1:]), self.gain()))


def mlp(draws: Draws, inputs: int, *, width: int = 64, depth: int = 14, num_classes: int = 10) -> list[nn.Module]:
    """A deep narrow perceptron with LayerNorm on [E, B, inputs], one layer a stage, no skips."""
    layers = [_Perceptron(draws, width if layer else inputs, width) for layer in range(depth - 1)]
    return [*layers, Linear(draws, width, num_classes)]


class _Convolution(nn.Module):
    """3 x 3 on [B, E * inputs, h, w], each seed's channels by themselves."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = draws.weight(outputs, inputs, 3, 3, fan_in=9 * inputs)
        self.stride, self.num_seeds = stride, len(draws)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight().flatten(0, 1), None, self.stride, 1, 1, self.num_seeds)


class _GroupNorm(nn.Module):
    """Two groups a seed; ReLU behind it where asked."""

    def __init__(self, draws: Draws, width: int, *, relu: bool = True) -> None:
        super().__init__()
        self.gain, self.shift = draws.constant(width, value=1.0), draws.constant(width, value=0.0)
        self.num_groups, self.relu = 2 * len(draws), relu

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(x, self.num_groups, self.gain().flatten(), self.shift().flatten())
        return F.relu(x) if self.relu else x


def _split(x: Tensor, num_seeds: int) -> tuple[Tensor, Tensor]:
    """The hidden and the skipped channels of every seed, from one tensor that carries both."""
    hidden, skip = x.unflatten(1, (num_seeds, 2, -1)).unbind(2)
    return hidden.flatten(1, 2), skip.flatten(1, 2)


def _join(hidden: Tensor, skip: Tensor, num_seeds: int) -> Tensor:
    both = torch.stack([hidden.unflatten(1, (num_seeds, -1)), skip.unflatten(1, (num_seeds, -1))], 2)
    return both.flatten(1, 3)


class _Enter(nn.Module):
    """The block's first convolution. A stage hands over one tensor, so the skipped input travels in it as well."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm = _GroupNorm(draws, inputs)
        self.convolution = _Convolution(draws, inputs, outputs, stride)
        self.stride, self.grow, self.num_seeds = stride, outputs - inputs, len(draws)

    def forward(self, x: Tensor) -> Tensor:
        skip = x[:, :, :: self.stride, :: self.stride].unflatten(1, (self.num_seeds, -1))
        skip = F.pad(skip, (0, 0, 0, 0, 0, self.grow)).flatten(1, 2)
        return _join(self.convolution(self.norm(x)), skip, self.num_seeds)


class _Middle(nn.Module):
    """The block's second convolution."""

    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.norm = _GroupNorm(draws, width)
        self.convolution = _Convolution(draws, width, width)
        self.num_seeds = len(draws)

    def forward(self, x: Tensor) -> Tensor:
        hidden, skip = _split(x, self.num_seeds)
        return _join(self.convolution(self.norm(hidden)), skip, self.num_seeds)


class _Leave(nn.Module):
    """The block's sum."""

    def __init__(self, num_seeds: int) -> None:
        super().__init__()
        self.num_seeds = num_seeds

    def forward(self, x: Tensor) -> Tensor:
        hidden, skip = _split(x, self.num_seeds)
        return hidden + skip


class _Pool(nn.Module):
    """[B, E * C, h, w] -> [E, B, C]."""

    def __init__(self, num_seeds: int) -> None:
        super().__init__()
        self.num_seeds = num_seeds

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).unflatten(1, (self.num_seeds, -1)).transpose(0, 1)


class _Channels(nn.Module):
    """[E, B, 1, h, w] -> [B, E, h, w], and the first convolution."""

    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.convolution = _Convolution(draws, 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.squeeze(2).transpose(0, 1))


def resnet20(draws: Draws, *, width: int = 8, num_classes: int = 10) -> list[nn.Module]:
    """Pre-activation ResNet-20 with GroupNorm on [E, B, 1, h, w] in 34 stages, as finely cut as in the paper."""
    stages: list[nn.Module] = [_Channels(draws, width), _GroupNorm(draws, width, relu=False), nn.ReLU()]
    inputs = width
    for group in range(3):
        for block in range(3):
            outputs = width << group
            stride = 2 if group and not block else 1
            stages += [_Enter(draws, inputs, outputs, stride), _Middle(draws, outputs), _Leave(len(draws))]
            inputs = outputs
    stages += [_GroupNorm(draws, inputs, relu=False), nn.ReLU(), _Pool(len(draws)), Linear(draws, inputs, num_classes)]
    return stages


class _Embedding(nn.Module):
    """[E, B, S] int64 -> [E, B, S, width]."""

    def __init__(self, draws: Draws, width: int, length: int) -> None:
        super().__init__()
        self.bytes = draws.weight(256, width, fan_in=1)
        self.positions = draws.weight(length, width, fan_in=25)

    def forward(self, tokens: Tensor) -> Tensor:
        offsets = 256 * torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1)
        rows = F.embedding(tokens + offsets, self.bytes().flatten(0, 1))
        return rows + self.positions()[:, None, : tokens.shape[2]]


class _Block(nn.Module):
    """Causal pre-norm transformer block on [E, B, S, width]; norms without gains, so that every weight is a matrix."""

    def __init__(self, draws: Draws, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Linear(draws, width, 3 * width, bias=False)
        self.mix = Linear(draws, width, width, bias=False)
        self.up = Linear(draws, width, 4 * width, bias=False)
        self.down = Linear(draws, 4 * width, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        projected = self.attention(F.layer_norm(x, (width,))).flatten(0, 1)  # [E * B, S, 3 * width]
        q, k, v = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.mix(attended)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (width,)))))


class _Head(nn.Module):
    def __init__(self, draws: Draws, width: int) -> None:
        super().__init__()
        self.linear = Linear(draws, width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.layer_norm(x, x.shape[-1:]))


def decoder(draws: Draws, *, width: int = 48, heads: int = 4, layers: int = 4, length: int = 64) -> list[nn.Module]:
    """Byte-level decoder on [E, B, length] int64 in layers + 2 stages; logits [E, B, length, 256]."""
    return [
        _Embedding(draws, width, length),
        *(_Block(draws, width, heads) for _ in range(layers)),
        _Head(draws, width),
    ]


def num_parameters(stages: Sequence[nn.Module], num_seeds: int) -> int:
    """Of one seed's network."""
    return sum(prod(p.shape) for stage in stages for p in stage.parameters()) // num_seeds


def loss_per_seed(logits: Tensor, target: Tensor) -> Tensor:
    """[E]: each seed's mean cross-entropy; logits [E, ..., classes], target [E, ...]."""
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(len(target), -1).mean(1)
