"""Muon under every layout that leaves matrices whole takes the steps of one process; elsewhere it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_loss import tiny_model

from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.data import training_rows
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.optimizers import check_optimizer
from fourfold.launch.training.settings import TrainSettings, learning_rate_at
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import init_mesh, parallelize

TEXT = torch.randint(64, (2, 4000), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
SETTINGS = TrainSettings(
    steps=6, warmup_steps=2, learning_rate=0.02, held_out_batches=0, checkpoint_every=3, optimizer="muon"
)
SIZES = {"num_hidden_layers": 2}


def by_hand() -> list[float]:
    """One process: torch's own optimizers over the plain model."""
    model = tiny_model(**SIZES)
    inner = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    outer = [p for name, p in model.named_parameters() if ".layers." not in name and p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert len(inner) == 2 * 7
    optimizers = [
        torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": outer, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
        ),
    ]
    losses = []
    for step in range(SETTINGS.steps):
        ids = training_rows(TEXT[0], seq_len=24, global_batch=4, step=step, seed=0, rows=slice(0, 4))
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, SETTINGS)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(axes: dict[str, int], folder: str, choice: str) -> list[float]:
    layout = Layout(global_batch=4, seq_len=24, micro_batch=1, **axes)
    mesh = init_mesh(**axes, device_type="cpu")
    model = parallelize(tiny_model(**SIZES), mesh, micro_batch=1)
    run = TrainingRun(
        gauge=MemoryGauge(torch.device("cpu")), checkpoints=Checkpoints(folder=Path(folder)),
        resume=Resume(choice=choice),
    )  # fmt: skip
    with run.gauge:
        return [record.loss for record in train(model, layout, (TEXT[0], TEXT[1]), SETTINGS, run).records]


@pytest.mark.parametrize("axis", ["dp", "pp", "cp"])
def test_muon_takes_the_steps_of_one_process(ranks, tmp_path, axis):
    folder = str(tmp_path / "checkpoints")
    first, second = ranks(2)(trained, {axis: 2}, folder, "no")
    assert first == second
    # Muon multiplies in bf16: where a sum's last fp32 bit differs, a product may round to its neighbour.
    assert first == pytest.approx(by_hand(), rel=1e-3)
    again, _ = ranks(2)(trained, {axis: 2}, folder, "3")
    assert again == first[3:]  # to the bit
    other, _ = ranks(2)(trained, {"pp" if axis == "dp" else "dp": 2}, folder, "3")
    assert other == pytest.approx(first[3:], rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tp": 2}, "tp=2"),
        ({"dp": 2, "zero_stage": 3}, "zero_stage=3"),
        ({"dp": 2, "zero_stage": 1}, "zero_stage=1"),
        ({"pp": 2, "schedule": "lockstep"}, "schedule='lockstep'"),
    ],
    ids=str,
)
def test_muon_is_refused_where_it_would_be_another(fields: dict[str, Any], named: str):
    layout = Layout(global_batch=4, seq_len=24, **fields)
    with pytest.raises(ValueError, match=f"optimizer='muon' with {named}.*optimizer='adamw'"):
        check_optimizer(layout, SETTINGS)
    check_optimizer(layout, TrainSettings(steps=1))
