"""Streams as they come: shapes that change, trees of tensors, lengths that differ."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import pipeline_models
from support.digest import digest
from support.rank_pool import RankFailure
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator
from fourfold.parallel.pipeline import ClipNorm, PipelineError, Program

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


class ChoosesRows(nn.Module):
    """Hands on only the rows above their mean: how many depends on the values, not on the input's shape."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        first = hidden[:, 0]
        return hidden[first >= first.mean()]


class Carries(nn.Module):
    """A dict with an integer mask, a number and a list; what is not floating gets no gradient."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        hidden = torch.tanh(self.linear(value["hidden"])) * value["mask"][:, None]
        return {**value, "hidden": hidden, "kept": [*value["kept"], hidden.mean()], "count": value["count"] + 1}


class Closes(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 3)

    def forward(self, value: dict[str, Any]) -> Tensor:
        return self.linear(value["hidden"]) + sum(value["kept"]) / value["count"]


class Flagged(nn.Module):
    """Reads the type of a plain value, and hands on a tensor that is not contiguous."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        factor = {bool: 2.0, int: 1.0, float: 0.5}[type(value["flag"])]
        hidden = torch.tanh(self.linear(value["hidden"])) * factor
        return {**value, "hidden": hidden.t().contiguous().t(), "kept": [hidden.mean()], "count": 1}


def rows_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.square().mean() + 0.0 * len(target)


def kinds(name: str) -> tuple[list[nn.Module], list[tuple[Any, Tensor]], Any]:
    """Stages, a stream and a loss, the same on every rank."""
    torch.manual_seed(0)
    sizes = (5, 5, 5, 8, 5, 5, 2, 9, 9)
    data: list[tuple[Any, Tensor]] = [(x, y) for n in sizes for x, y in pipeline_models.batches(1, size=n, seed=n)]
    if name == "rows":
        return [ChoosesRows(6, 7), ChoosesRows(7, 7), nn.Linear(7, 3)], data, rows_loss
    if name == "flags":
        flags = (1, True, 1.0, 1, 1, True, True, True, 1.0)
        data = [({"hidden": x, "flag": flag}, y) for (x, y), flag in zip(data, flags, strict=True)]
        return [Flagged(6, 8), Flagged(8, 5), Closes(5)], data, F.cross_entropy
    if name == "in place":
        data = [((x, (x[:, 0] > 0).long(), None), y) for x, y in data]
        return [Marks(6, 8), Marks(8, 8), Unmarks(8)], data, F.cross_entropy
    data = [({"hidden": x, "mask": (x[:, 0] > 0).long(), "kept": [], "count": 0}, y) for x, y in data]
    return [Carries(6, 8), Carries(8, 5), Closes(5)], data, F.cross_entropy


class Marks(nn.Module):
    """Writes into a mask that it was given, hands it on with a weight that no input reaches; begins in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, hidden: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        mask += 1
        hidden = hidden.relu_() if bias is None else hidden.relu_() + bias
        return torch.tanh(self.linear(hidden)) * mask[:, None], mask, self.bias


class Unmarks(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 3)

    def forward(self, hidden: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return self.linear(hidden.relu_() + bias) / mask[:, None]


def reused(data: list[tuple[Any, Tensor]]) -> Any:
    """The same stream through one buffer a shape, as a loader with pinned memory fills it."""
    buffers: dict[Any, Tensor] = {}
    for value, target in data:
        filled = [buffers.setdefault((at, each.shape), each.clone()).copy_(each) for at, each in enumerate(value[:2])]
        yield (*filled, None), buffers.setdefault(target.shape, target.clone()).copy_(target)


def streams_alike(name: str, schedule: str) -> bool:
    """Runtime and emulator after training, an evaluation under autocast, and training on."""
    results = []
    for kind in (PipelinedBackprop, PipelinedBackpropEmulator):
        stages, data, loss_fn = kinds(name)
        rank: Any = {"group": None} if kind is PipelinedBackprop else {}
        made = kind(stages, optimizer=SGD, loss_fn=loss_fn, schedule=schedule, **rank)
        losses = made.run(reused(data) if name == "in place" and kind is PipelinedBackprop else data)
        with torch.autocast("cpu", torch.bfloat16):
            losses += made.evaluate(data[:4])
        losses += made.evaluate(data[3:]) + made.run(data[::-1])
        state = made.state_dict()
        results.append((losses, digest(losses, state if isinstance(state, dict) else state[dist.get_rank()])))
    return results[0] == results[1]


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b-async", "2bw", "zb-h1:2"])
@pytest.mark.parametrize("name", ["rows", "dicts", "flags", "in place"])
def test_any_shape_and_any_tree_goes_through(ranks, name, schedule):
    assert all(ranks(3)(streams_alike, name, schedule))


def alike(num_stages: int, options: dict[str, Any], model: dict[str, Any]) -> list[bool]:
    """Whether this rank's stage and losses are those of the emulator, in two runs, with autocast around where asked."""
    group = dist.new_group(list(range(num_stages)))
    if dist.get_rank() >= num_stages:
        return []
    options = {"optimizer": SGD, "loss_fn": F.cross_entropy, **options}
    around = options.pop("around", False)
    data = pipeline_models.batches(11, last=2)
    if options.pop("broken", False):
        data[4] = data[4][0] * float("inf"), data[4][1]
    found = []
    for made in (
        PipelinedBackprop(pipeline_models.stages(num_stages, **model), group=group, **options),
        PipelinedBackpropEmulator(pipeline_models.stages(num_stages, **model), **options),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            losses = [repr(loss) for loss in [*made.run(data[:7]), *made.run(data[7:])]]
        state = made.state_dict()
        found.append(digest(losses, state if isinstance(state, dict) else state[dist.get_rank(group)]))
    return [found[0] == found[1]]


def muon_and_adamw(parameters: Any) -> list[torch.optim.Optimizer]:
    matrices, rest = ([p for p in parameters if (p.ndim == 2) == wanted] for wanted in (True, False))
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=0.02)] if matrices else []
    return made + ([torch.optim.AdamW(rest, lr=0.01)] if rest else [])


