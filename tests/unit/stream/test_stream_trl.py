"""TRL's trainers with their defaults around a streaming model: every layer streams, and losses are the plain run's.

TRL calls the base model itself, gives it no labels, and has a head of its own.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.streamed_layers import counted_layers
from support.trl_trainers import STEPS, common, completion_only, dpo, grpo, run, sft, text, word_tokenizer
from torch import nn

from fourfold.parallel.stream import stream_backprop
from fourfold.parallel.testing.tiny_models import batch, tiny

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

CHUNKS = {"chunk_size": 8, "mlp_chunk": 3}
# Three updates of fp32, each a rounding apart.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def assistant_only(model, tokenizer, folder):
    turns = [("user", 5), ("assistant", 9), ("user", 14), ("assistant", 20)]
    rows = [
        {
            "messages": [
                {"role": role, "content": text(row[end - 4 : end + index % 3])}
                for (role, end), index in zip(turns, range(number, number + 4), strict=True)
            ]
        }
        for number, row in enumerate(batch(6, 24))
    ]
    return sft(model, tokenizer, folder, rows, assistant_only_loss=True, packing=True, max_length=48)


def lora(model, tokenizer, folder):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["lm_head"], lora_dropout=0.0
    )
    return sft(model, tokenizer, folder, peft_config=adapters)


def reward(model, tokenizer, folder):
    rows = [{"chosen": text(row[:15]), "rejected": text(row[15:])} for row in batch(6, 24)]
    settings = trl.RewardConfig(**common(folder))
    return trl.RewardTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )


TRAINERS = {
    "sft": sft,
    "sft, packed": lambda *given: sft(*given, packing=True),
    "sft, padding-free": lambda *given: sft(*given, padding_free=True, max_length=None),
    "sft, label smoothing": lambda *given: sft(*given, label_smoothing_factor=0.1),
    "sft, uneven accumulation": lambda *given: sft(
        *given, gradient_accumulation_steps=STEPS, per_device_train_batch_size=1
    ),
    "sft, neftune": lambda *given: sft(*given, neftune_noise_alpha=5.0),
    "sft, completions only": completion_only,
    "sft, assistants only, packed": assistant_only,
    "sft, lora": lora,
    "sft, experts": sft,
    "dpo, experts": dpo,
    "dpo": dpo,
    "grpo": grpo,
    "reward": reward,
}


def decoder(name: str) -> nn.Module:
    return classifier() if name == "reward" else tiny("mixtral" if "experts" in name else "llama")


def classifier() -> nn.Module:
    config = tiny("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).train()


@pytest.fixture(autouse=True)
def own_accelerator():
    """Accelerate remembers the first accelerator's settings in the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def start(name: str, model: nn.Module, tokenizer: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TRAINERS[name](model, tokenizer, folder)


@pytest.fixture(scope="module")
def plain_run(tokenizer, tmp_path_factory) -> Callable[[str], tuple[list[float], list[nn.Parameter]]]:
    """Losses and weights of a trainer around a model that does not stream, for both orders."""

    @cache
    def trained(name: str) -> tuple[list[float], list[nn.Parameter]]:
        model = decoder(name)
        losses = run(start(name, model, tokenizer, tmp_path_factory.mktemp("plain")))
        return losses, list(model.parameters())

    return trained


@pytest.mark.parametrize("order", ["streaming first", "trainer first"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_layer_streams_and_losses_are_the_plain_runs(name, order, tokenizer, plain_run, tmp_path):
    plain, plain_weights = plain_run(name)
    model = decoder(name)
    if order == "streaming first":
        stream_backprop(model, **CHUNKS)
    trainer = start(name, model, tokenizer, tmp_path)
    if order == "trainer first":
        stream_backprop(model, **CHUNKS)
    checkpointing = pytest.warns(UserWarning, match="streaming replaces it")
    with counted_layers() as layers, checkpointing if trainer.args.gradient_checkpointing else contextlib.nullcontext():
        streamed = run(trainer)
    assert len(layers) == 2 * STEPS * trainer.args.gradient_accumulation_steps
    assert streamed == pytest.approx(plain, rel=LOSS_TOLERANCE, abs=1e-6)
    for (key, mine), theirs in zip(model.named_parameters(), plain_weights, strict=True):
        assert (mine - theirs).norm() <= LOSS_TOLERANCE * theirs.norm(), key
