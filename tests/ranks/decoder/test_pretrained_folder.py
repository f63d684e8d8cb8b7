"""A trained model leaves as a folder that transformers loads, with the weights of one process, under every layout."""

import json

import pytest
import torch
from support.one_loss import GLOBAL_BATCH, adamw, batches, relative_error, tiny_model
from transformers import AutoModelForCausalLM

from fourfold.parallel import init_mesh, parallelize


def saved(mesh_shape: dict, options: dict, model_options: dict, folder: str, dtype) -> tuple[float, str]:
    """The loss after one step, and what saving a second time says."""
    model = parallelize(tiny_model(**model_options), init_mesh(**mesh_shape, device_type="cpu"), **options)
    optimizer = adamw(model.parameters())
    ids, labels = batches(True)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    model.forward_backward(ids[rows], labels[rows])
    model.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()
    loss = model.evaluate(ids[rows], labels[rows]).item()
    model.save_pretrained(folder, dtype=dtype)
    with pytest.raises(ValueError, match="holds weights already") as again:
        model.save_pretrained(folder)
    return loss, str(again.value)


def index_of(folder) -> tuple[dict, list[str]]:
    """The bytes of all weights, and their names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["metadata"], sorted(index["weight_map"])


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model_options"),
    [
        ({}, {}, {}),
        ({}, {"zero_stage": 3}, {"tie_word_embeddings": True}),
        ({"dp": 2}, {}, {}),
        ({"dp": 2}, {"zero_stage": 3}, {}),
        ({"tp": 2}, {}, {"tie_word_embeddings": True}),
        ({"tp": 2}, {"zero_stage": 3}, {"family": "qwen3"}),
        ({"cp": 2}, {}, {"family": "mistral", "sliding_window": 5}),
        ({"pp": 2}, {"micro_batch": 1}, {}),
        ({"pp": 2}, {"zero_stage": 3, "checkpointing": "stream"}, {"family": "qwen3"}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 1, "vp": 2}, {"family": "qwen3"}),
        ({"dp": 2, "tp": 2}, {"zero_stage": 3}, {"tie_word_embeddings": True}),
        ({"pp": 2}, {"vp": 2}, {"tie_word_embeddings": True}),
        ({"pp": 4}, {}, {}),
        ({"pp": 2, "tp": 2}, {"zero_stage": 3}, {"tie_word_embeddings": True}),
        ({"pp": 2, "tp": 2}, {}, {}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 3}, {}),
    ],
    ids=str,
)
def test_the_folder_has_the_trained_model(ranks, tmp_path, mesh_shape, options, model_options):
    world = torch.tensor(list(mesh_shape.values()) or [1]).prod().item()
    results = ranks(world)(saved, mesh_shape, options, model_options, str(tmp_path / "model"), None)
    loss = results[0][0]
    assert len({said for _, said in results}) == 1  # every rank knows
    ids, labels = batches(True)[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert loaded.dtype == torch.float32
    assert loaded(ids, labels=labels).loss.item() == pytest.approx(loss, rel=1e-5)
    alone = ranks(1)(saved, {}, {}, model_options, str(tmp_path / "alone"), None)[0][0]
    assert loss == pytest.approx(alone, rel=1e-5)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path / "alone").state_dict()
    found = loaded.state_dict()
    assert found.keys() == truth.keys()
    assert index_of(tmp_path / "model") == index_of(tmp_path / "alone")  # a weight of two stages is written once
    # One AdamW step of lr 3e-3 turns rounding of a gradient that is nearly zero into a step's sign, on single weights.
    errors = {name: relative_error(value, truth[name]) for name, value in found.items()}
    assert max(errors.values()) < 1e-3, errors
    assert loaded.generate(ids[:1], max_new_tokens=2, do_sample=False).shape == (1, 26)


def test_a_folder_names_the_dtype_that_it_stores(ranks, tmp_path):
    ranks(2)(saved, {"pp": 2}, {}, {}, str(tmp_path / "model"), torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "fourfold_ring" not in json.dumps(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * loaded.num_parameters()
    assert not list((tmp_path / "model").glob("*.partial"))


def unwritable(folder: str) -> str:
    model = parallelize(tiny_model(), init_mesh(dp=2, device_type="cpu"))
    with pytest.raises(ValueError, match="give another folder") as error:
        model.save_pretrained(folder)
    return str(error.value)


def test_a_folder_that_cannot_be_written_is_told_on_every_rank(ranks, tmp_path):
    (tmp_path / "file").write_text("no folder")
    first, second = ranks(2)(unwritable, str(tmp_path / "file" / "model"))
    assert first == second
    assert "file" in first