WRITTEN_BY_HAND = (
    "stage 0 | F0 F1 I0 W0* F2 I1 W1* I2 W2*\nstage 1 | F0 B0* F1 B1* F2 B2*",
    "stage 0 | F0 F1 F2 B0* B1* B2*\nstage 1 | F0 F1 I0 W0* F2 I1 W1* I2 W2*",
)


LATE_NORM = ClipNorm(max_norm=0.5, scope="model", lag_updates=4, first_wait=False)


def sum_of_targets(target: Tensor) -> float:
    return float(target.sum()) % 3


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"clip": 0.3}, {}),
        ({"clip": ClipNorm(max_norm=0.3, scope="model")}, {}),
        ({"clip": ClipNorm(max_norm=0.3, scope="model"), "schedule": "2bw:5"}, {}),
        ({"clip": ClipNorm(max_norm=0.3, scope="model", lag_updates=1), "mitigation": "lwpw+sc"}, {}),
        ({"clip": ClipNorm(max_norm=0.3, scope="model", lag_updates=4), "schedule": "1f1b-async"}, {}),
        ({"skip_nonfinite": True, "broken": True}, {}),
        ({"skip_nonfinite": True, "broken": True, "schedule": "paci:3", "clip": 0.3}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"around": True, "mitigation": "stash"}, {}),
        ({"loss_weight": sum_of_targets, "schedule": "2bw:4"}, {}),
        ({"optimizer": muon_and_adamw}, {}),
        ({"optimizer": ADAMW, "mitigation": "ef", "schedule": "2bw"}, {}),
        ({"optimizer": ADAMW, "mitigation": "lwpv+sc+rotate+ef"}, {}),
        ({"optimizer": ADAMW, "mitigation": "nesterov+stash", "seed": 2}, {"dropout": 0.3}),
        ({"optimizer": partial(torch.optim.SGD, lr=0.05), "mitigation": "lwpv"}, {}),
    ],
    ids=lambda value: " ".join(
        f"{key}={getattr(each, '__name__', each)}" for key, each in value.items() if key != "optimizer"
    )[:60],
)
def test_rules_and_answers_are_those_of_the_emulator(ranks, options, model):
    assert all(ranks(4)(alike, 4, options, model)[0])


class Conjugates(nn.Module):
    """Hands on numbers whose conjugation, and a sign, torch has noted and not yet computed; so are some gradients."""

    def __init__(self, columns: int, *, last: bool = False) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(6, columns, dtype=torch.complex64)), last

    def forward(self, given: Any) -> Any:
        x = given if isinstance(given, Tensor) else given[0].conj() + given[1]
        product = x.to(torch.complex64) @ self.weight
        return product.abs() if self.last else (product.conj(), product.conj().imag)


def conjugated() -> bool:
    """Trained on ranks, with a default device that is not the host, and in the emulator."""
    found = []
    for kind, rank in ((PipelinedBackprop, {"group": None}), (PipelinedBackpropEmulator, {})):
        torch.manual_seed(1)
        stages = [Conjugates(6), Conjugates(6), Conjugates(3, last=True)]
        options: dict[str, Any] = {"optimizer": SGD, "loss_fn": F.cross_entropy, "clip": LATE_NORM}
        made = kind(stages, **options, **rank)
        data = pipeline_models.batches(9, last=2)
        torch.set_default_device("meta" if rank else None)
        try:
            losses = [*made.run(data), *made.evaluate(data[:3])]
        finally:
            torch.set_default_device(None)
        state = made.state_dict()
        found.append(digest(losses, state if isinstance(state, dict) else state[dist.get_rank()]))
    return found[0] == found[1]


def test_numbers_arrive_as_they_are_meant_not_as_they_stand_in_memory(ranks):
    assert all(ranks(3)(conjugated))


