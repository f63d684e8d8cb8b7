"""Ranks that share sequences in asynchronous stages: streams that pause, and what would leave a ring waiting."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from support.digest import digest
from support.pipeline_models import small_llama
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator, init_mesh, use_ring_attention
from fourfold.parallel.decoder import decoder_stages, pipeline_decoder
from fourfold.parallel.decoder.async_pipeline import next_token_loss
from fourfold.parallel.pipeline import PipelineError
from fourfold.parallel.pipeline.stage import PipelineStage

ADAMW = partial(torch.optim.AdamW, lr=0.01)


def rows(count: int, *, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 32, (2, 9 + number % 3), generator=generator) for number in range(count)]
    return [(row[:, :-1], row[:, 1:]) for row in drawn]


def paused(schedule: str) -> list[str]:
    """This rank's state undisturbed; evaluated at every pause; saved and loaded at every pause."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    make = partial(pipeline_decoder, mesh=mesh, seq_len=8, optimizer=ADAMW, schedule=schedule)
    data, other = rows(9), rows(2, seed=9)
    whole = make(small_llama())
    ends = [digest(whole.run(data), whole.state_dict())]
    for saves in (False, True):
        pipeline, losses = make(small_llama()), []
        for part in (data[:1], data[1:5]):
            losses += pipeline.run(part, drain=False)
            if saves:
                state = deepcopy(pipeline.state_dict())
                pipeline = make(small_llama())
                pipeline.load_state_dict(state)
            else:
                assert pipeline.evaluate(other) == pipeline.evaluate(other)
        losses += pipeline.run(data[5:])
        ends.append(digest(losses, pipeline.state_dict()))
    return ends


@pytest.mark.parametrize("schedule", ["lockstep", "2bw:3"])
def test_a_stream_that_pauses_ends_as_one_that_does_not(ranks, schedule):
    for rank, ends in enumerate(ranks(4)(paused, schedule)):
        assert len(set(ends)) == 1, f"rank {rank}"


def broken() -> None:
    raise KeyError("a worker of the loader")


def misused(how: str) -> tuple[str, str]:
    """What this rank of 2 stages x 2 cp is told; the second cp rank is the one that errs, where one alone does."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    errs = mesh.get_local_rank("cp") == 1
    pipeline = pipeline_decoder(small_llama(), mesh, seq_len=8, optimizer=ADAMW)
    data: Any = rows(3)
    if how == "another order" and errs:
        data[1] = tuple(each.flip(0) for each in data[1])
    elif how == "a shorter stream" and errs:
        data = data[:2]
    elif how == "a stream that raises" and errs:
        data = (pair if number < 2 else broken() for number, pair in enumerate(data))
    elif how == "a mask":
        data[1] = {"input_ids": data[1][0], "attention_mask": torch.ones_like(data[1][0])}, data[1][1]
    elif how == "short rows":
        data[1] = data[1][0][:, :1], data[1][1][:, :1]
    elif how == "an id that is none":
        data[1] = torch.full_like(data[1][0], 32), data[1][1]
    elif how == "a target that is none":
        data[1] = data[1][0], torch.full_like(data[1][1], 32)
    elif how == "targets of other rows":
        data[1] = data[1][0], data[1][1][:, 1:]
    elif how == "documents in pieces":
        data[1] = {"input_ids": data[1][0], "document_ids": torch.tensor([[0, 1, 0] + [2] * 6] * 2)}, data[1][1]
    elif how == "positions of documents":
        twice = dict.fromkeys(("document_ids", "position_ids"), torch.zeros_like(data[1][0]))
        data[1] = {"input_ids": data[1][0], **twice}, data[1][1]
    try:
        pipeline.run(data)
    except (ValueError, PipelineError, KeyError) as error:
        return type(error).__name__, str(error)
    return "", ""


SAID = {
    "another order": "the stream of rank 1 has another micro-batch than that of rank 0, which shares every sequence",
    "a shorter stream": "the stream of rank 1 has another length than that of rank 0, which shares every sequence",
    "a stream that raises": "the stream of rank 1 has raised an error",
    "a mask": "give document_ids in which padding at a row's end is a document of its own",
    "short rows": "rows of 1 tokens give the ranks of cp=2 [1, 0]",
    "an id that is none": "token id 32 in a vocabulary of 32",
    "a target that is none": "label 32 in a vocabulary of 32",
    "targets of other rows": "targets [2, 8] for rows of [2, 9]",
    "documents in pieces": "comes back to document 0 after another one",
    "positions of documents": "leave position_ids out",
}


def test_what_would_leave_a_ring_waiting_ends_all_ranks(ranks):
    pool = ranks(4)
    try:
        for how, said in SAID.items():
            told = pool(misused, how, timeout_s=60.0)
            assert all(kind for kind, _ in told), f"{how}: {told}"
            assert any(said in message for _, message in told), f"{how}: {told}"
    finally:
        pool.close()


def apart() -> list[str]:
    """A ring's stages without their replicas' group, and in the emulator."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    model = small_llama()
    use_ring_attention(model, mesh.get_group("cp"))
    stages: list[Any] = decoder_stages(model, 2, seq_len=8)
    options: dict[str, Any] = {"optimizer": ADAMW, "loss_fn": next_token_loss}
    messages = []
    for refused in (
        lambda: PipelinedBackprop(stages, group=mesh.get_group("pp"), **options),
        lambda: PipelinedBackpropEmulator(stages, **options),
    ):
        with pytest.raises(ValueError, match="would train as several models") as error:
            refused()
        messages.append(str(error.value))
    return messages


def test_ranks_that_share_sequences_are_replicas(ranks):
    for messages in ranks(4)(apart):
        assert all("give dp_group the ranks of dp and cp together" in message for message in messages)


def cut_and_sharing() -> list[str]:
    """A stage whose matrices are cut and whose ranks share sequences, of a decoder and of one's own."""
    mesh = init_mesh(cp=2, tp=2, device_type="cpu")
    module: Any = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh["tp"], [Shard(0)]))
    module.cp_group = mesh.get_group("cp")
    with pytest.raises(ValueError, match="cut over tp=2 and shares sequences over cp=2") as own:
        PipelineStage(module, index=1, delay=0, dp_group=module.cp_group, optimizer=ADAMW)
    with pytest.raises(ValueError, match="choose cp=1 or tp=1") as decoder:
        pipeline_decoder(small_llama(), mesh, seq_len=8, optimizer=ADAMW)
    return [str(own.value), str(decoder.value)]


def test_stages_are_cut_or_share_sequences(ranks):
    for own, decoder in ranks(4)(cut_and_sharing):
        assert "choose tp=1 or cp=1" in own
        assert "cp=2 and tp=2 with schedule='lockstep'" in decoder
