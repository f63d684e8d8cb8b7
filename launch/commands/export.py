"""`layout-advisor export`: a layout as the files that another tool launches from."""

import json
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from fourfold.layouts.inputs.layout import Layout, check_runnable, read_layout_file, read_prediction
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.reading import whole
from fourfold.layouts.output.export import (
    TARGETS,
    deepspeed_config,
    mpi_script,
    slurm_script,
    torchrun_script,
    torchtitan_config,
)
from fourfold.layouts.output.megatron import megatron_arguments


def export(
    layout: Annotated[Path, typer.Argument(help="layout.toml, as `layout-advisor plan --out DIR` writes it.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: print.")] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="Ranks a node, for the scripts; 0: of the cluster that was planned for, or 8.")
    ] = 0,
) -> None:
    """Write LAYOUT as Megatron arguments, a DeepSpeed or torchtitan config, or a torchrun, Slurm or MPI script."""
    chosen, model = read_layout_file(layout)
    planned = read_prediction(layout).get("devices_per_node", 0)
    per_node = gpus_per_node or whole(planned, f"{layout}: [prediction] devices_per_node", least=0) or 8
    text = exported(chosen, model, to=to, gpus_per_node=per_node, file=str(layout))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


def exported(layout: Layout, model: ModelConfig, *, to: str, gpus_per_node: int, file: str) -> str:
    """The file's text.

    Raises:
        ValueError: an unknown target, or a layout that the target cannot express.
    """
    if to == "megatron":
        return " \\\n  ".join(_pairs(megatron_arguments(layout, model))) + "\n"
    if to == "deepspeed":
        return json.dumps(deepspeed_config(layout, model), indent=2) + "\n"
    if to == "torchtitan":
        return tomli_w.dumps(torchtitan_config(layout, model))
    if to not in TARGETS:
        raise ValueError(f"--to {to}: choose one of {', '.join(TARGETS)}")
    if not layout.runnable:
        raise ValueError(f"{layout} uses {layout.unrunnable_reason()}, which fourfold's own runtime does not have")
    check_runnable(layout, model)
    script = {"torchrun": torchrun_script, "slurm": slurm_script, "mpi": mpi_script}[to]
    return script(layout, devices_per_node=gpus_per_node, file=file)


def _pairs(arguments: list[str]) -> list[str]:
    """Each option with its value on one line."""
    lines: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += " " + word
    return lines
