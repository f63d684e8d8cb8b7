"""`--engine deepspeed`: the native engine's losses and exported weights; what DeepSpeed means otherwise is refused."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.one_loss import tiny_model
from support.training_process import forked_ranks
from transformers import AutoModelForCausalLM

from fourfold.launch.training import deepspeed_engine
from fourfold.launch.training.deepspeed_engine import check_engine, configuration
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.huggingface import model_from_config
from fourfold.layouts.inputs.layout import Layout

SIZES = {"global_batch": 8, "seq_len": 16}
SETTINGS = TrainSettings(steps=1, engine="deepspeed", precision="fp32")


def trained(folder: Path, layout: str, *words: str) -> dict:
    """What two ranks leave: two micro-batches a step, gradients above the clipping norm, an evaluation in between."""
    name = "-".join([*layout.split(), *words])
    out = folder / name
    options = [
        "--model", folder / "config", "--data", folder / "text.txt",
        "--layout", layout, "--global-batch=8", "--seq-len=16", "--steps=4",
        "--warmup-steps=2", "--max-norm=0.5", "--held-out-batches=1", "--evaluate-every=2", "--quiet", "--out", out,
        "--export", out / "exported", *words,
    ]  # fmt: skip
    for rank in forked_ranks(folder / f"{name}.log", 2, options):
        assert rank.wait(200.0) == 0, rank.text()
    return json.loads((out / "result.json").read_text())


def assert_alike(folder: Path, layouts: tuple[str, ...], *words: str) -> None:
    """DeepSpeed's losses, held-out loss and exported weights are the native engine's."""
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i % 97} jumps over {i % 13}.\n" for i in range(300)))
    native = trained(folder, "dp2 mb2", *words)
    weights = AutoModelForCausalLM.from_pretrained(native["export"]).state_dict()
    # DeepSpeed takes its sums in another order; after four steps a weight was off by 1.5e-6.
    for layout in layouts:
        result = trained(folder, layout, "--engine=deepspeed", *words)
        assert result["losses"] == pytest.approx(native["losses"], abs=1e-5), layout
        assert result["heldout_loss"] == pytest.approx(native["heldout_loss"], abs=1e-5), layout
        for name, weight in AutoModelForCausalLM.from_pretrained(result["export"]).state_dict().items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=f"{layout}: {name}")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_its_losses_and_weights_are_the_native_engines(tmp_path):
    tiny_model(num_hidden_layers=2, vocab_size=256).config.save_pretrained(tmp_path / "config")
    assert_alike(tmp_path, ("dp2 z1 mb2", "dp2 z3 mb2"))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_windows_tied_ends_and_products_in_bf16_from_a_folder(tmp_path):
    model = tiny_model("mistral", num_hidden_layers=2, vocab_size=256, sliding_window=5, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "config")
    assert_alike(tmp_path, ("dp2 mb2", "dp2 z2 mb2 full"), "--precision=bf16-mixed")


@pytest.mark.parametrize(
    ("layout", "settings", "named"),
    [
        ({"pp": 2}, {}, "pp=2 .*use pp=1"),
        ({"cp": 2}, {}, "cp=2 .*use cp=1"),
        ({"tp": 2}, {}, "tp=2 .*use tp=1"),
        ({"pp": 2, "schedule": "2bw"}, {}, "schedule='2bw' .*1f1b"),
        ({"checkpointing": "selective"}, {}, "checkpointing='selective' .*'full'"),
        ({"checkpointing": "stream"}, {}, "checkpointing='stream' .*'full'"),
        (
            {"zero_stage": 3, "sharded_accumulation": True},
            {},
            "sharded_accumulation=true .*sharded_accumulation=false",
        ),
        ({"compile": True}, {}, "compile=true .*compile=false"),
        ({"precision": "fp64"}, {"precision": None}, "precision='fp64' .*fp32"),
        ({}, {"precision": "bf16"}, "precision='bf16' .*bf16-mixed"),
        ({}, {"optimizer": "muon"}, "optimizer='muon' .*adamw"),
        ({}, {"checkpoint_every": 5}, "checkpoint_every=5 .*checkpoint_every=0"),
    ],
)
def test_what_deepspeed_means_otherwise_is_refused(layout, settings, named):
    asked = TrainSettings(**{"steps": 1, "engine": "deepspeed", "precision": "fp32", **settings})
    with pytest.raises(ValueError, match=named):
        check_engine(Layout(**SIZES, **layout), asked)


def test_a_checkpoint_to_go_on_from_is_refused():
    with pytest.raises(ValueError, match=r"resume='auto' .*leave resume out"):
        check_engine(Layout(**SIZES), SETTINGS, resume="auto")


def test_a_missing_deepspeed_is_named(monkeypatch):
    monkeypatch.setattr(deepspeed_engine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed is not installed"):
        check_engine(Layout(**SIZES), SETTINGS)
    check_engine(Layout(**SIZES), TrainSettings(steps=1))  # nobody asked for it


def test_its_configuration_is_the_export_in_fp32_with_the_trainings_clipping():
    model = model_from_config(tiny_model().config.to_dict())
    layout = Layout(dp=2, zero_stage=3, micro_batch=2, precision="fp32", compile=False, **SIZES)
    config = configuration(layout, model, TrainSettings(steps=1, max_norm=0.25))
    assert config["zero_optimization"]["stage"] == 3
    assert (config["bf16"], config["gradient_clipping"]) == ({"enabled": False}, 0.25)
    sizes = [config[f"train_{name}"] for name in ("batch_size", "micro_batch_size_per_gpu")]
    assert [*sizes, config["gradient_accumulation_steps"]] == [8, 2, 2]
    assert "optimizer" not in config
