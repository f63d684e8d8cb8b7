"""One finite run of a pipeline, written out: validated, simulated and printed without a single rank.

A program is every stage's list of actions. Sends and receives are not listed, because they follow from it: a forward
receives what the forward of the stage before sent, a backward what the backward of the stage after sent, each link
first in, first out. Validation checks exactly that, so a program that passes cannot hang.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W", "U"]


class Action(NamedTuple):
    """`2F0`: stage 2 runs the forward of micro-batch 0. The number of an update (U) counts updates."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Timed(NamedTuple):
    """An action with its start and end, in the unit of the times that were given."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """When everything happens if each stage runs its actions as early as it may."""

    timeline: tuple[tuple[Timed, ...], ...]
    makespan: float
    bubble: float  # idle fraction of num_stages * makespan


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Every stage's actions for a stream of some length.

    Attributes:
        stages: actions in order, stage by stage.
        double_buffered: forwards read the weights of one update before their group's (PipeDream-2BW).
    """

    stages: tuple[tuple[Action, ...], ...]
    double_buffered: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_micro_batches(self) -> int:
        return sum(action.kind == "F" for action in self.stages[0]) if self.stages else 0

    def actions(self, stage: int, micro_batches: Iterator[int]) -> Iterator[Action]:
        """The actions of `stage`, pulling a micro-batch at each forward.

        Raises:
            ValueError: the stream is shorter or longer than the program.
        """
        done = 0
        for action in self.stages[stage]:
            if action.kind == "F" and next(micro_batches, None) is None:
                raise ValueError(f"the program is for {self.num_micro_batches} micro-batches; the stream gave {done}")
            done += action.kind == "F"
            yield action
        if next(micro_batches, None) is not None:
            raise ValueError(f"the program is for {done} micro-batches; the stream has more")

    def versions(self, stage: int) -> Iterator[tuple[int, int]]:
        """For every micro-batch: (updates seen by its forward, updates before its own)."""
        own: dict[int, int] = {}
        seen: dict[int, int] = {}
        updates = 0
        for _, kind, micro_batch in self.stages[stage]:
            if kind == "F":
                seen[micro_batch] = updates
            elif kind in "BW":
                own[micro_batch] = updates
            elif kind == "U":
                updates += 1
        for micro_batch in sorted(seen):
            late = own[micro_batch]
            yield max(0, late - 1) if self.double_buffered else seen[micro_batch], late

    def delay(self, stage: int) -> int | float:
        """The delay that most micro-batches of `stage` have (the larger of two equally common ones), in updates."""
        counts = Counter(own - seen for seen, own in self.versions(stage))
        return max(counts, key=lambda delay: (counts[delay], delay))

    def delays(self) -> list[int | float]:
        return [self.delay(stage) for stage in range(self.num_stages)]

    def validate(self) -> None:
        """Check that the program can run and uses every sample once.

        Raises:
            ValueError: naming the action at fault: a backward before its forward, a gradient that no update uses, a
                receive without its send or out of the link's order, or stages that wait for one another for ever.
        Cost: one pass over the actions.
        """
        if not self.stages or not self.stages[0]:
            raise ValueError("a program needs at least one stage and one action")
        for stage, actions in enumerate(self.stages):
            _validate_stage(stage, actions)
        for stage in range(1, self.num_stages):
            _validate_link(self.stages[stage - 1], self.stages[stage], "F")
            _validate_link(self.stages[stage], self.stages[stage - 1], "BI")
        self.simulate()

    def simulate(
        self,
        *,
        forward_s: float | Sequence[float] = 1.0,
        backward_s: float | Sequence[float] | None = None,
        weight_s: float | Sequence[float] = 1.0,
        link_s: float = 0.0,
    ) -> Simulation:
        """Run every stage's actions as early as its order and its neighbours allow.

        Args:
            forward_s: time of F, for all stages or one each.
            backward_s: time of a whole B; None for 1 a half, where the program splits backwards, else 1.
            weight_s: time of W; I takes what is left of `backward_s`, or 1.
            link_s: time of a transfer, either way; transfers overlap computation. Updates are free.
        Raises:
            ValueError: stages wait for one another for ever; names what each waits for.
        Cost: O(actions).
        """
        seconds = _durations(self.num_stages, forward_s, backward_s, weight_s)
        # Round after round, every stage runs as many of its actions as have their input.
        ends: dict[Action, float] = {}
        clock = [0.0] * self.num_stages
        position = [0] * self.num_stages
        timeline: list[list[Timed]] = [[] for _ in self.stages]
        moved = True
        while moved:
            moved = False
            for stage, actions in enumerate(self.stages):
                while position[stage] < len(actions):
                    action = actions[position[stage]]
                    arrival = self._arrival(action, ends, link_s)
                    if arrival is None:
                        break
                    start = max(clock[stage], arrival)
                    clock[stage] = ends[action] = start + seconds[stage].get(action.kind, 0.0)
                    timeline[stage].append(Timed(action, start, clock[stage]))
                    position[stage] += 1
                    moved = True
        # What is left waits for something that never comes.
        stuck = [str(actions[at]) for actions, at in zip(self.stages, position, strict=True) if at < len(actions)]
        if stuck:
            raise ValueError(f"the stages wait for one another for ever at {', '.join(stuck)}:\n{self}")
        makespan = max(clock)
        busy = sum(timed.end - timed.start for row in timeline for timed in row)
        return Simulation(
            timeline=tuple(map(tuple, timeline)),
            makespan=makespan,
            bubble=1 - busy / (makespan * self.num_stages) if makespan else 0.0,
        )

    def _arrival(self, action: Action, ends: Mapping[Action, float], link_s: float) -> float | None:
        """When the input of `action` is there; None if its sender has not run yet."""
        stage, kind, micro_batch = action
        if kind == "F" and stage > 0:
            sent = ends.get(Action(stage - 1, "F", micro_batch))
        elif kind in "BI" and stage < self.num_stages - 1:
            next_stage_end = ends.get(Action(stage + 1, "B", micro_batch))
            if next_stage_end is None:  # a backward in halves sends after its first
                next_stage_end = ends.get(Action(stage + 1, "I", micro_batch))
            sent = next_stage_end
        else:
            return 0.0
        return None if sent is None else sent + link_s

    def __str__(self) -> str:
        """One row a stage in the order of its actions, `*` for an update after the action; `parse` reads it back."""
        rows = [_cells(actions) for actions in self.stages]
        return _table([[(at, cell) for at, cell in enumerate(row)] for row in rows])

    def drawn(self) -> str:
        """As `str`, but every action in the column of its time, all actions one long, `.` for idle."""
        rows = []
        for timed in self.simulate().timeline:
            work = [each for each in timed if each.action.kind != "U"]
            cells = _cells([each.action for each in timed])
            rows.append([(round(each.start), cell) for each, cell in zip(work, cells, strict=True)])
        return _table(rows)

    @classmethod
    def parse(cls, text: str, *, double_buffered: bool = False) -> "Program":
        """Read a table back, drawn or not. Raises ValueError for a cell that is no action."""
        rows = re.findall(r"^stage +(\d+) *\|(.*)$", text, re.MULTILINE)
        if [int(number) for number, _ in rows] != list(range(len(rows))) or not rows:
            raise ValueError("a program is one line `stage N | F0 F1 B0* ...` for each stage, from stage 0 on")
        return cls(
            stages=tuple(tuple(_parse_row(stage, row)) for stage, (_, row) in enumerate(rows)),
            double_buffered=double_buffered,
        )


