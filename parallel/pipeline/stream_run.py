"""A stream through one stage of a pipeline: forwards, backwards and updates in the schedule's order, up to its end.

A stream ends drained, or pauses: then the micro-batches that stages have forwarded and not yet backwarded stay in
flight, and the next stream goes on as if it were the same. All gradients that have left a stage are taken in before, so
that no message is under way while it pauses, and what is in flight can be saved (in_flight.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.pipeline.checks import pairs
from fourfold.parallel.pipeline.in_flight import Recipe, replayed
from fourfold.parallel.pipeline.links import PipeLinks
from fourfold.parallel.pipeline.local_parts import read_back, written
from fourfold.parallel.pipeline.norms import ModelNorms
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.schedule import PipelineSchedule
from fourfold.parallel.pipeline.stage import Flight, PipelineStage
from fourfold.parallel.pipeline.values import copied, describe, needs_gradient, put_together
from fourfold.parallel.pipeline.versions import Weights

OnLoss = Callable[[int, Tensor], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A stage where it runs: its links, its schedule, and the norms that it shares with others."""

    stage: PipelineStage
    links: PipeLinks
    schedule: PipelineSchedule | Program
    norms: ModelNorms

    def __str__(self) -> str:
        name = "a program of its own"
        if isinstance(self.schedule, PipelineSchedule):
            name = f"{self.schedule.name}:{self.schedule.update_every}"
        group = self.stage.dp_group
        replica = "" if group is None else f", replica {dist.get_rank(group)} of {group.size()}"
        return f"stage {self.stage.index} of {self.schedule.num_stages} with {name}{replica}"

    @property
    def is_first(self) -> bool:
        return self.stage.index == 0

    @property
    def is_last(self) -> bool:
        return self.stage.index == self.schedule.num_stages - 1

    @property
    def reads(self) -> tuple[bool, bool]:
        """Whether this rank reads a stream's inputs, and its targets."""
        return self.is_first, self.is_last

    def warm_up(self, ahead: int = 0) -> int:
        """Micro-batches in flight, once the pipeline is full, of this stage or of one `ahead` of it."""
        assert isinstance(self.schedule, PipelineSchedule)
        return self.schedule.warm_up(self.stage.index + ahead)

    def updates_made(self, num_micro_batches: int) -> int:
        """By the last stage, after so many micro-batches of a stream that does not drain."""
        assert isinstance(self.schedule, PipelineSchedule)
        return num_micro_batches // self.schedule.update_every


