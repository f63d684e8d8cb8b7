"""`layout-advisor train`: a training from its file, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from fourfold.launch.commands.launch import start_training
from fourfold.launch.train_layout import chosen_layout
from fourfold.launch.train_options import read_options


def train(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="train.toml; every key is an option, too: --learning-rate 1e-4.")],
) -> None:
    """Train as FILE says, with one rank a device (or core) of this machine.

    On several hosts run `torchrun ... -m fourfold.launch.train --config FILE` on each instead; its --help has the keys.
    """
    arguments = ["--config", str(file), *context.args]
    options = read_options(arguments)
    layout, model = chosen_layout(options)
    start_training(layout, model, arguments)