def _parse_row(stage: int, row: str) -> Iterator[Action]:
    updates = 0
    for cell in row.split():
        if cell == ".":
            continue
        match = re.fullmatch(r"([FBIW])(\d+)(\*?)", cell)
        if match is None:
            raise ValueError(
                f"stage {stage}: {cell!r} is no action; write F0, B0, I0 or W0, with * for an update after it"
            )
        kind, number, star = match.groups()
        yield Action(stage, kind, int(number))  # type: ignore[arg-type]
        if star:
            yield Action(stage, "U", updates)
            updates += 1


def _cells(actions: Sequence[Action]) -> list[str]:
    cells: list[str] = []
    for _, kind, micro_batch in actions:
        if kind == "U" and cells:
            cells[-1] += "*"
        else:
            cells.append(f"{kind}{micro_batch}")
    return cells


def _table(rows: Sequence[Sequence[tuple[int, str]]]) -> str:
    width = max((len(cell) for row in rows for _, cell in row), default=1)
    lines = []
    for stage, row in enumerate(rows):
        at = dict(row)
        columns = [at.get(column, ".").ljust(width) for column in range(max(at, default=-1) + 1)]
        lines.append(f"stage {stage} | {' '.join(columns)}".rstrip())
    return "\n".join(lines)


def _validate_stage(stage: int, actions: Sequence[Action]) -> None:
    forwards: set[int] = set()
    passed: dict[str, set[int]] = defaultdict(set)
    pending: set[int] = set()
    updates = 0
    # Each action alone: in its place after those that it needs.
    for action in actions:
        _, kind, micro_batch = action
        if action.stage != stage:
            raise ValueError(f"{action} stands among the actions of stage {stage}")
        if kind == "U":
            if micro_batch != updates or not pending:
                raise ValueError(f"{action}: update {updates} is due, after at least one backward")
            updates += 1
            pending.clear()
            continue
        if micro_batch in passed[kind]:
            raise ValueError(f"{action} runs twice")
        if kind != "F" and micro_batch not in forwards:
            raise ValueError(f"{action} comes before its forward {stage}F{micro_batch}")
        if kind == "W" and micro_batch not in passed["I"]:
            raise ValueError(f"{action} comes before its input gradient {stage}I{micro_batch}")
        passed[kind].add(micro_batch)
        if kind == "F":
            forwards.add(micro_batch)
        if kind in "BW":
            pending.add(micro_batch)
    # The stage as a whole: every forward has one backward, in the same order, and every gradient an update.
    order = [[action.micro_batch for action in actions if action.kind in kinds] for kinds in ("F", "BI")]
    missing = forwards - passed["B"] - passed["W"]
    if missing:
        raise ValueError(f"stage {stage}: micro-batch {min(missing)} has a forward, but no whole backward")
    if both := passed["B"] & passed["I"]:
        raise ValueError(f"stage {stage}: micro-batch {min(both)} has a whole backward and a split one")
    if order[0] != order[1]:
        raise ValueError(f"stage {stage}: backwards must run in the order of the forwards {order[0]}, not {order[1]}")
    if pending:
        raise ValueError(f"stage {stage}: no update uses the gradient of micro-batch {min(pending)}")


