"""Other people's trainers on two ranks, streaming and around the ring: the plain run's losses and weights.

Replicas are DDP's, as the trainers make them. Around a ring both ranks take the same rows, and the plain run beside it
takes them whole; DDP's mean over two ranks of a loss that is their sum is what the trainer multiplies by.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_loss import tiny_model
from support.ring_models import complaint
from support.streamed_layers import counted_layers
from support.trl_trainers import STEPS, common, completion_only, dpo, grpo, run, sft, word_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fourfold.parallel import parallelize, shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.decoder import from_parallelism_config
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error
from fourfold.parallel.testing.tiny_models import batch, tiny

pytest.importorskip("trl")

CHUNKS = {"chunk_size": 8, "mlp_chunk": 3}
LOSS_TOLERANCE = 1e-5  # three updates of fp32, each a rounding apart
GRADIENT_TOLERANCE = 2e-6  # fp32 rounding
BF16_TOLERANCE = 4e-2  # 8 bits of mantissa, through two layers and back


@contextmanager
def launched() -> Iterator[None]:
    """The environment of a launcher, which trainers read, and none of an earlier trainer's settings."""
    from accelerate.state import AcceleratorState

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(os, "environ", os.environ | told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
        AcceleratorState._reset_state(True)
        yield
        AcceleratorState._reset_state(True)


def trainer(model: nn.Module, tokenizer: Any, folder: str) -> Any:
    """transformers' own, over rows with uneven numbers of labels, of two micro-batches a step."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(28) < 2 + i, -100)}
            for i, ids in enumerate(batch(24, 28))]  # fmt: skip
    return Trainer(
        model, TrainingArguments(**common(folder, gradient_accumulation_steps=2)), train_dataset=rows,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip


def packed(model: nn.Module, tokenizer: Any, folder: str) -> Any:
    return sft(model, tokenizer, folder, packing=True, max_length=48)


TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": trainer, "SFT": sft, "SFT, packed": packed, "SFT, completions": completion_only, "DPO": dpo,
    "GRPO": grpo,
}  # fmt: skip


def losses_and_weights(name: str, *, streams: bool, ring: bool | None) -> tuple[list[float], dict[str, Tensor], int]:
    """Of one training, and how many layers streamed in it.

    Args:
        ring: True to train around the ring of all ranks; False to give every rank the same whole rows, as beside it;
            None to leave the rows to the trainer.
    """
    model = tiny("llama")
    if ring:
        use_ring_attention(model, None)
    if streams:
        stream_backprop(model, **CHUNKS)
    with launched(), tempfile.TemporaryDirectory() as folder:
        made = TRAINERS[name](model, word_tokenizer(), folder)
        if ring is not None:
            collate = made.data_collator
            made.get_train_dataloader = lambda: DataLoader(
                made.train_dataset, batch_size=2, collate_fn=lambda rows: around_the_ring(collate(rows), ring)
            )
        with counted_layers() as layers:
            losses = run(made)
    return losses, dict(model.named_parameters()), len(layers)


def around_the_ring(rows: dict[str, Any], ring: bool) -> dict[str, Any]:
    return shard_batch(rows, None) if ring else dict(rows)


def differences(name: str, ring: bool | None) -> tuple[dict[str, float], int]:
    """Of losses and weights from the plain run's, and of this rank's weights from the first rank's; layers streamed."""
    plain, expected, _ = losses_and_weights(name, streams=False, ring=None if ring is None else False)
    losses, weights, layers = losses_and_weights(name, streams=True, ring=ring)
    errors = {f"loss {step}": abs(mine - its) for step, (mine, its) in enumerate(zip(losses, plain, strict=True))}
    for key, weight in weights.items():
        first = weight.detach().clone()
        dist.broadcast(first, 0)
        errors[key] = relative_error(weight.detach(), expected[key].detach())
        errors[f"{key} on ranks"] = float((weight.detach() - first).abs().max())
    return errors, layers


@pytest.mark.parametrize("name", ["Trainer", "SFT", "DPO", "GRPO"])
def test_replicas_stream_with_the_plain_runs_losses(ranks, name):
    check(ranks(2)(differences, name, None), name)


@pytest.mark.parametrize("name", ["Trainer", "SFT, packed", "SFT, completions"])
def test_a_ring_that_streams_has_the_plain_runs_losses(ranks, name):
    check(ranks(2)(differences, name, True), name)


def check(answers: list[tuple[dict[str, float], int]], name: str) -> None:
    assert_ranks([errors for errors, _ in answers], LOSS_TOLERANCE, name)
    micro_batches = STEPS * (2 if name == "Trainer" else 1)
    assert [layers for _, layers in answers] == [2 * micro_batches] * 2


def trained_around_a_ring_unsharded(name: str) -> str:
    model = tiny("llama")
    use_ring_attention(model, None)
    with launched(), tempfile.TemporaryDirectory() as folder:
        return complaint(run, TRAINERS[name](model, word_tokenizer(), folder))


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("Trainer", "make the arguments with shard_batch"),
        ("SFT", "make the arguments with shard_batch"),
        ("DPO", "make the arguments with shard_batch"),
        ("GRPO", r"call stop_ring_attention\(model\) before generating"),
    ],
)
def test_rows_that_nobody_has_cut_for_the_ring_are_refused(ranks, name, mend):
    """DPO's and GRPO's losses are no sums over tokens, so their rows cannot be cut at all."""
    for told in ranks(2)(trained_around_a_ring_unsharded, name):
        assert re.search(f"around a ring.*{mend}", told), told