class StreamRun:
    """A stream through one stage: what is under way, and what each kind of action does.

    Attributes:
        first: micro-batches of the streams before the present one, since the pipeline was last empty.
        losses: of the present stream, on the last stage.
    """

    stream: "Stream"
    _on_loss: OnLoss | None

    def __init__(self, place: Place) -> None:
        self.place, self.stage, self.links = place, place.stage, place.links
        self.actions: dict[str, Callable[[int], None]] = {
            "F": self._forward, "B": self._backward, "I": self._backward_input, "W": self._backward_weight,
            "U": self._update,
        }  # fmt: skip
        self.first = 0  # micro-batches of the streams before this one
        self.losses: list[Tensor] = []
        self._keeps = False
        self._flights: dict[int, Flight] = {}
        self._recipes: dict[int, Recipe] = {}
        self._waiting: deque[int] = deque()  # forwarded, gradient not yet used
        self._arrived: dict[int, tuple[list[Tensor], float]] = {}  # gradients that came before a pause
        self._expected: int | None = None  # the micro-batch whose gradient is awaited
        self._weights: Weights = None
        self._previous: Weights = None
        self._updates = 0
        self._sums: list[Tensor | None] | None = None  # of gradients, since the last update, while the stream pauses
        self._under_way: tuple[float, float] | None = None
        self._update_of = _update_of(place.schedule, self.stage.index)

    def train(self, batches: Iterable[tuple[Any, Any]], on_loss: OnLoss | None, *, drain: bool) -> int:
        """Go through a stream, to the end of all that is in flight or only of the stream; returns its length."""
        self.stage.begin(self._under_way, self._updates)
        self._take_up()
        self.place.norms.take_up(self.links)
        self.stream = Stream(batches, self.place, self._end_of_stream, first=self.first)
        self.losses, self._on_loss = [], on_loss
        # What is still in flight when a stream pauses has come among its last; which these are is not known before.
        self._keeps = not drain and self.place.warm_up() > 0
        if not self.place.is_first and not self.stream.ended:
            self.links.expect_activation("train")
        self._expect_next()
        # Every action of the schedule in turn; the stream is read as forwards are due.
        going_on = {"first": self.first} if self.first else {}
        for _, kind, micro_batch in self.place.schedule.actions(self.stage.index, self.stream, **going_on):
            if self.stream.over and not drain:
                break
            self.actions[kind](micro_batch)
        self.first += self.stream.length
        if not drain:
            self._take_in()
        # The streams of all stages have ended, and no message is under way.
        if not self.place.is_first:
            self.links.take_end("train", self.stream.length)
        self.links.confirm()
        if drain:
            self.place.norms.finish(self.links)
        else:
            # The last stage, which holds nothing in flight, has made all updates that any stage has.
            left = self.place.updates_made(self.first) - self._updates
            made = self.stage.num_updates
            self.place.norms.pause(range(made, made + left), self.links)
        self.links.drain()
        self.stage.end(drained=drain)
        if not drain:
            self._under_way = self.stage.gradients.under_way
            self._sums = self.stage.weights.take_gradients()
        return self.stream.length

    def state(self) -> dict[str, Any]:
        """What is in flight while the stream pauses, for `restored`."""
        return {
            "place": str(self.place), "first": self.first, "updates": self._updates, "under_way": self._under_way,
            "sums": None if self._sums is None else written(self._sums),
            "previous": self._previous, "arrived": self._arrived, "norms": dict(self.place.norms.parts),
            "known_norms": dict(self.place.norms.known),  # stages that are updates apart need others
            "recipes": {micro_batch: recipe.state() for micro_batch, recipe in self._recipes.items()},
        }  # fmt: skip

    @classmethod
    def restored(cls, place: Place, state: dict[str, Any]) -> "StreamRun":
        """A paused stream from its state; micro-batches are computed again when it goes on.

        Raises:
            ValueError: the state is of another schedule, or of another replica or number of them.
        """
        if state["place"] != str(place):
            raise ValueError(
                f"this has micro-batches in flight of {state['place']}, here is {place}: go on there; what was saved "
                "after a run with drain=True goes on anywhere"
            )
        run = cls(place)
        run.first, run._updates, run._under_way = state["first"], state["updates"], state["under_way"]
        run._previous, run._arrived = (copied(state[key]) for key in ("previous", "arrived"))
        run._sums = None if state["sums"] is None else read_back(state["sums"], run.stage.weights.live)
        place.norms.parts = dict(state["norms"])
        place.norms.known.update(state.get("known_norms", {}))
        run._recipes = {micro_batch: Recipe.of(each) for micro_batch, each in state["recipes"].items()}
        run._waiting = deque(sorted(run._recipes))
        return run

    def _take_up(self) -> None:
        """At the start: the weights that forwards read, and where a paused stream left off."""
        if self._sums is not None:
            self.stage.weights.set_gradients(self._sums)
            self._sums = None
        for micro_batch, recipe in self._recipes.items():
            if micro_batch not in self._flights:
                self._flights[micro_batch] = replayed(self.stage, recipe, micro_batch)
        self._weights = self.stage.snapshot()

    def _take_in(self) -> None:
        """Before a pause: every gradient that the stage after has made, and none awaited any more.

        A stage that keeps micro-batches in flight itself owes the one before a gradient that this has asked for: it
        sends one that counts for nothing, which is taken and dropped.
        """
        if not self.place.is_first and self._flights:
            oldest = self._flights[min(self._flights)]
            self.links.send_gradient([torch.zeros_like(leaf) for leaf in oldest.inputs], 0.0, min(self._flights))
        if self.place.is_last:
            return
        made = self.first - self.place.warm_up(1)  # backwards of the stage after
        while self._expected is not None:
            micro_batch, self._expected = self._expected, None
            gradient = self.links.take_gradient(micro_batch)
            if micro_batch >= made:
                break
            self._arrived[micro_batch] = gradient
            self._expect_next()

    def _end_of_stream(self, length: int) -> None:
        if not self.place.is_last:
            self.links.send_end(length)

    def _forward(self, micro_batch: int) -> None:
        value, target = self.stream.current
        if not self.place.is_first:
            # This activation, and the receive of the next one posted before there is anything to compute.
            tensors, (specs, structure) = self.links.take_activation("train", micro_batch)
            if not self.stream.ended:
                self.links.expect_activation("train")
            marked = [each.requires_grad_(spec.needs_gradient) for each, spec in zip(tensors, specs, strict=True)]
            value = put_together(structure, marked)
        # With double buffering a group reads the weights before the newest update, once there are such.
        group = self._update_of(micro_batch) if self.place.schedule.double_buffered else 0
        use_previous = group > 0 and self._updates == group
        weights = self._previous if use_previous else self._weights
        seen = self._updates - use_previous
        recipe = Recipe.before(self.stage, value, weights, seen) if self._keeps else None
        flight = self.stage.forward(value, target, weights, seen)
        self._flights[micro_batch] = flight
        if recipe is not None:
            recipe.made(flight)
            self._recipes[micro_batch] = recipe
        if self.place.is_last:
            self.losses.append(flight.outputs[0].detach())
            if self._on_loss is not None:
                self._on_loss(micro_batch - self.first, self.losses[-1])
            return
        # On to the next stage, and the receive of its gradient posted if no other is awaited.
        results = flight.results
        description = describe(results), flight.structure
        self.links.send_activation("train", [each.detach() for each in results], description, micro_batch)
        self._waiting.append(micro_batch)
        self._expect_next()

    def _expect_next(self) -> None:
        """Post the receive of the next gradient that has not come, unless one is awaited."""
        if self._expected is None and not self.place.is_last:
            self._expected = next((each for each in self._waiting if each not in self._arrived), None)
            if self._expected is not None:
                outputs = self._flights[self._expected].outputs
                self.links.expect_gradient(describe([output for output in outputs if needs_gradient(output)]))

    def _gradient_of(self, micro_batch: int) -> tuple[list[Tensor] | None, float]:
        """The gradients of a micro-batch's outputs, and its weight; on the last stage there is only the weight."""
        self._recipes.pop(micro_batch, None)
        if self.place.is_last:
            return None, self._flights[micro_batch].weight
        assert self._waiting.popleft() == micro_batch
        if micro_batch in self._arrived:
            return self._arrived.pop(micro_batch)
        assert self._expected == micro_batch
        self._expected = None
        gradient = self.links.take_gradient(micro_batch)
        self._expect_next()
        return gradient

    def _pass_on(self, gradients: list[Tensor], weight: float, micro_batch: int) -> None:
        if not self.place.is_first:
            self.links.send_gradient(gradients, weight, micro_batch)

    def _backward(self, micro_batch: int) -> None:
        gradients, weight = self._gradient_of(micro_batch)
        self._pass_on(self.stage.backward(self._flights.pop(micro_batch), gradients, weight), weight, micro_batch)

    def _backward_input(self, micro_batch: int) -> None:
        gradients, weight = self._gradient_of(micro_batch)
        self._pass_on(
            self.stage.backward_input(self._flights[micro_batch], gradients, weight), weight, micro_batch
        )  # fmt: skip

    def _backward_weight(self, micro_batch: int) -> None:
        self.stage.backward_weight(self._flights.pop(micro_batch))

    def _update(self, number: int) -> None:
        # No forward reads them again: free before the update makes others.
        self._previous, self._weights = (self._weights if self.place.schedule.double_buffered else None), None
        norm = self.stage.prepare_update()
        self.stage.update(self.place.norms.of(self.stage.num_updates, norm, self.links))
        self._updates = number + 1
        self._weights = self.stage.snapshot()


