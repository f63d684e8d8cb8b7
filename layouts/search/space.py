"""Which layouts there are: the axes, the options, and every rule of what may be combined, with its reason.

A combination that a rule refuses is counted under that reason, so that a plan can say what became of it.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import FULL, NONE, SELECTIVE, STREAM, Candidates, Column
from fourfold.layouts.cost.stages import layers_of
from fourfold.layouts.inputs.layout import CHECKPOINTING, MITIGATION, SCHEDULES, WHOLE_STAGE
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.search.request import SearchRequest
from fourfold.parallel.grid import AXES

MICRO_BATCHES = tuple(range(1, 65))
STREAM_CHUNKS = (4, 8, 16, 32)

_Columns = dict[str, Column]
_Rule = tuple[str, Callable[[_Columns], Column]]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _axis_rules(model: ModelConfig, global_batch: int, seq_len: int) -> list[_Rule]:
    """What the four axes must divide; layout.check has the same rules for a single layout."""
    ffn = model.ffn_size or model.expert_ffn_size
    return [
        (f"tp does not divide {model.num_heads} attention heads", lambda c: model.num_heads % c["tp"] == 0),
        (f"tp does not divide {model.num_kv_heads} key-value heads", lambda c: model.num_kv_heads % c["tp"] == 0),
        (f"tp does not divide the feed-forward width {ffn}", lambda c: ffn % c["tp"] == 0),
        (f"tp does not divide the vocabulary of {model.vocab_size}", lambda c: model.vocab_size % c["tp"] == 0),
        (f"pp is more than {model.num_layers} layers", lambda c: c["pp"] <= model.num_layers),
        (
            f"2 cp does not divide the sequence of {seq_len}",
            lambda c: seq_len % np.where(c["cp"] > 1, 2 * c["cp"], 1) == 0,
        ),
        (f"dp does not divide the global batch {global_batch}", lambda c: global_batch % c["dp"] == 0),
    ]


def _runtime_rules(model: ModelConfig) -> list[_Rule]:
    """What fourfold's own runtime refuses; see parallel.decoder.parallelize."""
    rules: list[_Rule] = []
    if model.tied_embeddings:
        rules.append(("tied embeddings need pp=1 in this runtime", lambda c: c["pp"] == 1))
    if model.num_windowed_layers:
        rules.append(("a sliding window needs cp=1 in this runtime", lambda c: c["cp"] == 1))
    return rules


