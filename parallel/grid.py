"""Rank arithmetic of the (dp, pp, cp, tp) grid, without torch.

Ranks count through the grid with tp fastest, then cp, then pp, then dp: neighbours on the busiest axis sit inside one
host. `torch.distributed.device_mesh` has the same order for the same shape (a test compares them); this file exists
because the planner needs the arithmetic without importing torch.
"""

from dataclasses import dataclass
from math import prod

AXES = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The number of ranks along each axis."""

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{axis}={size!r}: the size of an axis is a whole number of ranks, at least 1")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(dp, pp, cp, tp)."""
        return self.dp, self.pp, self.cp, self.tp

    @property
    def world_size(self) -> int:
        return prod(self.shape)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis. Raises ValueError for a rank outside the grid."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the grid {self.shape} of {self.world_size} ranks")
        position = {}
        for axis, size in zip(reversed(AXES), reversed(self.shape), strict=True):
            rank, position[axis] = divmod(rank, size)
        return {axis: position[axis] for axis in AXES}

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours on `axis`."""
        return prod(self.shape[AXES.index(axis) + 1 :])


def layer_ranges(
    num_layers: int, num_stages: int, embedding_counts_as: int = 0, head_counts_as: int = 0
) -> list[range]:
    """Cut `num_layers` decoder layers into `num_stages` runs as even as can be.

    The stages that get one layer fewer come last, then first: the last stage also holds the output head and the loss,
    the first the embedding.

    Args:
        embedding_counts_as, head_counts_as: layers that the embedding and the head count for, as torchtitan's
            pipeline_parallel_first_stage_less_layers and last_stage_less_layers: their stages get so many fewer.
    Raises:
        ValueError: fewer layers than stages, or a stage without one.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill pp={num_stages} stages: choose pp of at most {num_layers}")
    base, extra = divmod(num_layers + embedding_counts_as + head_counts_as, num_stages)
    # Middle stages take the extra layers, so that the ends, which hold more than layers, stay light.
    order = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0, stage))
    sizes = [base] * num_stages
    for stage in order[:extra]:
        sizes[stage] += 1
    sizes[0] -= embedding_counts_as
    sizes[-1] -= head_counts_as
    if min(sizes) < 1:
        raise ValueError(
            f"embedding_counts_as={embedding_counts_as}, head_counts_as={head_counts_as}: of {num_layers} layers in "
            f"pp={num_stages} stages that leaves one with {min(sizes)}; choose less"
        )
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def interleaved_ranges(num_layers: int, num_ranks: int, chunks: int) -> list[list[range]]:
    """Cut `num_layers` decoder layers into `chunks` runs a pipeline rank, dealt to the ranks in rounds.

    A rank has as many layers as `layer_ranges` gives it; of its runs the earlier take one more where they differ.

        8 layers, 2 ranks, 2 chunks     rank 0: 0 1 . . 4 5 . .     rank 1: . . 2 3 . . 6 7

    Returns:
        For each rank its runs, in the order of the layers.
    Raises:
        ValueError: fewer layers than runs.
    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    if num_layers < num_ranks * chunks:
        raise ValueError(
            f"{num_layers} layers cannot fill pp={num_ranks} x vp={chunks} stages: "
            f"choose pp x vp of at most {num_layers}"
        )
    held = [len(run) for run in layer_ranges(num_layers, num_ranks)]
    runs: list[list[range]] = [[] for _ in held]
    start = 0
    for chunk in range(chunks):
        for rank, layers in enumerate(held):
            size = layers // chunks + (chunk < layers % chunks)
            runs[rank].append(range(start, start + size))
            start += size
    return runs