def _update_of(schedule: PipelineSchedule | Program, stage: int) -> Callable[[int], int]:
    """Micro-batch -> the number of the update that uses it."""
    if isinstance(schedule, PipelineSchedule):
        every = schedule.update_every
        return lambda micro_batch: micro_batch // every
    return [own for _, own in schedule.versions(stage)].__getitem__


class Stream(Iterator[int]):
    """Numbers the micro-batches of an iterable and looks one ahead, so that the next receive can be posted.

    What this rank reads is copied when it is pulled: the iterable may fill the same tensors again.

    Args:
        place: of the stage, which says what this rank reads, and which ranks have the same stream.
        first: number of its first micro-batch.
        on_end: called with the length as soon as the last micro-batch has been used, before anything else is asked.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]],
        place: Place,
        on_end: Callable[[int], None] | None = None,
        *,
        first: int = 0,
    ) -> None:
        self._batches, self._place = pairs(batches), place
        self._numbers = count(first)
        self._on_end = on_end
        self._next = self._pull()
        self.current: tuple[Any, Any] = (None, None)
        self.length = 0
        self.over = False  # whether a micro-batch was asked for after the last one

    @property
    def ended(self) -> bool:
        """Whether there is no micro-batch after the current one."""
        return self._next is None

    def __next__(self) -> int:
        if self._next is None:
            self.over = True
            if self._on_end is not None:
                self._on_end(self.length)
                self._on_end = None
            raise StopIteration
        self.current = self._next
        self._next = self._pull()
        self.length += 1
        return next(self._numbers)

    def _pull(self) -> tuple[Any, Any] | None:
        pulled: tuple[Any, Any] | None = self._place.stage.joint.next_of(self._own, self._place.links.device)
        return pulled

    def _own(self) -> tuple[Any, Any] | None:
        pulled = next(self._batches, None)
        if pulled is None:
            return None
        value, target = (copied(each) if read else None for each, read in zip(pulled, self._place.reads, strict=True))
        return value, target