def _validate_link(senders: Sequence[Action], receivers: Sequence[Action], kinds: str) -> None:
    sent = [action for action in senders if action.kind in kinds]
    received = [action for action in receivers if action.kind in kinds]
    for one, other in zip(sent, received, strict=False):
        if one.micro_batch != other.micro_batch:
            raise ValueError(
                f"{other} waits for a message while {one} sends another: the order along a link must agree"
            )
    if len(sent) != len(received):
        longer = received if len(received) > len(sent) else sent
        raise ValueError(f"{longer[min(len(sent), len(received))]} has no partner at the other end of its link")


def _durations(
    num_stages: int,
    forward_s: float | Sequence[float],
    backward_s: float | Sequence[float] | None,
    weight_s: float | Sequence[float],
) -> list[dict[str, float]]:
    def each(value: float | Sequence[float], name: str) -> list[float]:
        values = [float(value)] * num_stages if isinstance(value, int | float) else [float(one) for one in value]
        if len(values) != num_stages or min(values) < 0:
            raise ValueError(f"{name}={value}: one time of at least 0, or one for each of {num_stages} stages")
        return values

    forward, weight = each(forward_s, "forward_s"), each(weight_s, "weight_s")
    if backward_s is None:
        return [{"F": f, "B": 1.0, "I": 1.0, "W": w} for f, w in zip(forward, weight, strict=True)]
    whole = each(backward_s, "backward_s")
    return [{"F": f, "B": b, "I": max(0.0, b - w), "W": w} for f, b, w in zip(forward, whole, weight, strict=True)]
