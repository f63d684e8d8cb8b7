"""What a run would destroy, or train on although it is held out, is refused before anything starts."""

import re
from pathlib import Path

import pytest

from fourfold.launch.train_layout import chosen_layout, model_folder
from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.corpus import Sources, found_sources
from fourfold.launch.training.places import check_export
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "data/a.txt",
        "data/b.txt",
        "data/validation.txt",
        "model/model.safetensors",
        "model/tokenizer.json",
        "data/tokens/x.npy",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")
    return tmp_path


def refused(action, *arguments: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        action(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"export": "model"}, "export='model' is the folder of model, which it would replace"),
        ({"export": "model/."}, "export='model/.' is the folder of model"),
        ({"export": "words", "tokenizer": "words"}, "is the folder of tokenizer"),
        ({"export": "run", "out": "run"}, "is the folder of out"),
        ({"export": "data"}, "export='data' holds a.txt, which no export has written"),
        ({"export": "."}, "export='.' holds data, which no export has written"),
        ({"export": "data/a.txt"}, "export='data/a.txt' holds a.txt"),
        ({"export": "data/a.txt/x"}, "export='data/a.txt/x': "),
        ({"export": "data", "resume": "no"}, "export='data' is there already"),
    ],
)
def test_nothing_but_an_earlier_export_is_replaced(desk, keys, said):
    refused(check_export, TrainOptions(**{"model": "model", "resume": "auto", **keys}), said=said)


def test_an_earlier_export_is_replaced_with_its_tokenizer(desk):
    export = desk / "trained"
    export.mkdir()
    names = (
        "config.json",
        "generation_config.json",
        "model-00001-of-00004.safetensors",
        "model.safetensors.index.json",
    )
    for name in (*names, "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "own.words"):
        (export / name).touch()
    (desk / "model" / "own.words").touch()
    check_export(TrainOptions(model="model", tokenizer="model", export="trained", resume="auto"))
    refused(
        check_export,
        TrainOptions(model="model", export="trained", resume="auto"),
        said="holds own.words, which no export",
    )


def found(**keys: object) -> Sources:
    return found_sources(TrainOptions(**{"out": "run", **keys}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"data": ("data",), "validation": ("data/validation.txt",)},
            "data/validation.txt is in data and in validation",
        ),
        ({"data": ("data/a.txt", "data/*.txt")}, "data has data/a.txt more than once"),
        ({"data": ("data/a.txt", "./data/../data/a.txt")}, "more than once"),
        ({"data": ("data/tokens",), "out": "data"}, "data='data/tokens' is what a run writes in out='data'"),
    ],
)
def test_files_that_count_twice_or_are_written_while_they_are_read(desk, keys, said):
    refused(lambda: found(**keys), said=said)


@pytest.mark.parametrize("out", ["data/run", "data"])
def test_what_a_run_writes_is_no_part_of_its_data(desk, out):
    before = found(data=("data",), out=out).train
    for name in ("metrics.csv", "tokens/train.npy", "checkpoints/step_00000002/manifest.json"):
        (desk / out / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / out / name).touch()
    assert found(data=("data",), out=out).train == before
    assert [path.name for path in before if path.suffix == ".txt"] == ["a.txt", "b.txt", "validation.txt"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_weights_that_are_not_read_are_not_drawn_anew_in_silence(tmp_path, name):
    (tmp_path / name).touch()
    refused(model_folder, TrainOptions(model=str(tmp_path)), said=f"has its weights in {name}, which is not read")
    assert model_folder(TrainOptions(model=str(tmp_path), weights="random")) is None


def test_ranks_that_a_layout_file_has_not(tmp_path):
    path, config = tmp_path / "layout.toml", {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}
    write_layout_file(path, Layout(dp=2, global_batch=4, seq_len=16), load_model(config))
    refused(chosen_layout, TrainOptions(layout=str(path), ranks=4), said="ranks=4, but")
    assert chosen_layout(TrainOptions(layout=str(path), ranks=2))[0].dp == 2
