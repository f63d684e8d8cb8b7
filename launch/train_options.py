"""What a training is asked to do: in a file (train.toml), on the command line, or both, where the command line counts.

Every key of the file is an option of the same name (`learning_rate`, `--learning-rate`), read by one validating reader:
an unknown key, a wrong type, a number that is none or out of its range are refused in one line. No torch in here: the
command line reads it before any rank is started.
"""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import field as _field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from fourfold.layouts.inputs.reading import MOST, number, read_toml, shown, whole
from fourfold.parallel.decoder.limits import PRECISIONS

WEIGHTS = ("auto", "pretrained", "random")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")
ENGINES = ("native", "deepspeed")
PRECISION_WORDS = ("auto", *PRECISIONS)
MOST_SEED = 2**63 - 1
"""TOML has whole numbers of 64 bits with a sign."""


def _key(default: Any, words: str, *, least: int = 0, most: int = MOST, choices: tuple[str, ...] = ()) -> Any:
    """A key of the file: its default, what it means, and the values it takes; `least` and `most` are taken, too."""
    return _field(default=default, metadata={"help": words, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The keys of train.toml, which are the options of `fourfold.launch.train`."""

    model: str | None = _key(None, "a Hugging Face folder, config.json or preset; left out: the layout file's")
    weights: str = _key("auto", "pretrained, random, or auto: what the model's folder has", choices=WEIGHTS)
    precision: str = _key("auto", "of weights and products; auto: fp32, on CUDA bf16-mixed", choices=PRECISION_WORDS)
    layout: str = _key("plan", "layout.toml; or a layout by its name, as 'dp2 z3'; or plan: the best for --cluster")
    engine: str = _key("native", "native; or deepspeed: its ZeRO over dp", choices=ENGINES)
    cluster: str | None = _key(None, "cluster.toml or preset to plan for")
    ranks: int = _key(0, "ranks to plan for or to spread a layout's name over; 0: the cluster's, the name's")
    global_batch: int = _key(0, "sequences a step; needed without a layout file")
    seq_len: int = _key(0, "tokens a sequence; needed without a layout file")
    data: tuple[str, ...] = _key((), "text, .jsonl, .parquet or token (.npy) files, folders, patterns; none: a demo's")
    validation: tuple[str, ...] = _key((), "the same for held-out text; none: the last tenth of the data")
    tokenizer: str | None = _key(None, "folder of a transformers tokenizer; none: a token is a byte")
    text_column: str = _key("text", "of JSON lines and Parquet")
    data_weights: tuple[float, ...] = _key((), "how often rows come from each entry of data; none: all is one text")
    packing: bool = _key(False, "rows of whole documents, which do not see each other, instead of windows of the text")
    out: str | None = _key(None, "folder for metrics.csv, log.jsonl, result.json and checkpoints")
    steps: int = _key(100, "optimizer steps in all", least=1)
    learning_rate: float = _key(3e-3, "at its peak")
    schedule: str = _key("cosine", "of the learning rate after the warm-up, to a tenth", choices=SCHEDULES)
    warmup_steps: int = _key(10, "linear warm-up")
    weight_decay: float = _key(0.1, "of matrices; vectors do not decay")
    beta1: float = _key(0.9, "AdamW's, of the mean")
    beta2: float = _key(0.95, "AdamW's, of the square")
    max_norm: float = _key(1.0, "gradients are clipped to this norm")
    optimizer: str = _key("adamw", "adamw; or muon for layers' matrices, adamw for the rest", choices=OPTIMIZERS)
    seed: int = _key(0, "of weights and batches", most=MOST_SEED)
    evaluate_every: int = _key(0, "steps between held-out losses; 0: only at the end")
    held_out_batches: int = _key(4, "global batches of held-out text for a loss; 0: none")
    checkpoint_every: int = _key(0, "steps between checkpoints; 0: none")
    checkpoints_in_flight: bool = _key(False, "a pipeline that never drains does not at checkpoints, but saves it all")
    async_checkpoints: bool = _key(False, "go on with the steps while a checkpoint is written")
    keep_checkpoints: int = _key(2, "how many of the newest checkpoints stay", least=1)
    resume: str = _key("no", "go on from the newest checkpoint in --out; auto: if there is one; or a checkpoint's step")
    resume_anyway: bool = _key(False, "also where the checkpoint's run had other settings")
    export: str | None = _key(None, "folder for the trained model, as transformers loads it, with its tokenizer")
    timeout_minutes: float = _key(10.0, "without progress, before a hang is told and ended")
    peak_flops_per_s: float = _key(0.0, "of all devices together, for MFU; 0: not shown")
    tensorboard: bool = _key(False, "also write out/tensorboard")
    wandb: str | None = _key(None, "project of Weights & Biases to tell, too")
    observe: bool = _key(False, "tell delay, prediction error and idle time of each stage that never drains")
    trace: str | None = _key(None, "file for a Chrome trace of three steps of the first rank")
    quiet: bool = _key(False, "show no progress")


RESUME_VALUE = re.compile(r"yes|no|auto|(step_)?\d{1,8}")
"""What may follow `--resume`."""


def read_options(arguments: Sequence[str]) -> TrainOptions:
    """The options of a command line, those of the file that its `--config` names among them.

    Raises:
        ValueError: an unknown key or option, a value of the wrong type or out of its range; one line.
        SystemExit: `--help` was asked for.
    """
    given = vars(_parser().parse_args(list(arguments)))
    config = given.pop("config", None)
    values = read_train_file(Path(config)) if config is not None else {}
    values |= {name: checked(name, value, f"--{name.replace('_', '-')}") for name, value in given.items()}
    return TrainOptions(**values)


def read_train_file(path: Path) -> dict[str, Any]:
    """The keys of a train.toml, checked. Raises ValueError, which names the file and the key."""
    table = read_toml(path, "give a train.toml")
    return {name: checked(name, value, f"{path}: {name}") for name, value in table.items()}


def checked(name: str, value: Any, where: str) -> Any:
    """`value` as the key `name` takes it.

    Raises:
        ValueError: no such key; another type; a number that is not finite, too large, or below the key's least.
    """
    known = _KEYS.get(name)
    if known is None:
        near = difflib.get_close_matches(name, _KEYS, n=1)
        raise ValueError(f"{where}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
    kind = _kind(name)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}={shown(value)}: give true or false")
        return value
    if kind is str:
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"{where}={shown(value)}: give a text")
        choices = known.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{where}={shown(value)}: choose one of {', '.join(choices)}")
        return value
    if kind is tuple and _is_of_numbers(name):
        numbers = value if isinstance(value, list) else [value]
        return tuple(number(each, where) for each in numbers)
    if kind is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}={shown(value)}: give a text, or a list of texts")
        return tuple(texts)
    if kind is int:
        return whole(value, where, least=known.metadata["least"], most=known.metadata["most"])
    return number(value, where, zero=True)


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """`values` by key as a command line of `fourfold.launch.train`; None and False are left out."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        option = f"--{name.replace('_', '-')}"
        several = value if isinstance(value, tuple) else (value,)
        words += [option] if value is True else [f"{option}={one}" for one in several]
    return words


_KEYS = {key.name: key for key in fields(TrainOptions)}


def _kind(name: str) -> type:
    """str, int, float, bool or tuple: what a key takes besides nothing."""
    hint = get_type_hints(TrainOptions)[name]
    if get_origin(hint) is tuple:
        return tuple
    kind: type = next((part for part in get_args(hint) if part is not type(None)), hint)
    return kind


def _is_of_numbers(name: str) -> bool:
    return float in get_args(get_type_hints(TrainOptions)[name])


class _OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, by the way of everything else that a user can get wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="torchrun ... -m fourfold.launch.train",
        description="Train a decoder under a layout; run it on every rank, with torchrun.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="train.toml: any of the options below, as keys")
    for name, key in _KEYS.items():
        option, words = f"--{name.replace('_', '-')}", key.metadata["help"].replace("%", "%%")
        if name == "resume":
            parser.add_argument(option, nargs="?", const="yes", metavar="auto|STEP", help=words)
        elif _kind(name) is tuple and _is_of_numbers(name):
            parser.add_argument(option, action="append", type=float, metavar="FLOAT", help=f"{words}; repeat for more")
        elif _kind(name) is tuple:
            parser.add_argument(option, action="append", metavar="FILE", help=f"{words}; repeat for more")
        elif _kind(name) is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=words)
        else:
            parser.add_argument(option, type=_kind(name), metavar=_kind(name).__name__.upper(), help=words)
    return parser
