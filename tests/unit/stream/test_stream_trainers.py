"""Training loops of other libraries around a streaming model: layers stream, and losses are the plain run's.

Losses of a few steps of fp32 SGD tell gradients apart: after the first update they depend on them.
"""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.streamed_layers import counted_layers
from torch import nn
from transformers import Trainer, TrainingArguments

from fourfold.parallel.stream import stream_backprop, streamed_layers
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

pytest.importorskip("accelerate")

CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}
TOLERANCE = 2e-6  # as in test_stream_backprop.py
# Three updates of fp32, each a rounding apart.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def own_accelerator():
    """Accelerate remembers the first accelerator's settings in the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Rows(torch.utils.data.Dataset):
    """Rows of 21 tokens, the first five of which are a prompt, with a column that no model takes."""

    def __init__(self, count: int = 6) -> None:
        self.ids = batch(count, 21)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.ids[index].clone()
        labels[: 5 + index] = -100
        return {"input_ids": self.ids[index], "labels": labels, "weight": torch.tensor(1.0)}


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "use_cpu": True,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"]
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return 2 * F.cross_entropy(logits.flatten(0, 1), shifted.flatten())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "accumulation of uneven labels": ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, {}),
    "a loss function": ({}, {"compute_loss_func": weighted}),
    "neftune": ({"neftune_noise_alpha": 5.0}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_streams_every_layer_of_every_step(case, tmp_path):
    changes, extra = CASES[case]

    def run(model: nn.Module) -> list[float]:
        settings = arguments(tmp_path, **changes)
        return losses(Trainer(model=model, args=settings, train_dataset=Rows(), **extra))

    plain_model, model = tiny("llama"), tiny("llama")
    plain = run(plain_model)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        streamed = run(model)
    micro_batches = 3 * changes.get("gradient_accumulation_steps", 1)
    assert len(layers) == streamed_layers(model) == 2 * micro_batches
    assert streamed == pytest.approx(plain, rel=LOSS_TOLERANCE)
    for (name, mine), theirs in zip(model.named_parameters(), plain_model.parameters(), strict=True):
        assert (mine - theirs).norm() <= LOSS_TOLERANCE * theirs.norm(), name


def test_checkpointing_is_refused_with_the_argument_to_leave_out(tmp_path):
    model = stream_backprop(tiny("llama"), **CHUNKS)
    settings = arguments(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="leave gradient_checkpointing=True out of a trainer's arguments"):
        Trainer(model=model, args=settings, train_dataset=Rows()).train()


def test_a_resumed_training_goes_on_as_the_plain_one(tmp_path):
    def run(model: nn.Module, kind: str) -> list[float]:
        settings = arguments(tmp_path / kind, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
        Trainer(model=model, args=settings, train_dataset=Rows()).train()
        torch.manual_seed(1)
        trainer = Trainer(model=model, args=settings, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-2"))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = run(tiny("llama"), "plain")
    streamed = run(stream_backprop(tiny("llama"), **CHUNKS), "streamed")
    assert len(plain) == 4
    assert streamed == pytest.approx(plain, rel=1e-4)  # AdamW's first updates divide roundings by roundings


def test_evaluation_gives_the_metrics_their_logits(tmp_path):
    def accuracy(prediction: Any) -> dict[str, float]:
        found = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(found.mean()), "sum": float(abs(prediction.predictions).sum())}

    def run(model: nn.Module) -> dict[str, float]:
        trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=Rows(), compute_metrics=accuracy)
        return {
            key: value for key, value in trainer.evaluate().items() if "per_second" not in key and "time" not in key
        }

    plain = run(tiny("llama"))
    assert run(stream_backprop(tiny("llama"), **CHUNKS)) == pytest.approx(plain, rel=LOSS_TOLERANCE)


def test_the_signature_stays():
    plain, model = tiny("llama"), stream_backprop(tiny("llama"))
    for mine, theirs in ((model.forward, plain.forward), (model.model.forward, plain.model.forward)):
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters)
    assert "input_ids" in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("first", ["streaming first", "prepared first"])
def test_accelerate_wraps_and_unwraps_a_streaming_model(first):
    from accelerate import Accelerator

    ids, model = batch(2, 21), tiny("llama")
    plain_model = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain_model = accelerator.prepare_model(plain_model)
    plain = gradients(plain_model, plain_model(input_ids=ids, labels=ids).loss)
    if first == "streaming first":
        stream_backprop(model, **CHUNKS)
    prepared = accelerator.prepare_model(model)
    if first == "prepared first":
        stream_backprop(model, **CHUNKS)
    with counted_layers() as layers, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(prepared, prepared(input_ids=ids, labels=ids).loss)
    assert len(layers) == 2
    # bf16 products: as in test_autocast of test_stream_backprop.py.
    assert_gradients(found, plain, 0.04)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    with counted_layers() as layers:
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(layers) == 2
