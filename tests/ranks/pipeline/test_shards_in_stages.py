"""Asynchronous stages whose ranks share every sequence around a ring (cp), against the emulator on whole rows."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_loss import tiny_model
from torch import Tensor, nn

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator, init_mesh
from fourfold.parallel.decoder import decoder_stages, pipeline_decoder
from fourfold.parallel.decoder.async_pipeline import next_token_loss, num_targets
from fourfold.parallel.pipeline import ClipNorm
from fourfold.parallel.ring.transformers import use_ring_attention
from fourfold.parallel.stream import StreamSettings
from fourfold.parallel.testing.compare import assert_errors, relative_error

SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
LENGTHS = (16, 13, 16, 16, 9, 21)
# fp64 throughout, six updates: what is left is the order of sums
TOLERANCE = 1e-12


def model(family: str = "llama", **changes: Any) -> nn.Module:
    """In fp64 throughout: transformers' norms compute in fp32."""
    made = tiny_model(family, double=True, **changes)
    for part in made.modules():
        for name, child in list(part.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(part, name, nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64))
    return made


def micro_batches(seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Rows of several lengths, some of which 2 ranks do not share evenly, and targets uneven between them."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for length in LENGTHS:
        rows = torch.randint(64, (2, length + 1), generator=generator)
        data.append((rows[:, :-1], rows[:, 1:].clone()))
    data[2][1][:, 4:12] = -100  # all targets of rank 1, which has the middle half
    data[3][1][:] = -100
    data[4][1][0, :4] = -100
    return data


def emulator(options: dict[str, Any], cut: dict[str, Any], family: dict[str, Any]) -> PipelinedBackpropEmulator:
    """Two stages of the whole model on this rank."""
    whole = model(**family)
    if "sliding_window" in family and cut.get("checkpointing") != "stream":
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        use_ring_attention(whole, groups[dist.get_rank()])
    stages = [stage for stage in decoder_stages(whole, 2, seq_len=16, precision="fp64", **cut) if stage is not None]
    last: Any = stages[-1]
    last.gives_hidden = cut.get("checkpointing") == "stream"
    return PipelinedBackpropEmulator(
        stages, optimizer=SGD, loss_weight=num_targets,
        loss_fn=last.streamed_loss if last.gives_hidden else next_token_loss, **options,
    )  # fmt: skip


def errors(runtime: PipelinedBackprop, truth: PipelinedBackpropEmulator, losses: list[list[float]]) -> dict[str, float]:
    """Of this rank's weights, and of losses (found, expected)."""
    found = dict(runtime.stage.module.named_parameters())
    expected = dict(truth.stages[runtime.stage.index].module.named_parameters())
    weights = {name: relative_error(found[name].detach(), expected[name].detach()) for name in expected}
    return weights | {"losses": relative_error(*map(torch.tensor, losses))}


def shared(options: dict[str, Any], cut: dict[str, Any], family: dict[str, Any]) -> dict[str, float]:
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    runtime = pipeline_decoder(model(**family), mesh, seq_len=16, optimizer=SGD, precision="fp64", **options, **cut)
    truth, data = emulator(options, cut, family), micro_batches()
    found = [*runtime.run(data), *runtime.evaluate(data)]
    return errors(runtime, truth, [found, [*truth.run(data), *truth.evaluate(data)]])


STREAM = {"checkpointing": "stream", "stream": StreamSettings(chunk_size=3, logits_chunk=2)}
WINDOW = {"family": "mistral", "sliding_window": 5}


@pytest.mark.parametrize(
    ("options", "cut", "family"),
    [
        ({}, {}, {}),
        ({"mitigation": "stash", "clip": 0.5}, {"checkpointing": "full"}, {}),
        ({"schedule": "1f1b-async"}, {}, WINDOW),
        ({"schedule": "1f1b-async", "mitigation": "stash"}, STREAM, {}),
        ({"schedule": "2bw:3"}, STREAM, WINDOW),
        ({"schedule": "2bw:2", "shard_optimizer": True}, {"checkpointing": "selective"}, {}),
        ({"clip": ClipNorm(max_norm=0.3, scope="model", lag_updates=2, first_wait=False)}, {}, {}),
        ({"mitigation": "pipemare-dc"}, {}, {"family": "qwen3"}),
    ],
    ids=str,
)
def test_ranks_that_share_sequences_train_as_one_with_whole_ones(ranks, options, cut, family):
    for rank, found in enumerate(ranks(4)(shared, options, cut, family)):
        assert_errors(found, TOLERANCE, f"rank {rank}")


def with_replicas() -> dict[str, float]:
    """2 replicas of such stages: micro-batches of one update side by side are one of the emulator's."""
    mesh = init_mesh(dp=2, pp=2, cp=2, device_type="cpu")
    replicas = [micro_batches(), micro_batches(seed=5)]
    runtime = pipeline_decoder(model(), mesh, seq_len=13, optimizer=SGD, precision="fp64", schedule="1f1b-async")
    truth = emulator({"schedule": "1f1b-async"}, {}, {})
    runtime.run(replicas[mesh.get_local_rank("dp")])
    truth.run([tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(*replicas, strict=True)])
    return errors(runtime, truth, [[0.0], [0.0]])


def test_eight_ranks(ranks):
    for rank, found in enumerate(ranks(8)(with_replicas)):
        assert_errors(found, TOLERANCE, f"rank {rank}")


def poison(lm_head: nn.Module, here: bool) -> None:
    """From now on the gradient of the first token's hidden state is infinite in the second micro-batch."""
    calls = []

    def put(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(0)
        if here and len(calls) == 2:
            first = torch.zeros(inputs[0].shape[1], 1, dtype=torch.float64)
            first[0] = float("inf")
            inputs[0].register_hook(lambda gradient: torch.where(first > 0, gradient * first, gradient))

    lm_head.register_forward_pre_hook(put)


def left_out() -> dict[str, float]:
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    options: dict[str, Any] = {"skip_nonfinite": True, "schedule": "2bw:2"}
    runtime = pipeline_decoder(model(), mesh, seq_len=16, optimizer=SGD, precision="fp64", **options)
    truth = emulator(options, {}, {})
    if runtime.is_last:
        poison(runtime.stage.module.lm_head, here=mesh.get_local_rank("cp") == 0)
    poison(truth.stages[-1].module.lm_head, here=True)
    data = micro_batches()
    return errors(runtime, truth, [runtime.run(data), truth.run(data)])


def test_what_is_not_finite_on_one_rank_is_left_out_on_all(ranks):
    for rank, found in enumerate(ranks(4)(left_out)):
        assert_errors(found, TOLERANCE, f"rank {rank}")


def packed(cut: dict[str, Any]) -> dict[str, float]:
    """Rows of documents, told to the emulator's stages by a mask."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    runtime = pipeline_decoder(model(), mesh, seq_len=16, optimizer=SGD, precision="fp64", mitigation="stash", **cut)
    truth, data = emulator({"mitigation": "stash"}, {}, {}), []
    for (ids, targets), cuts in zip(micro_batches(), ((3, 9), (5, 5), (16, 1), (2, 12), (4, 4), (8, 20)), strict=True):
        starts = torch.arange(ids.shape[1])[None] >= torch.tensor(cuts)[:, None]
        targets = targets.masked_fill(starts.roll(-1, 1) & ~starts, -100)
        data.append(({"input_ids": ids, "document_ids": starts.long()}, targets))
    found = [*runtime.run(data), *runtime.evaluate(data)]
    return errors(runtime, truth, [found, [*truth.run(data), *truth.evaluate(data)]])


@pytest.mark.parametrize("cut", [{}, STREAM], ids=["none", "stream"])
def test_packed_rows(ranks, cut):
    for rank, found in enumerate(ranks(4)(packed, cut)):
        assert_errors(found, TOLERANCE, f"rank {rank}")


def packed_windows() -> dict[str, float]:
    """Two documents of one length in a row are two rows of the emulator's."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    runtime = pipeline_decoder(model(**WINDOW), mesh, seq_len=24, optimizer=SGD, precision="fp64")
    truth = emulator({}, {}, WINDOW)
    generator = torch.Generator().manual_seed(4)
    alone = [tuple(torch.randint(64, (2, 2, 12), generator=generator)) for _ in range(4)]
    documents = torch.tensor([[0] * 12 + [1] * 12])
    data = [({"input_ids": ids.view(1, 24), "document_ids": documents}, targets.view(1, 24)) for ids, targets in alone]
    return errors(runtime, truth, [runtime.run(data), truth.run(alone)])


def test_packed_rows_with_windows(ranks):
    for rank, found in enumerate(ranks(4)(packed_windows)):
        assert_errors(found, TOLERANCE, f"rank {rank}")