def sharded_by_accelerate(mixed_precision: str | None, ring: bool) -> tuple[dict[str, float], int]:
    """Errors of loss and gradients under FSDP2 by Accelerate, streaming, against one process; layers streamed."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.utils import DistributedType

    plain, model, ids = tiny("llama"), tiny("llama"), batch(2, 33)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision is not None):
        truth = plain(input_ids=ids, labels=ids).loss
    truth.backward()
    if ring:
        use_ring_attention(model, None)
    stream_backprop(model, **CHUNKS)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    config = ParallelismConfig(cp_size=2) if ring else ParallelismConfig(dp_shard_size=2)
    with launched():
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        # On a CPU Accelerate takes no notice of a plugin; its preparation of the model does not mind.
        state = accelerator.state
        state.distributed_type, state.fsdp_plugin, state.parallelism_config = DistributedType.FSDP, plugin, config
        state.device_mesh = config.get_device_mesh("cpu")
        if mixed_precision is not None:
            plugin.set_mixed_precision(mixed_precision)
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        whole = {"input_ids": ids, "labels": ids}
        rank = dist.get_rank()
        mine = shard_batch(whole, None) if ring else {name: rows[rank : rank + 1] for name, rows in whole.items()}
        with counted_layers() as layers:
            loss = prepared(**mine).loss
            accelerator.backward(loss * (2 if ring else 1))  # FSDP2 takes the mean of what the ring's shards sum to
    dist.all_reduce(total := loss.detach().float() / (1 if ring else 2))
    errors = {"loss": relative_error(total, truth.detach())}
    for (name, parameter), whole_parameter in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        errors[name] = relative_error(parameter.grad.full_tensor(), whole_parameter.grad)
    return errors, len(layers)


@pytest.mark.parametrize("ring", [False, True], ids=["dp_shard_size=2", "cp_size=2"])
@pytest.mark.parametrize("mixed_precision", [None, "bf16"])
def test_fsdp2_by_accelerate_shards_a_streaming_model(ranks, mixed_precision, ring):
    answers = ranks(2)(sharded_by_accelerate, mixed_precision, ring)
    tolerance = GRADIENT_TOLERANCE if mixed_precision is None else BF16_TOLERANCE
    assert_ranks([errors for errors, _ in answers], tolerance, f"{mixed_precision}, ring={ring}")
    assert [layers for _, layers in answers] == [2, 2]


def parallelized(sizes: dict[str, int]) -> tuple[dict[str, float], bool, int]:
    """Errors of loss and gradients of `parallelize` under a ParallelismConfig; whether its groups are Accelerate's."""
    from accelerate import ParallelismConfig

    config, plain, ids = ParallelismConfig(**sizes), tiny_model(), batch(4, 32) % 64
    truth = plain(input_ids=ids, labels=ids).loss
    truth.backward()
    arguments = from_parallelism_config(config, device_type="cpu")
    mesh, theirs = arguments["mesh"], config.get_device_mesh("cpu")
    axes = {"dp_replicate": "dp", "dp_shard": "dp", "cp": "cp", "tp": "tp"}
    alike = all(
        dist.get_process_group_ranks(theirs.get_group(name)) == dist.get_process_group_ranks(mesh.get_group(axes[name]))
        for name in theirs.mesh_dim_names
    )
    model = parallelize(tiny_model(), **arguments)
    loss = model.forward_backward(ids[model.batch_rows(4)])
    errors = {"loss": relative_error(loss, truth.detach())}
    whole = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = full_tensor(parameter.grad)
        errors[name] = relative_error(gradient, whole[name].grad)
    return errors, alike, arguments["zero_stage"]


@pytest.mark.parametrize(
    ("sizes", "zero_stage"),
    [
        ({"dp_shard_size": 2, "tp_size": 2}, 3),
        ({"dp_shard_size": 2, "cp_size": 2}, 3),
        ({"dp_replicate_size": 4}, 0),
    ],
)
def test_parallelize_takes_a_parallelism_config(ranks, sizes, zero_stage):
    answers = ranks(4)(parallelized, sizes)
    assert_ranks([errors for errors, _, _ in answers], GRADIENT_TOLERANCE, str(sizes))
    assert [(alike, stage) for _, alike, stage in answers] == [(True, zero_stage)] * 4
