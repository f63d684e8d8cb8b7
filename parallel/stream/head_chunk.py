"""The end of a language model for some tokens: their logits by tiles of the vocabulary, and the gradients of these."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.parallel.attention.kernels import accumulation_dtype
from fourfold.parallel.stream.gradients import ParameterSums, entered_autocast, gradient_in_place
from fourfold.parallel.stream.passing import PassingGradient
from fourfold.parallel.stream.patching import swapped_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadParts:
    """A model's last modules.

    Attributes:
        norm: the norm after the last layer, [tokens, d] to [tokens, d].
        normalise: its forward, which is called without its hooks: they would run for every chunk.
        projection: d to V.
        scale: logits are multiplied by it.
        soft_cap: then they become soft_cap * tanh(logits / soft_cap); None is no cap.
        chunk: tokens whose logits HeadLoss has at a time, whole rows.
        tile: (tokens, rows of the vocabulary) that HeadStatistics has at a time.
        autocast: (device type, dtype) of an enabled autocast.
        passing: see layer_run.StreamRun.
        single_pass: whether HeadLoss computes each logit once, for a gradient of the whole projection in fp32 that it
            holds until its backward.
        skips: whether tokens without a target are left out. Of targets on a device, the host must wait to know them.
    """

    norm: nn.Module
    normalise: Callable[[Tensor], Tensor]
    projection: nn.Linear
    scale: float
    soft_cap: float | None
    chunk: int
    tile: tuple[int, int]
    autocast: tuple[str, torch.dtype] | None
    passing: PassingGradient
    single_pass: bool = False
    skips: bool = True

    def rows(self, targets: Tensor) -> Tensor:
        """Which of the tokens [B, T], counted in one row, are computed."""
        flat = targets.flatten()
        return flat.ge(0).nonzero().flatten() if self.skips else torch.arange(len(flat), device=flat.device)

    def parameters(self) -> list[Tensor]:
        """The norm's that need a gradient, then the projection's weight and bias as far as they do."""
        ends = [p for p in (self.projection.weight, self.projection.bias) if p is not None]
        return [p for p in (*self.norm.parameters(), *ends) if p.requires_grad]

    def by_tiles(self, tokens: int) -> bool:
        """Whether the projection's gradient is summed a tile of the vocabulary at a time, for all these tokens.

        Sums are fp32, and beside a narrower weight's gradient that is the largest tensor of a short sequence's step.
        Summed by tiles, only a tile's are there, and what the projection reads of all tokens; for one product of the
        logits more.
        """
        weight = self.projection.weight
        whole = accumulation_dtype(weight.dtype).itemsize
        if self.single_pass or not weight.requires_grad or weight.dtype.itemsize == whole:
            return False
        return tokens * weight.dtype.itemsize + self.tile[1] * whole < self.projection.out_features * whole


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """What the logits of some tokens get, [n, 1] each: factor * exp(logit - peak), and more at the target.

    Attributes:
        logprob: added to the target's logit.
        mean: over the size of the vocabulary, added to every logit; None is none.
    """

    peak: Tensor
    factor: Tensor
    logprob: Tensor
    mean: Tensor | None = None

    def of(self, index: Tensor) -> "TokenGradients":
        """Those of some of the tokens."""
        mean = None if self.mean is None else self.mean[index]
        return TokenGradients(self.peak[index], self.factor[index], self.logprob[index], mean)


class HeadChunk:
    """Some tokens at the head, whose logits come by slices of the vocabulary.

    Args:
        head: the model's.
        hidden: [n, d], the last layer's output. targets: [n], negative for none.
        graph: whether `finish` is wanted; without, only what the projection reads is kept.
        weight: the projection's in the products' dtype; None casts the rows that are asked for, each time.
    """

    def __init__(
        self, head: HeadParts, hidden: Tensor, targets: Tensor, *, graph: bool = True, weight: Tensor | None = None
    ) -> None:
        self._head, self._targets, self._cast = head, targets.unsqueeze(-1), weight
        leaf = hidden.detach().requires_grad_()
        with torch.set_grad_enabled(graph), entered_autocast(head.autocast):
            normed = head.normalise(leaf)
        self._dtype = products_dtype(head)
        self._input = normed.detach().to(self._dtype)
        self._graph = (leaf, normed) if graph else None
        self._grad_input: Tensor | None = None

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(logits [n, rows] in fp32, slope of the soft cap or None)."""
        weight, bias = self._weight(rows), self._head.projection.bias
        if bias is None:
            logits = self._input @ weight.T
        else:
            logits = torch.addmm(bias.detach()[rows].to(weight.dtype), self._input, weight.T)
        logits, slope = logits.to(accumulation_dtype(logits.dtype)), None
        if self._head.scale != 1.0:
            logits *= self._head.scale
        if self._head.soft_cap is not None:
            logits.div_(self._head.soft_cap).tanh_()
            slope = 1 - logits.square()
            logits *= self._head.soft_cap
        return logits, slope

    def targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(the target's place among these rows of the vocabulary or any, whether it is among them), [n, 1]."""
        place = self._targets - rows.start
        # A label beyond the vocabulary stays beyond the last slice, where gathering it is an error.
        last = rows.stop == self._head.projection.out_features
        inside = place.clamp_min(0) if last else place.clamp(0, rows.stop - rows.start - 1)
        return inside, (place >= 0) & (self._targets < rows.stop)

    def logits_grad(self, rows: slice, tokens: "TokenGradients") -> Tensor:
        """[n, rows] in fp32: what the projection's output gets, by these rows of the vocabulary."""
        logits, slope = self.logits(rows)
        return self.projection_grad(rows, logits.sub_(tokens.peak).exp_().mul_(tokens.factor), slope, tokens)

    def projection_grad(self, rows: slice, grad: Tensor, slope: Tensor | None, tokens: "TokenGradients") -> Tensor:
        """The same, given what logits get through the lse; `grad` [n, rows] is overwritten."""
        place, here = self.targets(rows)
        grad.scatter_add_(-1, place, tokens.logprob * here)
        if tokens.mean is not None:
            grad += tokens.mean / self._head.projection.out_features
        if slope is not None:
            grad *= slope
        if self._head.scale != 1.0:
            grad *= self._head.scale
        return grad

    def add_input(self, rows: slice, low: Tensor) -> None:
        """Take in the gradient of the projection's input that comes by `low` [n, rows]."""
        part = low @ self._weight(rows)
        if self._grad_input is None:
            self._grad_input = part.to(accumulation_dtype(part.dtype))
        else:
            self._grad_input += part

    def add_gradients(self, rows: slice, grad: Tensor, sums: "HeadSums | None") -> None:
        """Take in the gradients from these rows of the vocabulary.

        Args:
            grad: [n, rows], as projection_grad gives it.
            sums: takes the projection's; None leaves them for add_tiles.
        """
        low = grad.to(self._dtype)
        if sums is not None:
            sums.add_projection(self._head.projection, rows, low.T, self._input, grad)
        self.add_input(rows, low)

    def product(self, grad: Tensor) -> Tensor:
        """grad.T [rows, n] @ the projection's input [n, d]."""
        return grad.to(self._dtype).T @ self._input

    def finish(self, sums: "HeadSums") -> Tensor:
        """The hidden states' gradient, once all rows of the vocabulary are in."""
        assert self._grad_input is not None
        assert self._graph is not None
        leaf, normed = self._graph
        return sums.backward([normed], [leaf], [self._grad_input.to(normed.dtype)])[0]

    def _weight(self, rows: slice) -> Tensor:
        if self._cast is not None:
            return self._cast[rows]
        return self._head.projection.weight.detach()[rows].to(self._dtype)


class HeadSums(ParameterSums):
    """Sums of the head: a norm's through autograd, and the projection's by products added in place."""

    def __init__(self, leaves: list[Tensor], parameters: Sequence[Tensor], in_backward: bool, rows: int) -> None:
        super().__init__(leaves, parameters if in_backward else ())
        self._step = rows  # of the vocabulary, whose product is rounded before it is added
        self._places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._sums += [None] * (len(parameters) - len(self._sums))

    def add_projection(self, projection: nn.Linear, rows: slice, grad: Tensor, x: Tensor, logits_grad: Tensor) -> None:
        """Add grad [rows, n] @ x [n, d] to the weight's rows, and to the bias's the sum of logits_grad [n, rows]."""
        index = self._places.get(id(projection.weight))
        if index is not None:
            total = self.total(index, projection.weight)[rows]
            if total.dtype == grad.dtype:
                total.addmm_(grad, x)
            else:
                for some in slices(len(total), self._step):
                    total[some] += grad[some] @ x
        index = self._places.get(id(projection.bias))
        if index is not None:
            self.total(index, projection.bias)[rows] += logits_grad.sum(0)

    def add_rows(self, projection: nn.Linear, rows: slice, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add what is known to be whole of some rows of the projection, rounded once to the gradients' dtype."""
        for parameter, part in ((projection.weight, weight), (projection.bias, bias)):
            index = None if parameter is None else self._places.get(id(parameter))
            if index is None or part is None:
                continue
            if self._sums[index] is None:
                there = gradient_in_place(parameter, parameter.dtype)
                self._sums[index] = torch.zeros_like(parameter) if there is None else there
                if there is not None:
                    self._in_place.add(index)
            self._whole(index)[rows].add_(part)


def products_dtype(head: HeadParts) -> torch.dtype:
    """What the projection's products run in."""
    return head.projection.weight.dtype if head.autocast is None else head.autocast[1]


@contextmanager
def head_sums(head: HeadParts, parameters: Sequence[Tensor], *, in_backward: bool) -> Iterator[HeadSums]:
    num_norm = sum(p.requires_grad for p in head.norm.parameters())
    with swapped_parameters(head.norm, parameters[:num_norm]) as leaves:
        yield HeadSums(leaves, parameters, in_backward, head.tile[1])


def slices(stop: int, size: int) -> Iterator[slice]:
    for first in range(0, stop, size):
        yield slice(first, min(first + size, stop))
