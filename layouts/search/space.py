"""Which layouts there are: the axes and the options, restricted by the limits of parallel.decoder.limits.

A combination that a limit refuses is counted under its reason, so that a plan can say what became of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import FLUSHED, FULL, NONE, SELECTIVE, STREAM, ZERO_BUBBLE, Candidates, Column
from fourfold.layouts.cost.stages import layers_of
from fourfold.layouts.inputs.layout import EVERY_SCHEDULE, MITIGATION, PRECISIONS, SCHEDULES, Layout, check, facts_of
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.search.request import SearchRequest
from fourfold.parallel.decoder.limits import (
    FORMS,
    FP8,
    INTERLEAVING,
    RUNTIME,
    SHAPES,
    UNEVEN_CUT,
    WHOLE_VOCABULARY,
    Choice,
    DecoderFacts,
    Limit,
    as_number,
    broken,
)
from fourfold.parallel.grid import AXES
from fourfold.parallel.pipeline.mitigation import Mitigation

MICRO_BATCHES = tuple(range(1, 65))
STREAM_CHUNKS = (1, 4, 8, 16, 32)
"""1: as the runtime cuts the layers by itself."""
LEAST_CHUNK = 256
"""Tokens of a chunk in a plan that was not asked to stream: stream.memory chooses none shorter."""

_Columns = dict[str, Any]  # of Column; dataclasses take them as keywords


def divisors(number: int) -> list[int]:
    """In ascending order; in as many steps as the square root, since they come in pairs."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _option(fields: tuple[str, ...], allows: Callable[[DecoderFacts, Choice], Any], reason: str) -> Limit:
    """What an option of the full space needs of others: of other software, so no limit of ours."""
    return Limit(fields=fields, allows=allows, reason=reason, message=reason)


def _of_streaming(limit: Limit) -> Limit:
    """A limit of fourfold's runtime for the layouts that stream: no other software has StreamBP."""
    return _option(
        (*limit.fields, "checkpointing"),
        lambda model, c: (c.checkpointing != STREAM) | limit.allows(model, c),
        "StreamBP is fourfold's alone, and goes with what its runtime has",
    )


OPTIONS: tuple[Limit, ...] = (
    WHOLE_VOCABULARY,
    _option(
        ("tp", "sequence_parallel"),
        lambda model, c: (c.sequence_parallel == 0) | (c.tp > 1),
        "sequence parallelism needs tp of at least 2",
    ),
    *INTERLEAVING,
    _option(
        ("checkpointing", "checkpoint_every"),
        lambda model, c: (c.checkpoint_every == 1) | (c.checkpointing == FULL),
        "every how many layers is a matter of full checkpointing",
    ),
    _option(
        ("checkpointing", "checkpoint_every", "offload"),
        lambda model, c: (c.offload == 0) | (c.checkpointing >= FULL) & (c.checkpoint_every == 1),
        "offloading moves the inputs of checkpointed layers",
    ),
    _option(("cp", "cp_heads"), lambda model, c: c.cp % c.cp_heads == 0, "heads are exchanged among cp ranks"),
    _option(
        ("tp", "cp_heads"),
        lambda model, c: model.num_heads % (c.tp * c.cp_heads) == 0,
        "tp x cp_heads does not divide the attention heads",
    ),
    _option(("dp", "cp", "ep"), lambda model, c: c.dp * c.cp % c.ep == 0, "experts are shared by ranks of dp x cp"),
    *(_of_streaming(limit) for limit in RUNTIME if limit.fields and limit not in INTERLEAVING),
)
"""In the order in which a plan counts them."""

EVERY_PLAN: tuple[Limit, ...] = (
    _option(
        ("dp", "cp", "zero_stage"),
        lambda model, c: (c.zero_stage == 0) | (c.dp * c.cp > 1),
        "ZeRO needs dp x cp of at least 2",
    ),
)


