"""Pipeline schedules as data: what each stage does, in which order, and how old its gradients become.

torch.distributed.pipelining also has schedules as lists of actions (`2F0`), but only for steps that end in a flush,
with the update outside of the schedule. Pipelined backpropagation needs the update inside: where a stage updates
decides how stale a gradient is, and the mitigations of mitigation.py must be told exactly that number. So here
a schedule is a rule that yields every stage's actions for a stream of any length, and the delay is counted from them.

    F  forward    B  backward    I, W  the halves of a backward: input gradient, weight gradient    U  update

Two of them drawn for four stages and six micro-batches: a column is a tick, * an update after the action, . idle.
In lock step every stage does one F and one B a tick; a gradient of stage s is 2 (S-1-s) updates old:

    stage 0 | F0  F1  F2  F3  F4  F5  .   B0* .   B1* .   B2* .   B3* .   B4* .   B5*
    stage 1 | .   F0  F1  F2  F3  F4  B0* F5  B1* .   B2* .   B3* .   B4* .   B5*
    stage 2 | .   .   F0  F1  F2  B0* F3  B1* F4  B2* F5  B3* .   B4* .   B5*
    stage 3 | .   .   .   F0  B0* F1  B1* F2  B2* F3  B3* F4  B4* F5  B5*

In PipeDream's order (1f1b-async) a stage runs only S-1-s forwards ahead, and its gradients are S-1-s updates old:

    stage 0 | F0  F1  F2  F3  .   .   .   B0* F4  B1* F5  B2* .   B3* .   B4* .   B5*
    stage 1 | .   F0  F1  F2  .   .   B0* F3  B1* F4  B2* F5  B3* .   B4* .   B5*
    stage 2 | .   .   F0  F1  .   B0* F2  B1* F3  B2* F4  B3* F5  B4* .   B5*
    stage 3 | .   .   .   F0  B0* F1  B1* F2  B2* F3  B3* F4  B4* F5  B5*

No torch in this file: layouts prices schedules on a laptop.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from math import ceil
from typing import Literal, get_args

from fourfold.parallel.pipeline.program import Action, Program

Name = Literal["lockstep", "1f1b-async", "2bw", "paci", "gpipe", "1f1b", "zb-h1"]
NAMES: tuple[str, ...] = get_args(Name)
FLUSHED = ("gpipe", "1f1b", "zb-h1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSchedule:
    """A rule that says what each stage does with a stream of micro-batches.

    lockstep    pipelined backpropagation: every stage one F and one B a tick, an update a micro-batch; delay 2(S-1-s)
    1f1b-async  PipeDream's order: one F, one B, an update a micro-batch; delay S-1-s
    2bw         PipeDream-2BW: an update every m >= S micro-batches, two weight versions; delay 1 everywhere
    paci        the order of 1f1b-async, gradients accumulated locally over m micro-batches, no copies; delay (S-1-s)/m
    gpipe, 1f1b, zb-h1   flushed before every update, for comparison; delay 0

    Attributes:
        num_stages: S; stages count from 0.
        update_every: m, micro-batches an update. At the end of the stream a smaller last group also updates.

    Source: Kosson et al. 2021 (arXiv 2003.11666); Narayanan et al. 2019 and 2021 (PipeDream, arXiv 1806.03377; 2BW,
    arXiv 2006.09503); Huang et al. 2019 (GPipe, arXiv 1811.06965); Qi et al. 2024 (zero bubble, arXiv 2401.10241).
    """

    name: str
    num_stages: int
    update_every: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"schedule {self.name!r} is not known: choose one of {', '.join(NAMES)}")
        for field in ("num_stages", "update_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: at least 1")
        if self.name in ("lockstep", "1f1b-async") and self.update_every != 1:
            raise ValueError(
                f"{self.name} updates at every micro-batch, not every {self.update_every}: use 'paci' to accumulate"
            )
        if self.name == "2bw" and self.update_every < self.num_stages:
            raise ValueError(
                f"2bw with {self.num_stages} stages needs update_every >= {self.num_stages} for two weight versions "
                f"to suffice, not {self.update_every}"
            )

    @classmethod
    def named(cls, text: str, num_stages: int) -> "PipelineSchedule":
        """The schedule called `text`: a name, or `name:m` for an update every m micro-batches.

        Without m: 1 for lockstep and 1f1b-async, S for the others.
        """
        name, _, every = text.partition(":")
        if every and not every.isdecimal():
            raise ValueError(f"schedule {text!r}: write 'name' or 'name:m', m micro-batches an update")
        default = 1 if name in ("lockstep", "1f1b-async") else num_stages
        return cls(name=name, num_stages=num_stages, update_every=int(every) if every else default)

    @classmethod
    def accumulating(cls, num_stages: int, *, crossed_updates: int = 1) -> "PipelineSchedule":
        """PACI with the fewest micro-batches an update for which none crosses more than `crossed_updates` updates.

        A micro-batch of stage s is under way for S-1-s others, hence crosses at most ceil((S-1-s) / m) updates, and
        m = ceil((S-1) / crossed_updates) bounds that on every stage. No weights are stashed or predicted for it.

        Raises:
            ValueError: crossed_updates below 1.
        Source: Elam et al. 2026 (PACI, arXiv 2606.07881).
        """
        if crossed_updates < 1:
            raise ValueError(f"crossed_updates={crossed_updates}: at least 1; for none choose a flushed schedule")
        return cls(name="paci", num_stages=num_stages, update_every=max(1, -(-(num_stages - 1) // crossed_updates)))

    @property
    def flushed(self) -> bool:
        """Whether the pipeline drains before every update (no staleness, but a bubble)."""
        return self.name in FLUSHED

    @property
    def double_buffered(self) -> bool:
        """Whether forward and backward of a group both read the weights of one update before it (2bw)."""
        return self.name == "2bw"

    def warm_up(self, stage: int) -> int:
        """Forwards that `stage` runs ahead of its backwards once the pipeline is full (within a group, if flushed)."""
        following = self.num_stages - 1 - stage
        return {"lockstep": 2 * following, "gpipe": self.update_every - 1}.get(self.name, following)

    @property
    def distance_in_updates(self) -> int:
        """The most updates that the last stage has made, and the first has not, at any moment."""
        return 0 if self.flushed else -(-self.warm_up(0) // self.update_every)

    def actions(self, stage: int, micro_batches: Iterator[int], *, first: int = 0) -> Iterator[Action]:
        """What `stage` does, in order. A micro-batch is pulled when its forward is due: the stream may be endless.

        Args:
            first: go on from this micro-batch, the `warm_up` ones before it being in flight; not where the pipeline
                drains before every update.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage {stage} is outside of {self.num_stages} stages")
        if self.flushed:
            assert first == 0
            return _flushed(self, stage, micro_batches)
        return _flowing(self, stage, micro_batches, first)

    def program(self, num_micro_batches: int) -> Program:
        """All stages' actions for a stream of `num_micro_batches`."""
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches={num_micro_batches}: at least 1")
        stages = range(self.num_stages)
        return Program(
            stages=tuple(tuple(self.actions(stage, iter(range(num_micro_batches)))) for stage in stages),
            double_buffered=self.double_buffered,
        )

    def versions(self, stage: int) -> Iterator[tuple[int, int]]:
        """For every micro-batch of an endless stream: (updates seen by its forward, updates before its own).

        The difference is the delay of its gradient, in updates.
        """
        updates = 0
        for action in self.actions(stage, count()):
            if action.kind == "U":
                updates += 1
            elif action.kind == "F":
                group = action.micro_batch // self.update_every
                yield max(0, group - 1) if self.double_buffered else updates, group

    def delay(self, stage: int) -> int | float:
        """Steady-state delay D of the gradients of `stage`, in updates, counted from the actions.

        A whole number wherever every micro-batch has the same delay; the mean over a group otherwise (paci).
        """
        group = self.update_every
        # The first micro-batches, while the pipeline fills, are younger: count over one group after them.
        ramp = group * (ceil(self.warm_up(stage) / group) + 1)
        steady = [own - seen for seen, own in islice(self.versions(stage), ramp, ramp + group)]
        mean = Fraction(sum(steady), group)
        return int(mean) if mean.denominator == 1 else float(mean)

    def delays(self) -> list[int | float]:
        return [self.delay(stage) for stage in range(self.num_stages)]

    def in_flight(self, stage: int, num_micro_batches: int | None = None) -> int:
        """Micro-batches whose activations `stage` holds at the peak.

        Args:
            num_micro_batches: length of the stream; None for an endless one.
        """
        length = num_micro_batches or 2 * (self.warm_up(stage) + self.num_stages + self.update_every)
        return peak_in_flight(self.actions(stage, iter(range(length))))

    def weight_versions(self, stage: int, *, stash: bool = False) -> int:
        """Versions of its weights that `stage` must keep: 1, 2 for double buffering, D + 1 with stashing."""
        if stash and not self.flushed:
            return 1 + ceil(self.delay(stage))
        return 2 if self.double_buffered else 1

    def bubble(self, num_micro_batches: int) -> float:
        """Fraction of stage time that is idle over a stream, forward = backward (= each half of it) = 1, free links."""
        return self.program(num_micro_batches).simulate().bubble

    def __str__(self) -> str:
        every = "every micro-batch" if self.update_every == 1 else f"every {self.update_every} micro-batches"
        delays = ", ".join(f"{delay:g}" for delay in self.delays())
        return f"{self.name}, {self.num_stages} stages, an update (*) {every}, delays {delays}"


