"""A checkpoint written under one layout goes on under another as if nothing had happened."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.one_loss import tiny_model
from support.rank_pool import RankFailure

from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import init_mesh, parallelize

TEXT = torch.randint(64, (2, 4000), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


def run(
    axes: dict,
    options: dict,
    folder: str,
    resume: bool,
    num_layers: int = 2,
    adapters: bool = False,
    tied: bool = False,
) -> list[float]:
    layout = Layout(global_batch=4, seq_len=24, micro_batch=1, **axes)
    mesh = init_mesh(**axes, device_type="cpu")
    whole = tiny_model(num_hidden_layers=num_layers, tie_word_embeddings=tied)
    if adapters:
        from peft import LoraConfig, get_peft_model

        whole = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model = parallelize(whole, mesh, micro_batch=1, **options)
    kept = TrainingRun(
        gauge=MemoryGauge(torch.device("cpu")),
        checkpoints=Checkpoints(folder=Path(folder)),
        resume=Resume(choice="yes" if resume else "no"),
    )
    settings = TrainSettings(steps=4, warmup_steps=2, held_out_batches=0, checkpoint_every=2)
    result = train(model, layout, (TEXT[0], TEXT[1]), settings, kept)
    return [record.loss for record in result.records]


def resume_from_step_two(axes: dict, options: dict, folder: str, *model: object) -> list[float]:
    if dist.get_rank() == 0:
        shutil.rmtree(Path(folder) / "step_00000004")
        # Stops in the middle of a save and of a removal leave these.
        (Path(folder) / "partial_00000003").mkdir()
        shutil.copytree(Path(folder) / "step_00000002", Path(folder) / "removed_step_00000001")
    dist.barrier()
    return run(axes, options, folder, True, *model)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (({"pp": 2}, {}), ({"dp": 2}, {"zero_stage": 3})),
        (({"dp": 2}, {"zero_stage": 3}), ({"tp": 2}, {})),
        (({"dp": 2}, {"zero_stage": 1}), ({"tp": 2}, {"sequence_parallel": True})),
        (({"tp": 2}, {}), ({"cp": 2}, {"zero_stage": 2})),
        (({"tp": 2}, {}), ({"pp": 2}, {})),
        (({"dp": 2}, {}), ({"dp": 2}, {})),
        (({"dp": 2}, {"zero_stage": 2}), ({"dp": 2}, {"zero_stage": 3})),
        (({"tp": 2}, {"sequence_parallel": True}), ({"dp": 2}, {"zero_stage": 1})),
        (({"pp": 2}, {"vp": 2}), ({"dp": 2}, {"zero_stage": 3})),
        (({"dp": 2}, {"zero_stage": 1}), ({"pp": 2}, {"vp": 2})),
    ],
    ids=str,
)
def test_resume_under_another_layout(ranks, tmp_path, written, read):
    folder = str(tmp_path / "checkpoints")
    num_layers = 4 if any("vp" in options for _, options in (written, read)) else 2  # a layer a run
    losses = ranks(2)(run, *written, folder, False, num_layers)[0]
    # Steps 1 and 3 end at saved states; both kept. Only the first is used, so steps 2 and 3 are taken again.
    again = ranks(2)(resume_from_step_two, *read, folder, num_layers)[0]
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step_00000002", "step_00000004"]
    assert again == pytest.approx(losses[2:], rel=1e-5)


def test_adapters_go_on_under_another_layout(ranks, tmp_path):
    pytest.importorskip("peft")  # of the test extra, not of the package
    folder, model = str(tmp_path / "checkpoints"), (4, True)
    losses = ranks(2)(run, {"dp": 2}, {"zero_stage": 3}, folder, False, *model)[0]
    again = ranks(2)(resume_from_step_two, {"pp": 2}, {"vp": 2}, folder, *model)[0]
    assert again == pytest.approx(losses[2:], rel=1e-5)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (({"pp": 2}, {}), ({"dp": 2}, {"zero_stage": 3})),
        (({"tp": 2}, {}), ({"pp": 2}, {"vp": 2})),
        (({"pp": 2, "tp": 2}, {"zero_stage": 1}), ({"dp": 2, "pp": 2}, {"zero_stage": 3})),
    ],
    ids=str,
)
def test_a_weight_of_two_stages_goes_on_under_another_layout(ranks, tmp_path, written, read):
    folder, model = str(tmp_path / "checkpoints"), (4, False, True)
    world = 4 if len(written[0]) == 2 else 2
    losses = ranks(world)(run, *written, folder, False, *model)[0]
    again = ranks(world)(resume_from_step_two, *read, folder, *model)[0]
    assert again == pytest.approx(losses[2:], rel=1e-5)  # fp32's rounding, as above


def test_nothing_to_resume_from(ranks, tmp_path):
    with pytest.raises(RankFailure, match="holds no complete checkpoint: train without --resume first"):
        ranks(2)(run, {"dp": 2}, {}, str(tmp_path), True)


def test_a_second_run_does_not_replace_the_first(ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    ranks(2)(run, {"dp": 2}, {}, str(folder), False)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(RankFailure, match="step_00000004 of an earlier run: add --resume, or give another --out"):
        ranks(2)(run, {"dp": 2}, {}, str(folder), False)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_checkpoint_of_a_deeper_model_is_refused(ranks, tmp_path):
    folder = str(tmp_path / "checkpoints")
    ranks(2)(run, {"dp": 2}, {}, folder, False, 3)
    with pytest.raises(RankFailure, match="is of a model of 3 layers, but this has 2"):
        ranks(2)(run, {"dp": 2}, {}, folder, True)
