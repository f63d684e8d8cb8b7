"""Whether an attention module's projections can be cut by heads, and the rows of them that make a group of heads.

An attention module makes q, k and v of each head by itself in nearly every decoder: three linear layers, whose outputs
are viewed as heads, and then work on each head alone (norms of a head, rotary embedding). Then some rows of the three
weights give some of the heads, and the module's own code does the rest. What is known to be otherwise is not cut: one
fused projection (Phi-3), a norm over all heads (OLMo 2), adapters, hooks. And what looks right is tried: the heads of
all groups must be those of the whole, for a few tokens of the batch at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fourfold.parallel.stream.attention import Project
from fourfold.parallel.stream.layer import LayerStream, TakeInput
from fourfold.parallel.stream.patching import hooks_of, plain_parameter

# Tokens that a cut is tried on.
TRIED_TOKENS = 4
# Largest relative L2 difference of heads that are the same but for rounding: products of other shapes round elsewhere.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE_ROUNDING = 0.03

Rows = Mapping[nn.Module, slice]


@dataclass(frozen=True, slots=True)
class HeadCut:
    """Projections that can be cut by heads.

    Attributes:
        queries, keys, values: the linear layers.
        num_heads, num_key_heads: of q, and of k and v.
    """

    queries: nn.Linear
    keys: nn.Linear
    values: nn.Linear
    num_heads: int
    num_key_heads: int

    def groups(self, most: int) -> tuple[Rows, ...]:
        """The rows of each group: as many groups of equally many key heads as can be, at most `most`."""
        count = max(n for n in range(1, min(most, self.num_key_heads) + 1) if self.num_key_heads % n == 0)
        shares = [(linear, linear.out_features // count) for linear in (self.queries, self.keys, self.values)]
        return tuple({linear: slice(n * size, (n + 1) * size) for linear, size in shares} for n in range(count))

    def one_head(self) -> Rows:
        """The rows of one head of each."""
        size = self.queries.out_features // self.num_heads
        return {linear: slice(0, size) for linear in (self.queries, self.keys, self.values)}


def head_cut(stream: LayerStream) -> HeadCut | None:
    """How the layer's attention module is cut by heads, as far as its modules tell; None where it is not."""
    attention, linears = stream.attention, stream.linears
    named = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    projections = [module for module in named if isinstance(module, nn.Linear)]
    size = getattr(attention, "head_dim", None)
    if linears is None or len(projections) != 3 or len(set(projections)) != 3 or not isinstance(size, int):
        return None
    for linear in projections:
        if linear not in linears.linears or not plain_parameter(linear, "weight") or linear.out_features % size:
            return None
    queries, keys, values = projections
    num_heads, num_key_heads = queries.out_features // size, keys.out_features // size
    config = getattr(attention, "config", None)
    told = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if told != (num_heads, num_key_heads) or values.out_features != keys.out_features or num_heads % num_key_heads:
        return None
    # The output's projection is not cut. Whatever else has weights must work on each head alone.
    output = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    ends = {id(p) for module in (*projections, output) if isinstance(module, nn.Module) for p in module.parameters()}
    sinks = getattr(attention, "sinks", None)  # a score of each head, which is handed on as it is
    if any(p.shape != (size,) for p in attention.parameters() if id(p) not in ends and p is not sinks):
        return None
    # A hook of a part would see, or change, some heads at a time.
    if any(hooks_of(module) for module in attention.modules() if module is not attention):
        return None
    return HeadCut(queries, keys, values, num_heads, num_key_heads)


# Whether the groups of an attention module, so many, were the whole when they were tried.
_tried: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def is_whole(stream: LayerStream, groups: Sequence[Rows], taken: TakeInput, start: int = 0) -> bool:
    """Whether the heads of all groups are those of the whole module, tried once a module on the tokens of `taken`."""
    seen = _tried.setdefault(stream.attention, {})
    if len(groups) not in seen:
        whole = project(stream, {}, taken, taken.hidden, start).taken
        parts: list[tuple[Tensor, ...] | None]
        try:
            parts = [project(stream, rows, taken, taken.hidden, start).taken for rows in groups]
        except (RuntimeError, ValueError):  # the module's code names the number of its heads
            parts = [None] * len(groups)
        joined = [torch.cat(heads, dim=1) for heads in zip(*(part or () for part in parts), strict=True)]
        matches = [_same(mine, theirs) for mine, theirs in zip(joined, whole or (), strict=False)]
        seen[len(groups)] = len(matches) == 3 and all(matches)
    return seen[len(groups)]


def project(stream: LayerStream, rows: Rows, taken: TakeInput, hidden: Tensor | None, start: int) -> Project:
    """q, k and v [B, heads, chunk, D] of hidden states [B, chunk, d], and what the module says of its scores.

    Args:
        rows: of the projections; no rows named are all of them.
        taken: the layer's call of its attention module for these tokens, which begin at `start`.
    """
    assert stream.linears is not None
    assert hidden is not None
    call = Project(start)
    with stream.linears.rows(rows):
        taken.project(hidden, call)
    if call.taken is None:
        raise ValueError(f"{type(stream.attention).__name__} does not attend by its interface: streaming cannot use it")
    return call


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(difference <= ROUNDING.get(found.dtype, COARSE_ROUNDING) * size)