def by_hand(text: str, mitigation: str) -> bool:
    program, data = Program.parse(text), pipeline_models.batches(3)
    found = []
    for kind, rank in ((PipelinedBackprop, {"group": None}), (PipelinedBackpropEmulator, {})):
        options: dict[str, Any] = {"optimizer": SGD, "loss_fn": F.cross_entropy, "schedule": program}
        made = kind(pipeline_models.stages(2), mitigation=mitigation, **options, **rank)
        losses = made.run(data)
        state = made.state_dict()
        found.append(digest(losses, state if isinstance(state, dict) else state[dist.get_rank()]))
    return found[0] == found[1]


@pytest.mark.parametrize("mitigation", ["none", "stash", "pipemare-dc", "spectrain", "lwpv+sc"])
@pytest.mark.parametrize("text", WRITTEN_BY_HAND, ids=["halves on stage 0", "halves on stage 1"])
def test_halves_of_a_backward_read_the_weights_that_a_whole_one_would(ranks, text, mitigation):
    assert all(ranks(2)(by_hand, text, mitigation))


def unlike_lengths(lengths: tuple[int, ...], schedule: str, evaluate: bool) -> tuple[str, str]:
    made = PipelinedBackprop(
        pipeline_models.stages(len(lengths)), group=None, optimizer=SGD, loss_fn=F.cross_entropy, schedule=schedule,
    )  # fmt: skip
    data = pipeline_models.batches(lengths[dist.get_rank()])
    try:
        (made.evaluate if evaluate else made.run)(data)
    except (ValueError, PipelineError) as error:
        return type(error).__name__, str(error)
    return "", ""


# Each case leaves a world with half a message in it, and the next has to start another.
@pytest.mark.parametrize(("schedule", "evaluate"), [("lockstep", False), ("1f1b:3", False), ("lockstep", True)])
@pytest.mark.parametrize(
    ("lengths", "named"),
    [((6, 5), "stage 1's stream ended after 5"), ((5, 6), "stage 0's stream ended after 5"),
     ((6, 4, 6), "stage 1's stream ended after 4")],
)  # fmt: skip
def test_streams_of_different_lengths_end_at_once_with_the_stage_named(ranks, lengths, named, schedule, evaluate):
    pool = ranks(len(lengths))
    try:
        # The group's own timeout is 120 s.
        messages = pool(unlike_lengths, lengths, schedule, evaluate, timeout_s=60.0)
    finally:
        pool.close()  # its messages are left half way
    assert "ValueError" in [kind for kind, _ in messages]
    assert all(named in message for kind, message in messages if kind), messages
    assert all(kind for kind, _ in messages)


def reported() -> list[Any]:
    data = pipeline_models.batches(20)
    made = PipelinedBackprop(
        pipeline_models.stages(3), group=None, optimizer=SGD, loss_fn=F.cross_entropy, mitigation="none", observe=True
    )
    made.run(data)
    emulator = PipelinedBackpropEmulator(
        pipeline_models.stages(3), optimizer=SGD, loss_fn=F.cross_entropy, mitigation="none", observe=True
    )
    emulator.run(data)
    fields = ("stage", "num_micro_batches", "num_updates", "delay_mean", "delay_max", "prediction_error",
              "gradient_norm")  # fmt: skip
    mine, emulated = ([tuple(getattr(each, field) for field in fields) for each in one.reports]
                      for one in (made, emulator))  # fmt: skip
    return [mine, emulated, [each.bubble for each in made.reports], [str(each) for each in made.reports]]


def test_every_rank_sees_delay_error_and_idle_time_of_every_stage(ranks):
    for mine, emulated, bubbles, words in ranks(3)(reported):
        assert mine[0][1:3] == (20, 20)
        assert [each[4] for each in mine] == [4, 2, 0]  # lockstep: 2 (S - 1 - s)
        # The first D gradients are younger: 0, 1, ... D - 1 updates.
        assert [each[3] for each in mine] == pytest.approx([(16 * 4 + 6) / 20, (18 * 2 + 1) / 20, 0.0])
        assert mine[0][5] > mine[1][5] > mine[2][5] == 0
        assert all(each[6] > 0 for each in mine)
        assert all(0 <= bubble < 1 for bubble in bubbles)
        assert "delay 3.50 (at most 4) over 20 micro-batches" in words[0]
        # Samples of the error fall where micro-batches happen to be in flight; all else is the emulator's.
        assert [each[:5] for each in mine] == [each[:5] for each in emulated]
        assert [each[6] for each in mine] == pytest.approx([each[6] for each in emulated])


def a_failing_stage() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(5, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise ArithmeticError("deliberate")
            return self.linear(x)

    stages = [*pipeline_models.stages(4)[:2], nn.Linear(8, 5), Fails()]
    PipelinedBackprop(stages, group=None, optimizer=SGD, loss_fn=F.cross_entropy).run(pipeline_models.batches(20))


def test_a_failure_ends_all_stages_and_the_culprit_is_first(ranks):
    with pytest.raises(RankFailure, match=r"(?s)rank 3 of 4.*ArithmeticError: deliberate"):
        ranks(4)(a_failing_stage, timeout_s=60.0)