class _Space:
    """Combinations as columns that grow field by field, and for each rule how many it turned away.

    A rule is applied as soon as all fields that it reads are there, so that what it refuses grows no further.
    """

    def __init__(
        self, model: DecoderFacts, limits: Sequence[Limit], columns: _Columns, given: Mapping[str, Any]
    ) -> None:
        self.columns, self.reasons = columns, dict[str, int]()
        self._model, self._pending = model, list(limits)
        self._given = dict(given)
        self.restrict()

    @property
    def choice(self) -> Choice:
        return Choice(**self.columns, **self._given)

    def __len__(self) -> int:
        return len(self.columns["dp"])

    def expand(self, name: str, values: Sequence[Any]) -> None:
        """Every combination once for each value of another field."""
        length = len(self)
        self.columns = {key: np.repeat(column, len(values)) for key, column in self.columns.items()}
        self.columns[name] = np.tile(np.array(values), length)
        self.restrict()

    def restrict(self) -> None:
        """Apply the rules that have become decidable."""
        known = {*self.columns, *self._given}
        ready = [limit for limit in self._pending if known.issuperset(limit.fields)]
        self._pending = [limit for limit in self._pending if not known.issuperset(limit.fields)]
        for limit in ready:
            choice = self.choice
            self.keep(limit.allows(self._model, choice), limit.counted_as(self._model, choice))

    def keep(self, allowed: Column, reason: str) -> None:
        """Turn away, under `reason`, all but the rows of a mask."""
        refused = int(np.size(allowed) - np.count_nonzero(allowed))
        if refused:
            self.reasons[reason] = self.reasons.get(reason, 0) + refused
            self.columns = {key: column[allowed] for key, column in self.columns.items()}


