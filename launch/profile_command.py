"""`layout-advisor profile`: measure this machine and write cluster.toml."""

from pathlib import Path
from typing import Annotated

import typer


def profile(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("cluster.toml"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to measure together; default: one a GPU, or a core (at most 4).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time budget of the measurement.")] = 30.0,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json: measure the shapes of this model too.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence of the model.")] = 512,
    micro_batch: Annotated[list[int] | None, typer.Option(help="Sequences a micro-batch; may be repeated.")] = None,
    layers: Annotated[bool, typer.Option(help="Time whole decoder layers of the model too.")] = True,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted profile.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure this machine: matmul, attention, memory, and the links between ranks.

    On several hosts run `torchrun --nnodes N ... -m fourfold.profiling.run --out cluster.toml` on each instead.
    """
    from fourfold.profiling.settings import ProfileSettings
    from fourfold.profiling.start import ProfileFailure, profile_here

    settings = ProfileSettings(
        out=out,
        seconds=seconds,
        model=model,
        seq_len=seq_len,
        micro_batches=tuple(micro_batch or (1, 2)),
        layers=layers,
        resume=resume,
        device=device,
    )
    try:
        profile_here(settings, num_ranks=ranks)
    except ProfileFailure as failure:
        typer.echo(f"profile: {failure}", err=True)
        raise typer.Exit(1) from None
