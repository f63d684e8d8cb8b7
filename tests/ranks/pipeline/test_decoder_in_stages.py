"""A Hugging Face decoder as the stages of a pipeline that never drains, against the emulator and plain steps."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.digest import digest
from support.pipeline_models import small_llama
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator, init_mesh
from fourfold.parallel.decoder import cut_decoder_into_stages, decoder_stages, pipeline_decoder
from fourfold.parallel.decoder.async_pipeline import next_token_loss, num_targets
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.stream import StreamSettings

ADAMW = partial(torch.optim.AdamW, lr=0.01)


def decoder_digests(checkpointing: str) -> tuple[str, str]:
    """Of this rank's stage of a small Llama after a few micro-batches, on ranks and in the emulator."""

    def stages() -> list[torch.nn.Module]:
        model = small_llama()
        example = torch.zeros(2, 7, dtype=torch.int64)
        assert len(cut_decoder_into_stages(model, 2, example, repeats=1)) == 2
        # the measured cut may differ between ranks: here everybody must have the same
        cuts = [DecoderStage(model, layers, checkpointing=checkpointing) for layers in (range(2), range(2, 4))]
        for stage in cuts:
            stage.position_ids = torch.arange(7).unsqueeze(0)
        return list(cuts)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, 32, (2, 8), generator=generator) for _ in range(5)]
    data = [(ids[:, :-1], ids[:, 1:]) for ids in tokens]
    settings: dict[str, Any] = {"optimizer": ADAMW, "loss_fn": loss}
    runtime = PipelinedBackprop(stages(), group=None, **settings)
    emulator = PipelinedBackpropEmulator(stages(), **settings)
    mine = digest(runtime.run(data), runtime.state_dict())
    return mine, digest(emulator.run(data), emulator.state_dict()[dist.get_rank()])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_hugging_face_decoder_in_stages(ranks, checkpointing):
    for stage, (mine, emulated) in enumerate(ranks(2)(decoder_digests, checkpointing)):
        assert mine == emulated, f"stage {stage}"


INSIDE: dict[str, dict[str, Any]] = {
    "masters": {"precision": "bf16", "master_dtype": torch.float32},
    "stream": {"checkpointing": "stream", "stream": StreamSettings(chunk_size=3, logits_chunk=2)},
    "compile": {"checkpointing": "full", "compile": "aot_eager"},
    "selective": {"checkpointing": "selective", "schedule": "2bw"},
    "mixed": {"precision": "bf16-mixed", "compile": "aot_eager", "mitigation": "stash+lwpv+sc"},
}


def inside_a_stage(case: str) -> tuple[str, str]:
    """Of this rank's stage of a decoder, and in the emulator."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 32, (2, 8), generator=generator) for _ in range(5)]
    data = [(row[:, :-1], row[:, 1:]) for row in rows]
    cut = dict(INSIDE[case])
    runtime = pipeline_decoder(small_llama(), init_mesh(pp=2, device_type="cpu"), seq_len=7, optimizer=ADAMW, **cut)
    own = {key: cut.pop(key) for key in ("mitigation", "master_dtype", "schedule") if key in cut}
    stages = decoder_stages(small_llama(), 2, seq_len=7, **cut)
    last: Any = stages[-1]
    last.gives_hidden = case == "stream"
    emulator = PipelinedBackpropEmulator(
        [stage for stage in stages if stage is not None], optimizer=ADAMW, loss_weight=num_targets,
        loss_fn=last.streamed_loss if last.gives_hidden else next_token_loss, **own,
    )  # fmt: skip
    mine = digest([*runtime.run(data), *runtime.evaluate(data)], runtime.state_dict())
    losses = [*emulator.run(data), *emulator.evaluate(data)]
    return mine, digest(losses, emulator.state_dict()[dist.get_rank()])


@pytest.mark.parametrize("case", INSIDE)
def test_what_is_inside_a_decoders_stage_is_the_emulators(ranks, case):
    for stage, (mine, emulated) in enumerate(ranks(2)(inside_a_stage, case)):
        assert mine == emulated, f"stage {stage}"


def decoder_replicas(cut: dict[str, Any], schedule: str) -> tuple[bool, float]:
    """2 replicas of 2 stages, rows with other numbers of targets: against plain steps on the mean over all targets.

    Returns whether this rank's weights are those, and the largest difference of an evaluation's losses.
    """
    mesh = init_mesh(dp=2, pp=2, device_type="cpu")
    replica = mesh.get_local_rank("dp")

    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 32, (2, 4, 1, 9), generator=generator)  # replica, micro-batch
    targets = rows[..., 1:].clone()
    for number, kept in enumerate((8, 1, 5, 0, 2, 8, 3, 4)):
        targets[number // 4, number % 4, :, kept:] = -100
    data = [(row[:, :-1], target) for row, target in zip(rows[replica], targets[replica], strict=True)]
    made = pipeline_decoder(
        small_llama().double(), mesh, seq_len=8, optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        schedule=schedule, precision="fp64", **cut,
    )  # fmt: skip
    before = made.evaluate(data)
    made.run(data)
    plain = small_llama().double()

    def loss(*places: tuple[int, int]) -> torch.Tensor:
        logits = torch.cat([plain(rows[place][:, :-1]).logits for place in places])
        return F.cross_entropy(logits.flatten(0, 1), torch.cat([targets[place] for place in places]).flatten())

    seen = [float(loss((replica, number))) if (targets[replica, number] >= 0).any() else 0.0 for number in range(4)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    every = made.schedule.update_every
    for start in range(0, 4, every):
        optimizer.zero_grad()
        loss(*((who, number) for who in range(2) for number in range(start, start + every))).backward()
        optimizer.step()
    expected = dict(plain.named_parameters())
    mine = dict(made.stage.module.named_parameters())
    # transformers' RMSNorm computes in fp32 even of an fp64 model
    alike = all(torch.allclose(p, expected[name], rtol=0, atol=1e-6) for name, p in mine.items())
    return alike, max(abs(one - other) for one, other in zip(before, seen, strict=True))


@pytest.mark.parametrize(
    ("cut", "schedule"),
    [
        ({}, "1f1b:2"),
        ({}, "1f1b:1"),
        ({"checkpointing": "stream", "stream": StreamSettings(chunk_size=3, logits_chunk=2)}, "1f1b:2"),
        ({"compile": "aot_eager"}, "1f1b:4"),
    ],
    ids=["two", "one", "stream", "compile"],
)
def test_replicas_of_a_decoder_take_the_mean_over_all_targets(ranks, cut, schedule):
    for rank, (alike, difference) in enumerate(ranks(4)(decoder_replicas, cut, schedule)):
        assert alike, f"rank {rank}"
        assert difference < 1e-6, f"rank {rank}"