def enumerate_space(model: ModelConfig, request: SearchRequest) -> tuple[Candidates, dict[str, int]]:
    """All combinations of a space that can cut the model, and for each rule how many it turned away.

    Returns:
        (candidates, reason -> count); a combination is counted under the first rule that refuses it.
    Raises:
        ValueError: a fixed value that the space has not; a model that fourfold does not train, in its own space.
    """
    num_devices, global_batch, seq_len, fix = request.num_devices, request.global_batch, request.seq_len, request.fix
    full = request.space == "full"
    facts = facts_of(model)
    if not full:
        _check_runnable(model, facts, fix)
    axes = [
        (num_devices // (tp * cp * pp), pp, cp, tp)
        for tp in divisors(num_devices)
        for cp in divisors(num_devices // tp)
        for pp in divisors(num_devices // tp // cp)
    ]
    fixed = [axis for axis in AXES if axis in fix]
    limits = (*SHAPES, *(OPTIONS if full else RUNTIME), *FORMS, *EVERY_PLAN)
    # What the fixed axes leave out is counted first.
    columns = dict(zip(AXES, np.array(axes).T, strict=True))
    reasons: dict[str, int] = {}
    for axis in fixed:
        held = columns[axis] == fix[axis]
        if not held.all():
            reasons[f"{axis} is not the fixed {fix[axis]}"] = int((~held).sum())
            columns = {key: column[held] for key, column in columns.items()}
    mitigation = fix.get("mitigation", MITIGATION)
    given = {
        "global_batch": global_batch,
        "seq_len": seq_len,
        "rotates": Mitigation.named(mitigation).rotate_every > 0,
        "fp8": fix.get("precision") in FP8,
    }
    table = _Space(facts, limits, columns, given)

    def expand(name: str, values: Sequence[Any]) -> None:
        table.expand(name, [as_number(name, fix[name])] if name in fix else values)

    expand("micro_batch", [size for size in MICRO_BATCHES if global_batch % size == 0])
    expand("zero_stage", [0, 1, 2, 3])
    expand("checkpointing", [NONE, SELECTIVE, FULL, STREAM])
    expand("sequence_parallel", [False, True])
    expand("compile", [bool(fix.get("compile"))])
    options: dict[str, Sequence[Any]] = {
        "vp": [1, 2, 4], "checkpoint_every": [1, 2, 4], "offload": [False, True],
        "cp_heads": [1, 2, 4, 8], "ep": divisors(model.num_experts) if model.num_experts else [1],
    }  # fmt: skip
    for name, values in options.items():
        needed = name == "vp" and fix.get("schedule") == EVERY_SCHEDULE[ZERO_BUBBLE]
        if full or name in fix or needed:
            expand(name, values)
    _expand_chunks(table, seq_len, fix, least=1 if full else LEAST_CHUNK)
    if not full or "sharded_accumulation" in fix:
        _expand_accumulation(table, fix)
    _expand_cuts(table, model, fix)
    if request.asynchronous or fix.get("schedule", SCHEDULES[0]) != SCHEDULES[0]:
        expand("schedule", range(len(SCHEDULES)))
    if full and "schedule" not in fix:
        _expand_zero_bubble(table)
    candidates = Candidates.from_columns(
        {name: column for name, column in table.columns.items() if name != "compile"},
        global_batch=global_batch,
        seq_len=seq_len,
        mitigation=mitigation,
        precision=fix.get("precision", PRECISIONS[0]),
        compile=fix.get("compile"),
    )
    return candidates, reasons | table.reasons


def _expand_chunks(table: _Space, seq_len: int, fix: Mapping[str, Any], *, least: int) -> None:
    """Give the layouts that stream each number of chunks, the others one; in place.

    Args:
        least: tokens of a chunk, where nobody asked to stream: shorter ones cost time and save nothing more.
    """
    asked = [fix["stream_chunks"]] if "stream_chunks" in fix else STREAM_CHUNKS
    only_streamed = fix.get("stream_chunks", 1) > 1
    if only_streamed:
        table.keep(table.columns["checkpointing"] == STREAM, "only StreamBP has chunks")
    streamed = table.columns["checkpointing"] == STREAM
    # Each streaming layout once for every number of chunks, the others once.
    counts = np.where(streamed, len(asked), 1)
    table.columns = {key: np.repeat(column, counts) for key, column in table.columns.items()}
    again = np.repeat(streamed, counts)
    chunks = np.ones(len(again), dtype=int)
    chunks[again] = np.tile(np.array(asked, dtype=int), int(streamed.sum()))
    table.columns["stream_chunks"] = chunks
    tokens = seq_len // table.columns["cp"]
    table.keep(~again | (tokens % chunks == 0), "StreamBP's chunks do not divide the sequence")
    if fix.get("checkpointing") != "stream" and not only_streamed:
        streamed, tokens = table.columns["checkpointing"] == STREAM, seq_len // table.columns["cp"]
        whole = ~streamed | (tokens // table.columns["stream_chunks"] >= least)
        table.keep(whole, f"StreamBP's chunks have fewer than {least} tokens")


def _expand_accumulation(table: _Space, fix: Mapping[str, Any]) -> None:
    """Give ZeRO 3 with several micro-batches both ways to add up gradients, the others the plain one; in place."""
    if "sharded_accumulation" in fix:
        table.expand("sharded_accumulation", [fix["sharded_accumulation"]])
        return
    columns = table.columns
    both = (columns["zero_stage"] == 3) & (columns["pp"] == 1) & (table.choice.num_micro_batches > 1)
    counts = np.where(both, 2, 1)
    table.columns = {key: np.repeat(column, counts) for key, column in columns.items()}
    sharded = np.zeros(len(table), dtype=bool)
    sharded[np.cumsum(counts)[both] - 1] = True
    table.columns["sharded_accumulation"] = sharded


def _expand_zero_bubble(table: _Space) -> None:
    """Give each layout that drains zero-bubble as well, where the table of limits allows it; in place."""
    length, columns = len(table), table.columns
    schedule = columns.get("schedule", np.full(length, np.int8(FLUSHED)))
    split = replace(table.choice, schedule=np.full(length, ZERO_BUBBLE))
    both = schedule == FLUSHED
    for limit in FORMS:
        if "schedule" in limit.fields:
            both &= limit.allows(DecoderFacts(), split)
    counts = np.where(both, 2, 1)
    table.columns = {key: np.repeat(column, counts) for key, column in columns.items()}
    schedule = np.repeat(schedule, counts)
    schedule[np.cumsum(counts)[both] - 1] = ZERO_BUBBLE
    table.columns["schedule"] = schedule


def _expand_cuts(table: _Space, model: ModelConfig, fix: Mapping[str, Any]) -> None:
    """Give pipelines the cuts of their layers that differ from the even one, the others that one; in place.

    The head counts for no layer, one, or as many as it computes for; the embedding for none or one.
    """
    head = round(model.head_params * model.num_layers / model.layers_params)
    cuts = [(0, 0), (0, 1), (1, 1), (0, head), (1, head)]
    names = ("embedding_counts_as", "head_counts_as")
    fixed = {place: fix[name] for place, name in enumerate(names) if name in fix}
    if max(fixed.values(), default=0) >= model.num_layers:
        raise ValueError(f"{', '.join(names)}: give less than the model's {model.num_layers} layers")
    cuts = list(dict.fromkeys((fixed.get(0, first), fixed.get(1, last)) for first, last in cuts))
    shape = len(table), len(cuts)
    columns: _Columns = {name: np.repeat(column, len(cuts)) for name, column in table.columns.items()}
    less = columns[names[0]], columns[names[1]] = np.tile(np.array(cuts).T, shape[0])
    first, _, last = layers_of(model.num_layers, columns["pp"], *less)
    choice = Choice(**columns)
    even = less[0] + less[1] == 0
    allowed = UNEVEN_CUT.allows(facts_of(model), choice) & (even | (first >= 1) & (last >= 1))
    # The same stages under another name count once: the first and the last say what is between.
    ends = (first * (model.num_layers + 1) + last).reshape(shape)
    kept = allowed.reshape(shape).copy()
    for later, earlier in combinations(range(len(cuts) - 1, -1, -1), 2):
        kept[:, later] &= ~(allowed.reshape(shape)[:, earlier] & (ends[:, later] == ends[:, earlier]))
    if any(fixed.values()) and not allowed.all():
        table.reasons[UNEVEN_CUT.reason] = int((~allowed).sum())
    table.columns = {name: column[kept.reshape(-1)] for name, column in columns.items()}


def _check_runnable(model: ModelConfig, facts: DecoderFacts, fix: Mapping[str, Any]) -> None:
    """Refuse a model, or a fixed value, that no layout of fourfold's own runtime has."""
    for limit in RUNTIME:
        if not limit.fields and not limit.allows(facts, Choice()):
            raise ValueError(f"{model.name}: {limit.told(facts, Choice())}, or add --space full to plan for others")
    for name, value in fix.items():
        alone = [limit for limit in RUNTIME if limit.fields == (name,)]
        if alone and any(broken(alone, DecoderFacts(), Choice(**{name: as_number(name, value)}))):
            raise ValueError(f"{name}={str(value).lower()}: fourfold's runtime has no such layouts: add --space full")


def check_in_space(layout: Layout, model: ModelConfig, space: str) -> None:
    """Refuse a layout that the software of `space` has not, for the reasons that a plan counts.

    Raises:
        ValueError: the layout cannot cut the model, or breaks a limit of the space.
    """
    check(layout, model)
    facts, choice = facts_of(model), Choice.of(layout)
    limits = OPTIONS if space == "full" else RUNTIME
    for limit in broken(limits, facts, choice):
        mend = "" if space == "full" else "; or add --space full to price it for other software"
        raise ValueError(f"{layout}: {limit.told(facts, choice)}{mend}")