def async_speedup(num_stages: int, micro_batches: int) -> float:
    """Steady-state speed-up of a pipeline that never drains over one flushed every `micro_batches`: (M+S-1)/M.

    Balanced stages, free links. Over zero-bubble H1 with F = I = W it is only 1 + (S-1)/(3M).
    """
    return (micro_batches + num_stages - 1) / micro_batches


def peak_in_flight(actions: Iterator[Action]) -> int:
    """The most micro-batches that were forwarded and not yet fully backwarded."""
    held = peak = 0
    for action in actions:
        held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak


def lag_updates(delays: Sequence[int | float], stage: int) -> int:
    """Updates of `stage` between its backward of a micro-batch and that of stage 0: half of what D_0 has over D.

    The other half is the forward's way from stage 0 to `stage`.
    """
    return max(0, int(delays[0] - delays[stage]) // 2)


def resolve_schedule(schedule: str | PipelineSchedule | Program, num_stages: int) -> PipelineSchedule | Program:
    """The schedule as data. Raises ValueError where it is unknown, invalid or for another number of stages."""
    resolved = PipelineSchedule.named(schedule, num_stages) if isinstance(schedule, str) else schedule
    if resolved.num_stages != num_stages:
        raise ValueError(f"the schedule is for {resolved.num_stages} stages, but there are {num_stages}")
    if isinstance(resolved, Program):
        resolved.validate()
        _check_halves(resolved)
    return resolved


def _check_halves(program: Program) -> None:
    """Refuse an update between the two halves of a backward: they would read weights of two versions."""
    for stage, actions in enumerate(program.stages):
        open_halves: set[int] = set()
        for action in actions:
            if action.kind == "I":
                open_halves.add(action.micro_batch)
            elif action.kind == "W":
                open_halves.discard(action.micro_batch)
            elif action.kind == "U" and open_halves:
                split = min(open_halves)
                raise ValueError(
                    f"stage {stage}: update {action.micro_batch} stands between {stage}I{split} and {stage}W{split}, "
                    "which would compute the input's and the weights' gradient with different weights: put the update "
                    "after both, or use a whole backward (B)"
                )


def _flowing(schedule: PipelineSchedule, stage: int, stream: Iterator[int], first: int) -> Iterator[Action]:
    """Warm up once, then one forward and one backward in turn to the end of the stream."""
    # Forwarded, not yet backwarded.
    waiting = deque(range(max(0, first - schedule.warm_up(stage)), first))

    def backward() -> Iterator[Action]:
        micro_batch = waiting.popleft()
        yield Action(stage, "B", micro_batch)
        # The last micro-batch of a group brings the update.
        update, place = divmod(micro_batch, schedule.update_every)
        if place == schedule.update_every - 1:
            yield Action(stage, "U", update)

    # While the stream lasts: a forward, and once warmed up a backward after each.
    last = first - 1
    for last in stream:
        yield Action(stage, "F", last)
        waiting.append(last)
        if len(waiting) > schedule.warm_up(stage):
            yield from backward()
    # The stream has ended: the backwards that are left, and an update for a smaller last group.
    while waiting:
        yield from backward()
    update, rest = divmod(last + 1, schedule.update_every)
    if rest:
        yield Action(stage, "U", update)


def _flushed(schedule: PipelineSchedule, stage: int, stream: Iterator[int]) -> Iterator[Action]:
    """Group after group: warm up, one forward and one backward in turn, drain, update."""
    # Zero bubble H1: stage s postpones s weight gradients: then every stage holds S micro-batches, as the first does.
    split, postponed = schedule.name == "zb-h1", stage if schedule.name == "zb-h1" else 0
    for update in count():
        waiting: deque[int] = deque()
        weights: deque[int] = deque()

        def backward(
            waiting: deque[int] = waiting, weights: deque[int] = weights, postponed: int = postponed
        ) -> Iterator[Action]:
            micro_batch = waiting.popleft()
            yield Action(stage, "I" if split else "B", micro_batch)
            if split:
                weights.append(micro_batch)
                if len(weights) > postponed:
                    yield Action(stage, "W", weights.popleft())

        # Forwards of the group, with backwards in between once warmed up.
        group = 0
        for micro_batch in islice(stream, schedule.update_every):
            group += 1
            yield Action(stage, "F", micro_batch)
            waiting.append(micro_batch)
            if len(waiting) > schedule.warm_up(stage):
                yield from backward()
        if not group:
            return
        # Drain, finish the postponed weight gradients, and update.
        while waiting:
            yield from backward()
        for micro_batch in weights:
            yield Action(stage, "W", micro_batch)
        yield Action(stage, "U", update)
        if group < schedule.update_every:
            return
