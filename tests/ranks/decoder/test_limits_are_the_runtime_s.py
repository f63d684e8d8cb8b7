"""What the table of limits allows, `parallelize` takes and a forward runs; what it refuses, that refuses alike.

Combinations of axes, checkpointing, ZeRO stage, family and tied embeddings are tried on torch's fake process group,
where collectives return at once; what the numbers are is for test_one_loss_any_layout.py. So is every pair of options.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, product

import pytest
import torch
import torch.distributed as dist
from support.fork_server import fork_server
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder.limits import (
    FAMILIES,
    FORMS,
    RUNTIME,
    SHAPES,
    Choice,
    as_number,
    broken,
    decoder_facts,
)
from fourfold.parallel.grid import AXES, Grid

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
GRIDS = [dict(zip(("dp", "pp", "cp", "tp"), sizes, strict=True)) for sizes in product((1, 2, 4), repeat=4)]
FOUR = [grid for grid in GRIDS if Grid(**grid).world_size == 4]
FEW = [grid for grid in GRIDS if Grid(**grid).world_size in (1, 2)]
AXES_BY_AXES = [
    {"checkpointing": checkpointing, "zero_stage": zero_stage}
    for checkpointing, zero_stage in product(("none", "selective", "full", "stream"), range(4))
]
OTHERS = [
    *(("checkpointing", word) for word in ("selective", "full", "stream")),
    *(("zero_stage", stage) for stage in (1, 2, 3)),
    ("sequence_parallel", True), ("compile", True), ("vp", 2), ("schedule", "zero-bubble"),
    ("sharded_accumulation", True), ("embedding_counts_as", 1), ("head_counts_as", 1),
]  # fmt: skip
PAIRS = [dict(pair) for pair in combinations(OTHERS, 2) if pair[0][0] != pair[1][0]] + [
    {name: value} for name, value in OTHERS
]
"""Of options that are not at their default, each alone and every two together."""


def tried(family: str, changes: dict, grids: list[dict], options: list[dict]) -> list[tuple[dict, list[str], str]]:
    """Of every combination: (what it is, what the table says, what `parallelize` or the step raised)."""
    config = AutoConfig.for_model(family, **{**SIZES, "pad_token_id": None, **changes})
    facts = decoder_facts(config)
    answers = []
    for grid in grids:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=Grid(**grid).world_size)
        mesh = init_mesh(**grid, device_type="cpu")
        for chosen in options:
            choice = Choice(**grid, **{name: as_number(name, value) for name, value in chosen.items()})
            said = [limit.told(facts, choice) for limit in broken((*FORMS, *RUNTIME, *SHAPES), facts, choice)]
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            given = chosen | ({"compile": "eager"} if chosen.get("compile") else {})
            raised = ""
            try:
                parallel = parallelize(model, mesh, **given)
                if grid["pp"] == 1 and not chosen.get("compile"):  # a stage waits for its neighbours; these are none
                    parallel.evaluate(torch.zeros(1, 8 * grid["cp"] * grid["tp"], dtype=torch.int64))
            except ValueError as error:
                raised = str(error)
            answers.append(({**grid, **chosen}, said, raised))
        dist.destroy_process_group()
    return answers


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, for a process group that is none."""
    with ProcessPoolExecutor(1, mp_context=fork_server()) as started:
        yield started


def accepted_by_both(fresh: ProcessPoolExecutor, *what: object) -> list[dict]:
    """Check that table and runtime say the same; what they accept."""
    answers = fresh.submit(tried, *what).result(timeout=280)
    for chosen, said, raised in answers:
        assert raised == (said[0] if said else ""), chosen
    accepted = [chosen for chosen, said, _ in answers if not said]
    assert len(accepted) < len(answers)
    return accepted


@pytest.mark.parametrize(
    ("family", "changes", "grids"),
    [
        ("llama", {"tie_word_embeddings": False}, FOUR),
        ("qwen3", {"tie_word_embeddings": True}, FOUR),
        ("qwen2", {"tie_word_embeddings": False}, FEW),
        ("mistral", {"sliding_window": 4, "tie_word_embeddings": False}, FEW),
        ("llama", {"attention_dropout": 0.1}, FEW),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, FEW),
        ("olmo2", {}, FEW),
        ("gpt_neox", {}, FEW),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_table_is_what_parallelize_does(fresh, family, changes, grids):
    accepted = accepted_by_both(fresh, family, changes, grids, AXES_BY_AXES)
    supported = family in FAMILIES and not {"attention_dropout", "rope_parameters"} & changes.keys()
    assert bool(accepted) == supported


def test_every_pair_of_options_runs_or_is_refused_by_the_table(fresh):
    grids = [{axis: 2 if axis == longer else 1 for axis in AXES} for longer in AXES]
    changes = {"tie_word_embeddings": False, "num_hidden_layers": 4}
    accepted = accepted_by_both(fresh, "llama", changes, grids, PAIRS)
    for name, value in OTHERS:
        assert any(chosen.get(name) == value for chosen in accepted), f"{name}={value} runs nowhere"
