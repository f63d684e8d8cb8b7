"""What a training builds of a layout: each field of it that `parallelize` has an argument for arrives there."""

from dataclasses import fields
from inspect import signature

import pytest

from fourfold.launch.training import build
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.parallel import parallelize

BATCH = {"global_batch": 8, "seq_len": 64}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, vp=2, schedule="zero-bubble", compile=False, zero_stage=1, **BATCH),
        Layout(dp=2, zero_stage=3, sharded_accumulation=True, checkpointing="full", micro_batch=2, **BATCH),
        Layout(pp=2, tp=2, sequence_parallel=True, embedding_counts_as=1, head_counts_as=2, precision="bf16", **BATCH),
    ],
    ids=str,
)
def test_every_field_of_the_layout_arrives(monkeypatch, layout):
    given: dict[str, object] = {}
    monkeypatch.setattr(build, "parallelize", lambda model, mesh, **options: given.update(options))
    monkeypatch.setattr(build, "empty_model", lambda config: None)
    build._parallel_model(layout, load_model("llama-3.2-1b").config, None, TrainSettings(steps=1))
    shared = {entry.name for entry in fields(Layout)} & signature(parallelize).parameters.keys()
    assert {"schedule", "vp", "compile"} < shared
    said = {name: getattr(layout, name) for name in shared}
    said["precision"] = None if layout.precision == "auto" else layout.precision  # parallelize's word for it
    assert {name: given[name] for name in shared} == said
