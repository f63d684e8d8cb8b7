"""Stages that stream their layers: the same loss and gradients as the untouched model, and as the emulator's stages."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.one_loss import assert_one_loss, tiny_model

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator, init_mesh, parallelize
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.stream import StreamSettings
from fourfold.parallel.testing.compare import assert_errors, relative_error, state_differences

CHUNKS = StreamSettings(chunk_size=7, mlp_chunk=4, logits_chunk=5)
KEPT = replace(CHUNKS, keep_attention=1)
STREAM = {"checkpointing": "stream", "stream": KEPT}
LAYOUTS = [
    ({"pp": 2}, {"micro_batch": 1}),
    ({"pp": 2}, {"zero_stage": 3}),
    ({"cp": 2}, {"micro_batch": 2}),
    ({"cp": 2}, {"zero_stage": 3}),
    ({"dp": 2}, {}),
]


@pytest.mark.parametrize(("mesh_shape", "options"), LAYOUTS, ids=str)
def test_two_ranks(ranks, mesh_shape, options):
    assert_one_loss(ranks(2), mesh_shape, masked=True, **STREAM, **options)


def test_windows_and_fp64_on_a_pipeline_of_shards(ranks):
    model = {"family": "mistral", "sliding_window": 9, "double": True}
    assert_one_loss(ranks(4), {"pp": 2, "cp": 2}, masked=True, model=model, tolerance=1e-6, **STREAM)


def test_bf16_products(ranks):
    """As in test_one_loss_any_layout: bf16 keeps 8 bits at each of some thirty roundings."""
    for zero_stage in (0, 3):
        assert_one_loss(ranks(2), {"pp": 2}, tolerance=6e-2, dtype=torch.bfloat16, zero_stage=zero_stage, **STREAM)


def stages(checkpointing: str, chunks: StreamSettings = CHUNKS) -> list[torch.nn.Module]:
    model = tiny_model()
    cuts = [
        DecoderStage(model, layers, checkpointing=checkpointing, stream=chunks) for layers in (range(2), range(2, 4))
    ]
    for stage in cuts:
        stage.position_ids = torch.arange(15).unsqueeze(0)
    return list(cuts)


def mean_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def trained(
    kind: Any, schedule: str, checkpointing: str, *, chunks: StreamSettings = CHUNKS, **options: Any
) -> list[torch.Tensor]:
    """The weights of all stages this process has after a few micro-batches."""
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, 64, (2, 16), generator=generator) for _ in range(6)]
    runtime = kind(
        stages(checkpointing, chunks), optimizer=lambda p: torch.optim.SGD(p, lr=0.3), loss_fn=mean_loss,
        schedule=schedule, mitigation="none", **options,
    )  # fmt: skip
    runtime.run([(ids[:, :-1], ids[:, 1:]) for ids in tokens])
    found = runtime.stages[dist.get_rank()] if kind is PipelinedBackpropEmulator else runtime.stage
    return [p.detach().clone() for p in found.module.parameters()]


def asynchronous(schedule: str) -> tuple[list[str], dict[str, float]]:
    """Where the weights are not the emulator's, and their errors against stages that recompute layers whole."""
    mine = trained(PipelinedBackprop, schedule, "stream", group=None)
    emulated = trained(PipelinedBackpropEmulator, schedule, "stream")
    whole = trained(PipelinedBackprop, schedule, "full", group=None)
    errors = {f"parameter {at}": relative_error(a, b) for at, (a, b) in enumerate(zip(mine, whole, strict=True))}
    return state_differences(mine, emulated, "parameters"), errors


@pytest.mark.parametrize("schedule", ["lockstep", "2bw:2"])
def test_pipelined_backpropagation(ranks, schedule):
    for stage, (differences, errors) in enumerate(ranks(2)(asynchronous, schedule)):
        assert differences == [], f"stage {stage}"
        assert_errors(errors, 1e-5, f"{schedule}, stage {stage}")  # six steps of fp32


def kept_refusals() -> list[str]:
    answers = []
    for kind, options in ((PipelinedBackprop, {"group": None}), (PipelinedBackpropEmulator, {})):
        try:
            trained(kind, "lockstep", "stream", chunks=KEPT, **options)
            answers.append("accepted")
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_kept_attention_waits_for_no_update(ranks):
    for rank, answers in enumerate(ranks(2)(kept_refusals)):
        for answer in answers:
            assert "choose keep_attention=False" in answer, f"rank {rank}"


def kept_of_one_version() -> tuple[list[str], dict[str, float]]:
    """Under 2bw a backward has its forward's weights: as `asynchronous`, against streaming that keeps nothing."""
    mine = trained(PipelinedBackprop, "2bw:2", "stream", chunks=KEPT, group=None)
    emulated = trained(PipelinedBackpropEmulator, "2bw:2", "stream", chunks=KEPT)
    plain = trained(PipelinedBackprop, "2bw:2", "stream", group=None)
    errors = {f"parameter {at}": relative_error(a, b) for at, (a, b) in enumerate(zip(mine, plain, strict=True))}
    return state_differences(mine, emulated, "parameters"), errors


def test_kept_attention_of_the_same_weights_is_exact(ranks):
    for stage, (differences, errors) in enumerate(ranks(2)(kept_of_one_version)):
        assert differences == [], f"stage {stage}"
        assert_errors(errors, 1e-5, f"stage {stage}")  # six steps of fp32


def refusals() -> list[str]:
    answers = []
    mesh = init_mesh(tp=2, device_type="cpu")
    for attempt in (
        lambda: parallelize(tiny_model(), mesh, checkpointing="stream"),
        lambda: parallelize(tiny_model(), mesh, stream=CHUNKS),
        lambda: trained(PipelinedBackprop, "zb-h1:2", "stream", group=None),
    ):
        try:
            attempt()
            answers.append("accepted")
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_what_stages_cannot_stream_is_refused(ranks):
    messages = [
        "checkpointing='stream' with tp=2",
        "they go with checkpointing='stream'",
        "'zb-h1' splits backward passes, and stage",
    ]
    for answers in ranks(2)(refusals):
        for answer, message in zip(answers, messages, strict=True):
            assert message in answer
