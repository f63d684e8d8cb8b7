"""`layout-advisor profile`: measure this machine and write cluster.toml."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fourfold.launch.processes import start_ranks
from fourfold.profiling.settings import ProfileSettings


def profile(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("cluster.toml"),
    ranks: Annotated[
        int | None, typer.Option(help="Ranks to measure together; default: one a GPU, or one a core (at most 4).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time budget of the measurement.")] = 30.0,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json: measure the shapes of this model too.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence of the model.")] = 512,
    micro_batch: Annotated[
        list[int] | None, typer.Option(help="Sequences a micro-batch; may be repeated. Default: 1 and 2.")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Time whole decoder layers of the model too.")] = True,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted profile.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Measure this machine: matmul, attention, memory, and the links between ranks.

    On several hosts run `torchrun --nnodes N ... -m fourfold.profiling.run --out cluster.toml` on each instead.
    """
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
    profile_machine(settings, num_ranks=ranks)


def profile_machine(settings: ProfileSettings, *, num_ranks: int | None = None) -> None:
    """Measure this machine with one rank a GPU, or one a physical core, and write `settings.out`.

    Args:
        num_ranks: another number of ranks; None takes all GPUs, or the physical cores and at most 4.
    Raises:
        ValueError: a number of ranks that this machine cannot run, or a model that is not of the Llama family.
        RankFailure: a rank failed; the others have been ended.
    Cost: `settings.seconds`, and some seconds to start the ranks.
    """
    import torch  # these need a second, and `layout-advisor --help` should not

    from fourfold.profiling.hardware import default_num_ranks
    from fourfold.profiling.shapes import model_shape, read_config

    device_type = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = default_num_ranks(device_type)
    num_ranks = available if num_ranks is None else num_ranks
    if num_ranks < 1 or (device_type == "cuda" and num_ranks > available):
        raise ValueError(f"--ranks {num_ranks}: choose at least 1, and on CUDA at most one a device ({available} here)")
    if num_ranks > 8 * (os.cpu_count() or 1):
        raise ValueError(f"--ranks {num_ranks}: this machine has {os.cpu_count()} cores; choose at most eight a core")
    if settings.model:
        model_shape(read_config(settings.model))  # told here, not by a rank's traceback
    start_ranks("fourfold.launch.profile_ranks", settings.arguments(), num_ranks=num_ranks, device_type=device_type)