def _option_rules(model: ModelConfig) -> dict[str, list[_Rule]]:
    """What the options of the full space need of each other; each rule under the last of its options."""
    heads, moe = model.num_heads, model.num_experts > 0
    return {
        "sequence_parallel": [
            ("sequence parallelism needs tp of at least 2", lambda c: ~c["sequence_parallel"] | (c["tp"] > 1)),
        ],
        "vp": [
            ("interleaving needs pp of at least 2", lambda c: (c["vp"] == 1) | (c["pp"] > 1)),
            ("pp x vp is more than the layers", lambda c: c["pp"] * c["vp"] <= model.num_layers),
            (
                "interleaving needs micro-batches in multiples of pp",
                lambda c: (c["vp"] == 1) | (c["batch"] // c["micro_batch"] % c["pp"] == 0),
            ),
        ],
        "checkpoint_every": [
            (
                "every how many layers is a matter of full checkpointing",
                lambda c: (c["checkpoint_every"] == 1) | (c["checkpointing"] == FULL),
            ),
        ],
        "offload": [
            (
                "offloading moves the inputs of checkpointed layers",
                lambda c: ~c["offload"] | ((c["checkpointing"] >= FULL) & (c["checkpoint_every"] == 1)),
            ),
            (
                "StreamBP cuts a sequence that is whole on its rank",
                lambda c: (c["checkpointing"] != STREAM) | (c["cp"] == 1),
            ),
        ],
        "cp_heads": [
            ("heads are exchanged among cp ranks", lambda c: c["cp"] % c["cp_heads"] == 0),
            ("tp x cp_heads does not divide the attention heads", lambda c: heads % (c["tp"] * c["cp_heads"]) == 0),
        ],
        "ep": [
            ("ep does not divide the experts", lambda c: (c["ep"] == 1) | (model.num_experts % c["ep"] == 0) & moe),
            ("experts are shared by ranks of dp x cp", lambda c: c["dp"] * c["cp"] % c["ep"] == 0),
        ],
    }


def enumerate_space(model: ModelConfig, request: SearchRequest) -> tuple[Candidates, dict[str, int]]:
    """All combinations of a space that can cut the model, and for each rule how many it turned away.

    Returns:
        (candidates, reason -> count); a combination is counted under the first rule that refuses it.
    Raises:
        ValueError: a fixed value that the space has not.
    """
    num_devices, global_batch, seq_len, fix = request.num_devices, request.global_batch, request.seq_len, request.fix
    full = request.space == "full"
    if not full:
        _check_runnable(fix)
    axes = [
        (num_devices // (tp * cp * pp), pp, cp, tp)
        for tp in divisors(num_devices)
        for cp in divisors(num_devices // tp)
        for pp in divisors(num_devices // tp // cp)
    ]
    columns: _Columns = dict(zip(AXES, np.array(axes).T, strict=True))
    reasons: dict[str, int] = {}

    def restrict(rules: list[_Rule]) -> None:
        for reason, allows in rules:
            allowed = allows(columns)
            refused = len(allowed) - int(allowed.sum())
            if refused:
                reasons[reason] = reasons.get(reason, 0) + refused
                for key in columns:
                    columns[key] = columns[key][allowed]

    def expand(name: str, values: list[Any]) -> None:
        if name in fix:
            values = [CHECKPOINTING.index(fix[name]) if name == "checkpointing" else fix[name]]
        length = len(columns["dp"])
        for key in columns:
            columns[key] = np.repeat(columns[key], len(values))
        columns[name] = np.tile(np.array(values), length)

    restrict([(f"{a} is not the fixed {fix[a]}", lambda c, a=a: c[a] == fix[a]) for a in AXES if a in fix])  # type: ignore[misc]
    restrict(_axis_rules(model, global_batch, seq_len))
    if not full:
        restrict(_runtime_rules(model))
    columns["batch"] = global_batch // columns["dp"]
    expand("micro_batch", [size for size in MICRO_BATCHES if global_batch % size == 0])
    restrict([("the micro-batch does not divide a replica's batch", lambda c: c["batch"] % c["micro_batch"] == 0)])
    expand("zero_stage", [0, 1, 2, 3] if full else [0, 3])
    restrict([("ZeRO needs dp x cp of at least 2", lambda c: (c["zero_stage"] == 0) | (c["dp"] * c["cp"] > 1))])
    expand("checkpointing", [NONE, SELECTIVE, FULL, STREAM] if full else [NONE, FULL])
    optional: dict[str, list[Any]] = {
        "sequence_parallel": [False, True], "vp": [1, 2, 4], "checkpoint_every": [1, 2, 4], "offload": [False, True],
        "cp_heads": [1, 2, 4, 8], "ep": divisors(model.num_experts) if model.num_experts else [1],
    }  # fmt: skip
    if full:
        rules = _option_rules(model)
        for name, values in optional.items():
            expand(name, values)
            restrict(rules.get(name, []))
        _expand_chunks(columns, reasons, seq_len, fix)
    _expand_cuts(columns, reasons, model, fix)
    if request.asynchronous or fix.get("schedule", SCHEDULES[0]) != SCHEDULES[0]:
        columns = _with_asynchronous(columns, reasons, fix.get("schedule"))
    columns.pop("batch")
    mitigation = fix.get("mitigation", MITIGATION)
    return Candidates.from_columns(columns, global_batch=global_batch, seq_len=seq_len, mitigation=mitigation), reasons


def _with_asynchronous(columns: _Columns, reasons: dict[str, int], only: str | None) -> _Columns:
    """The candidates as they are, and again under each asynchronous schedule that can run them; or under one only."""
    parts = [columns] if only in (None, SCHEDULES[0]) else []
    length = len(columns["dp"])
    full = {name: columns.get(name, np.full(length, plain)) for name, plain in WHOLE_STAGE.items()}
    runs = (columns["pp"] > 1) & ((columns["checkpointing"] == NONE) | (columns["checkpointing"] == FULL))
    for name, plain in WHOLE_STAGE.items():
        runs &= full[name] == plain
    for number, schedule in enumerate(SCHEDULES[1:], start=1):
        if only not in (None, schedule):
            continue
        rows, needs = runs, f"{schedule} needs pp of at least 2, and of cp, tp, ZeRO and the full space's options none"
        if schedule == "2bw":
            rows = runs & (columns["batch"] // columns["micro_batch"] >= columns["pp"])
            needs += ", and pp micro-batches"
        parts.append({name: column[rows] for name, column in columns.items()})
        parts[-1]["schedule"] = np.full(int(rows.sum()), number, dtype=np.int8)
        reasons[needs] = length - int(rows.sum())
    for part in parts:
        part.setdefault("schedule", np.zeros(len(part["dp"]), dtype=np.int8))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _expand_chunks(columns: _Columns, reasons: dict[str, int], seq_len: int, fix: Mapping[str, Any]) -> None:
    """Give the layouts that stream each number of chunks, the others one; in place."""
    asked = [fix["stream_chunks"]] if "stream_chunks" in fix else STREAM_CHUNKS
    chunks = [count for count in asked if seq_len % count == 0]
    streamed = columns["checkpointing"] == STREAM
    only_streamed = fix.get("stream_chunks", 1) > 1
    if only_streamed and not streamed.all():
        reasons["only StreamBP has chunks"] = int((~streamed).sum())
    if not chunks and streamed.any():
        reasons["StreamBP's chunks do not divide the sequence"] = int(streamed.sum())
    counts = np.where(streamed, len(chunks), 0 if only_streamed else 1)
    for key in columns:
        columns[key] = np.repeat(columns[key], counts)
    streamed = np.repeat(streamed, counts)
    columns["stream_chunks"] = np.ones(len(streamed), dtype=int)
    columns["stream_chunks"][streamed] = np.tile(
        np.array(chunks, dtype=int), int(streamed.sum()) // max(len(chunks), 1)
    )


def _expand_cuts(columns: _Columns, reasons: dict[str, int], model: ModelConfig, fix: Mapping[str, Any]) -> None:
    """Give pipelines the cuts of their layers that differ from the even one, the others that one; in place.

    The head counts for no layer, one, or as many as it computes for; the embedding for none or one.
    """
    head = round(model.head_params * model.num_layers / model.layers_params)
    cuts = [(0, 0), (0, 1), (1, 1), (0, head), (1, head)]
    fixed = {place: fix[name] for place, name in enumerate(("embedding_counts_as", "head_counts_as")) if name in fix}
    if max(fixed.values(), default=0) >= model.num_layers:
        raise ValueError(f"embedding_counts_as, head_counts_as: give less than the model's {model.num_layers} layers")
    cuts = list(dict.fromkeys((fixed.get(0, first), fixed.get(1, last)) for first, last in cuts))
    shape = len(columns["dp"]), len(cuts)
    for name in columns:
        columns[name] = np.repeat(columns[name], len(cuts))
    less = columns["embedding_counts_as"], columns["head_counts_as"] = np.tile(np.array(cuts).T, shape[0])
    pp = columns["pp"]
    first, _, last = layers_of(model.num_layers, pp, *less)
    whole = columns.get("vp", np.ones_like(pp)) == 1
    allowed = (less[0] + less[1] == 0) | ((pp > 1) & whole & (first >= 1) & (last >= 1))
    # The same stages under another name count once: the first and the last say what is between.
    ends = (first * (model.num_layers + 1) + last).reshape(shape)
    kept = allowed.reshape(shape).copy()
    for later, earlier in combinations(range(len(cuts) - 1, -1, -1), 2):
        kept[:, later] &= ~(allowed.reshape(shape)[:, earlier] & (ends[:, later] == ends[:, earlier]))
    if any(fixed.values()) and not allowed.all():
        reasons["stages cut unevenly need pp of at least 2, no interleaving, and a layer each"] = int((~allowed).sum())
    for name in columns:
        columns[name] = columns[name][kept.reshape(-1)]


def _check_runnable(fix: Mapping[str, Any]) -> None:
    """Refuse a fixed value that no layout of fourfold's own runtime has."""
    allowed: dict[str, tuple[Any, ...]] = {"checkpointing": ("none", "full"), "zero_stage": (0, 3)}
    allowed |= dict.fromkeys(("sequence_parallel", "offload"), (False,))
    allowed |= dict.fromkeys(("vp", "ep", "cp_heads", "checkpoint_every", "stream_chunks"), (1,))
    for name, values in allowed.items():
        if name in fix and fix[name] not in values:
            raise ValueError(
                f"{name}={str(fix[name]).lower()}: fourfold's runtime has no such layouts: add --space full"
            )
