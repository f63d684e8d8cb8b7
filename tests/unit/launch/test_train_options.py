"""train.toml and the command line: one reader, one line for what is wrong."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_config import CONFIG

from fourfold.launch.train_layout import chosen_layout, model_folder
from fourfold.launch.train_options import TrainOptions, as_arguments, checked, read_options, read_train_file
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model


@pytest.fixture
def train_file(tmp_path):
    def write(**keys: object) -> str:
        path = tmp_path / "train.toml"
        path.write_bytes(tomli_w.dumps(keys).encode())
        return str(path)

    return write


def test_a_seed_may_have_as_many_bits_as_the_launch_command_takes(train_file):
    assert read_options(["--config", train_file(seed=2**63 - 1)]).seed == 2**63 - 1
    with pytest.raises(ValueError, match=r"--seed=9223372036854775808, but it is at most 9223372036854775807"):
        read_options(["--seed", str(2**63)])


def test_every_key_is_an_option_and_the_command_line_counts(train_file):
    kinds = get_type_hints(TrainOptions)
    numbers = {name: {int: 3, float: 0.5}[kind] for name, kind in kinds.items() if kind in (int, float)}
    path = train_file(**numbers, data=["a", "b"], quiet=True, resume="auto", schedule="linear")
    options = read_options(["--config", path])
    assert all(getattr(options, name) == value for name, value in numbers.items())
    assert (options.data, options.quiet, options.resume, options.schedule) == (("a", "b"), True, "auto", "linear")
    assert (
        read_options(as_arguments({field.name: getattr(options, field.name) for field in fields(options)})) == options
    )
    again = read_options(["--config", path, "--steps", "7", "--data", "c", "--no-quiet", "--resume"])
    assert (again.steps, again.data, again.quiet, again.resume) == (7, ("c",), False, "yes")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"learnin_rate": 1.0}, "learnin_rate: no such key; did you mean learning_rate?"),
        ({"steps": 1.5}, "steps=1.5, but it is a whole number of at least 1"),
        ({"steps": True}, "steps=True, but it is a whole number"),
        ({"steps": 0}, "steps=0, but it is a whole number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan, but it is a number"),
        ({"learning_rate": "fast"}, "learning_rate='fast', but it is a number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf, but it is a finite number"),
        ({"quiet": "yes"}, "quiet='yes': give true or false"),
        ({"schedule": "cosin"}, "schedule='cosin': choose one of cosine, linear, constant"),
        ({"precision": "int8"}, "precision='int8': choose one of auto, fp32"),
        ({"data": [1]}, "data=[1]: give a text, or a list of texts"),
        ({"model": {"hidden_size": 3}}, "model={'hidden_size': 3}: give a text"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(train_file, keys, said):
    path = train_file(**keys)
    with pytest.raises(ValueError, match=r"train\.toml: ") as error:
        read_options(["--config", path])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--stepz", "3"], ["--steps", "x"], ["--steps"], ["--seed", "-1"], ["stray"]])
def test_what_is_wrong_on_the_command_line_is_one_line(words):
    with pytest.raises(ValueError, match=r"stepz|steps|seed|stray") as error:
        read_options(words)
    assert "\n" not in str(error.value)


def outcome(function: Callable[..., Any], *arguments: object) -> tuple[Any, str]:
    """What it returned, and what it said where it refused."""
    try:
        return function(*arguments), ""
    except ValueError as error:
        return None, str(error)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "train.toml"
    path.write_bytes(data)
    values, refused = outcome(read_train_file, path)
    assert "\n" not in refused
    if not refused:
        assert set(values) == set(tomllib.loads(path.read_text(encoding="utf-8-sig")))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.sampled_from([field.name for field in fields(TrainOptions)]), VALUES)
def test_any_value_of_a_key_is_taken_or_refused_in_one_line(name, value):
    taken, refused = outcome(checked, name, value, name)
    assert refused.startswith(name) or not refused
    assert "\n" not in refused
    if not refused:
        assert isinstance(taken, str | int | float | tuple)
        assert taken == taken  # not NaN


def options(**keys: object) -> TrainOptions:
    return TrainOptions(**{"model": "llama-3.2-1b", "global_batch": 4, "seq_len": 64, **keys})


def test_a_layout_by_its_name_and_one_that_is_planned():
    assert chosen_layout(options(layout="dp2 tp2 z3"))[0] == Layout(
        dp=2, tp=2, zero_stage=3, global_batch=4, seq_len=64
    )
    layout, model = chosen_layout(options(layout="plan", cluster="H100-80GB", ranks=4))
    assert layout.world_size == 4
    assert model.num_layers == 16


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": None}, "no model: give --model"),
        ({"seq_len": 0}, "no seq_len: give --seq-len"),
        ({"layout": "plan"}, "give --cluster"),
        ({"layout": "plan", "cluster": "H100-80GB"}, "give --ranks"),
        ({"layout": "dp2 qq"}, "'qq' is none of"),
        ({"layout": "dp3"}, "global_batch=4"),
        ({"layout": "none.toml"}, "none.toml"),
    ],
)
def test_layouts_that_cannot_be_chosen(keys, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        chosen_layout(options(**keys))


def test_a_layout_file_and_a_model_of_another_size_disagree(tmp_path):
    path = tmp_path / "layout.toml"
    write_layout_file(path, Layout(global_batch=4, seq_len=64), load_model(CONFIG))
    with pytest.raises(ValueError, match="was planned for a model with num_params="):
        chosen_layout(options(layout=str(path)))
    with pytest.raises(ValueError, match=r"seq_len=128, but .* has 64"):
        chosen_layout(TrainOptions(layout=str(path), seq_len=128))


def test_pretrained_weights_are_taken_where_they_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    there = options(model=str(tmp_path))
    assert model_folder(there) is None
    with pytest.raises(ValueError, match=r"is no folder with \.safetensors files"):
        model_folder(options(model=str(tmp_path), weights="pretrained"))
    Path(tmp_path / "model.safetensors").touch()
    assert model_folder(there) == tmp_path
    assert model_folder(options(model=str(tmp_path), weights="random")) is None
