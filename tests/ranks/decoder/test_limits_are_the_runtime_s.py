"""What the table of limits allows, `parallelize` takes and a forward runs; what it refuses, that refuses alike.

Combinations of axes, checkpointing, ZeRO stage, family and tied embeddings are tried on torch's fake process group,
where collectives return at once; what the numbers are is for test_one_loss_any_layout.py.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder.limits import FAMILIES, RUNTIME, SHAPES, Choice, as_number, broken, decoder_facts
from fourfold.parallel.grid import Grid

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
GRIDS = [dict(zip(("dp", "pp", "cp", "tp"), sizes, strict=True)) for sizes in product((1, 2, 4), repeat=4)]
FOUR = [grid for grid in GRIDS if Grid(**grid).world_size == 4]
FEW = [grid for grid in GRIDS if Grid(**grid).world_size in (1, 2)]


def tried(family: str, changes: dict, grids: list[dict]) -> list[tuple[dict, list[str], str]]:
    """Of every combination: (what it is, what the table says, what `parallelize` or the step raised)."""
    config = AutoConfig.for_model(family, **{**SIZES, "pad_token_id": None, **changes})
    facts = decoder_facts(config)
    answers = []
    for grid in grids:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=Grid(**grid).world_size)
        mesh = init_mesh(**grid, device_type="cpu")
        for checkpointing, zero_stage in product(("none", "selective", "full", "stream"), range(4)):
            choice = Choice(**grid, checkpointing=as_number("checkpointing", checkpointing), zero_stage=zero_stage)
            said = [limit.told(facts, choice) for limit in broken((*RUNTIME, *SHAPES), facts, choice)]
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            raised = ""
            try:
                parallel = parallelize(model, mesh, checkpointing=checkpointing, zero_stage=zero_stage)
                if grid["pp"] == 1:  # a stage waits for its neighbours, and these are none
                    parallel.evaluate(torch.zeros(1, 8 * grid["cp"], dtype=torch.int64))
            except ValueError as error:
                raised = str(error)
            answers.append(({**grid, "checkpointing": checkpointing, "zero_stage": zero_stage}, said, raised))
        dist.destroy_process_group()
    return answers


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
def test_the_table_is_what_parallelize_does(family, changes, grids):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as fresh:
        answers = fresh.submit(tried, family, changes, grids).result(timeout=280)
    accepted = [what for what, said, _ in answers if not said]
    for what, said, raised in answers:
        assert raised == (said[0] if said else ""), what
    supported = family in FAMILIES and not {"attention_dropout", "rope_parameters"} & changes.keys()
    assert bool(accepted) == supported
    assert len(accepted) < len(answers)
