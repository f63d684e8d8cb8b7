"""What stages may be, may pass on and may have done to them: nothing is void or stale without a word."""

from collections import OrderedDict
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from support import pipeline_models
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import Program
from fourfold.parallel.pipeline.values import put_together, take_apart

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
LAMBDA = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda _: 0.5)


def trainer(stages: list[nn.Module], **options: Any) -> PipelinedBackpropEmulator:
    return PipelinedBackpropEmulator(stages, **{"optimizer": SGD, "loss_fn": F.cross_entropy, **options})


def weights(stages: list[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for stage in stages for p in stage.parameters()]


# Values between stages


class Pair(NamedTuple):
    hidden: Tensor
    mask: Tensor


def test_values_are_taken_apart_and_put_together():
    one, two, three = torch.ones(2), torch.tensor([1, 2]), torch.zeros(())
    value = {"a": (one, [two, None, "word"]), "b": Pair(three, two), 3: OrderedDict(c=1.5)}
    tensors, structure = take_apart(value)
    assert len(tensors) == 4
    again = put_together(structure, tensors)
    assert again["a"][0] is one
    assert again["a"][1][1:] == [None, "word"]
    assert isinstance(again["b"], Pair)
    assert again["b"].hidden is three
    assert again[3] == {"c": 1.5}
    with pytest.raises(ValueError, match=r"the output of stage 1\['a'\]\[0\] is a set"):
        take_apart({"a": [set()]}, "the output of stage 1")


class Masked(nn.Module):
    """Linear where the mask says so; an integer count and a plain tag travel along, and an auxiliary loss grows."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.kind = kind

    def forward(self, value: Any) -> Any:
        names = ("hidden", "mask", "extra")
        hidden, mask, extra = value if not isinstance(value, dict) else (value[name] for name in names)
        hidden = torch.where(mask[:, None], torch.tanh(self.linear(hidden)), 0.0)
        parts = hidden, mask, extra + hidden.square().mean()
        return dict(zip(names, parts, strict=True)) if self.kind == "dict" else parts


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, hidden: Tensor, mask: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(hidden), extra


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_stages_pass_tuples_and_dicts_of_any_tensors(kind):
    """Against one module trained as usual: gradients flow through every floating tensor and sum where they meet."""

    def made() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Masked(4, 6, kind), Masked(6, 5, kind), Head()]

    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + 0.1 * output[1]

    generator = torch.Generator().manual_seed(1)
    data = []
    for size in (3, 5, 2, 7):
        x = torch.randn(size, 4, generator=generator)
        data.append(((x, x[:, 0] > 0, torch.zeros(())), torch.randint(3, (size,), generator=generator)))
    piped = made()
    losses = trainer(piped, loss_fn=loss_fn, delays=[0, 0, 0]).run(data)

    plain = made()
    optimizer = SGD([p for stage in plain for p in stage.parameters()])
    expected = []
    for value, target in data:
        hidden = plain[1](plain[0](value))
        loss = loss_fn(plain[2](**hidden) if kind == "dict" else plain[2](*hidden), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
    assert all(map(torch.equal, weights(piped), weights(plain)))


class Rounded(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "integers":
            return self.linear(x.float()).round().long()
        if self.how == "detached output":
            return self.linear(x).detach()
        if self.how == "detached input":
            return self.linear(x.detach())
        return object()


@pytest.mark.parametrize(
    ("at", "how", "words"),
    [
        (0, "integers", r"stage 0 and those before it would not train: what it hands .*torch.int64 \[3, 6\]"),
        (1, "integers", "stage 1 and those before it would not train"),
        (0, "detached output", "stage 0 and those before it would not train: what it hands to the next stage"),
        (2, "detached output", r"stage 2 and those before it would not train: its loss .* has no gradient"),
        (1, "detached input", "stage 1 gives stage 0 no gradient: its output does not need its input"),
        (1, "another object", "the output of stage 1 is a object: stages pass tensors"),
    ],
)
def test_what_would_not_train_is_refused_by_name(at, how, words):
    stages: list[nn.Module] = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
    stages[at] = Rounded(how)
    with pytest.raises(ValueError, match=words):
        trainer(stages).run(pipeline_models.batches(2))


def test_stages_without_anything_to_train_before_them_get_no_gradient():
    frozen = nn.Linear(6, 8)
    frozen.requires_grad_(False)
    stages = [nn.Identity(), frozen, nn.Linear(8, 3)]
    before = weights([frozen])
    losses = trainer(stages).run(pipeline_models.batches(6))
    assert losses[-1] != losses[0]
    assert all(map(torch.equal, before, weights([frozen])))


# Precision


@pytest.mark.parametrize("how", ["around run", "argument"])
def test_training_under_autocast_trains(how):
    """The cache of casts outlives a forward under an outer autocast and does not see that weights were written."""
    data = pipeline_models.batches(1) * 40
    stages = pipeline_models.stages(2)
    if how == "around run":
        with torch.autocast("cpu", torch.bfloat16):
            losses = trainer(stages, mitigation="none").run(data)
    else:
        losses = trainer(stages, mitigation="none", dtype=torch.bfloat16).run(data)
    assert losses[-1] < 0.5 * losses[0]
    plain = pipeline_models.stages(2)
    expected = trainer(plain, mitigation="none").run(data)
    # bfloat16 keeps 8 bits
    assert losses == pytest.approx(expected, abs=0.1)


def test_both_ways_to_autocast_are_the_same():
    ends = []
    for inside in (True, False):
        stages = pipeline_models.stages(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            trainer(stages, dtype=torch.bfloat16 if inside else None).run(pipeline_models.batches(7))
        ends.append(weights(stages))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("mitigation", ["spectrain", "pipemare-dc"])
def test_backwards_with_weights_of_their_own_are_refused_under_autocast(mitigation):
    with pytest.raises(ValueError, match="choose stash or lwpv"):
        trainer(pipeline_models.stages(2), mitigation=mitigation, dtype=torch.bfloat16)
    made = trainer(pipeline_models.stages(2), mitigation=mitigation)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="leave autocast off"):
        made.run(pipeline_models.batches(2))


def test_narrow_weights_have_wide_masters():
    """Steps far below bfloat16's resolution add up in fp32 masters, and are saved with them."""

    def made() -> tuple[nn.Module, PipelinedBackpropEmulator]:
        torch.manual_seed(0)
        stage = nn.Linear(4, 3).bfloat16()
        return stage, trainer(
            [stage], optimizer=partial(torch.optim.SGD, lr=1e-5), master_dtype=torch.float32, mitigation="none",
        )  # fmt: skip

    generator = torch.Generator().manual_seed(3)
    one = torch.randn(8, 4, generator=generator).bfloat16(), torch.randint(3, (8,), generator=generator)
    stage, wide = made()
    start = stage.weight.detach().clone()
    wide.run([one] * 4)
    assert torch.equal(stage.weight, start)
    master = wide.stages[0].weights.masters[0]
    assert master.dtype == torch.float32
    assert not torch.equal(master.bfloat16().float(), master)
    _, resumed = made()
    resumed.load_state_dict(wide.state_dict())
    assert torch.equal(resumed.stages[0].weights.masters[0], master)


# Split backwards


def test_halves_of_a_backward_around_an_update_are_refused():
    program = Program.parse("stage 0 | F0 F1 I0 I1 W0* W1*\nstage 1 | F0 B0* F1 B1*")
    with pytest.raises(ValueError, match=r"stage 0: update 0 stands between 0I1 and 0W1"):
        trainer(pipeline_models.stages(2), schedule=program)


# Optimizers, schedulers, scalers


def test_optimizers_get_the_names_of_their_parameters():
    named: list[str] = []

    def grouped(parameters: Any) -> torch.optim.Optimizer:
        pairs = list(parameters.named())
        named.extend(name for name, _ in pairs)
        norms = [p for name, p in pairs if "norm" in name or name.endswith("bias")]
        rest = [p for name, p in pairs if "norm" not in name and not name.endswith("bias")]
        return torch.optim.AdamW([{"params": rest}, {"params": norms, "weight_decay": 0.0}], lr=0.01)

    stages = pipeline_models.stages(3)
    expected = [name for stage in stages for name, _ in stage.named_parameters()]
    made = trainer(stages, optimizer=grouped)
    losses = made.run(pipeline_models.batches(1) * 30)
    assert sorted(named) == sorted(expected)
    assert losses[-1] < losses[0]


def muon_and_adamw(parameters: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in parameters.named() if p.ndim == 2]
    rest = [p for name, p in parameters.named() if p.ndim != 2]
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=0.02)] if matrices else []
    return made + ([torch.optim.AdamW(rest, lr=0.01)] if rest else [])


@pytest.mark.parametrize("mitigation", ["lwpv+sc", "lwpw+sc", "ef", "lwpv+sc+rotate"])
def test_muon_and_adamw_side_by_side(mitigation):
    """Each parameter as its own optimizer alone would have it; saved and loaded together."""
    data = pipeline_models.batches(10)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    whole = pipeline_models.stages(3)
    losses = trainer(whole, optimizer=muon_and_adamw, mitigation=mitigation, scheduler=scheduler).run(data)
    parts = pipeline_models.stages(3)
    first = trainer(parts, optimizer=muon_and_adamw, mitigation=mitigation, scheduler=scheduler)
    first.run(data[:5])
    second_stages = pipeline_models.stages(3)
    second = trainer(second_stages, optimizer=muon_and_adamw, mitigation=mitigation, scheduler=scheduler)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second.run(data[5:]) == first.run(data[5:])
    assert losses[-1] == losses[-1]
    assert len(first.stages[0].optimizer.optimizers) == 2
    with pytest.raises(ValueError, match="this stage has 2 optimizers"):
        _ = first.stages[0].optimizer.optimizer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss several times"),
        ({"optimizer": lambda p: "SGD"}, "all of them once and no others"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau wants a metric"),
        ({"dtype": torch.float16}, "float16 needs a GradScaler"),
        ({"optimizer": lambda p: SGD(p[:1])}, "missing: "),
        ({"mitigation": "sc+nesterov"}, "take one"),
        ({"mitigation": "rotate"}, "SGD: basis rotation turns the steps of Adam"),
        ({"clip": -1.0}, "max_norm=-1.0"),
        ({"clip": True}, "clip=True: give the largest norm"),
        ({"clip": "model"}, "clip='model': give the largest norm"),
        ({"optimizer": lambda p: None}, "the optimizer factory returned NoneType"),
        ({"scheduler": lambda optimizer: [optimizer]}, "the scheduler factory returned list"),
        ({"scheduler": lambda _: LAMBDA(SGD([nn.Parameter(torch.ones(1))]))}, "of another optimizer than the one"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        trainer(pipeline_models.stages(2), mitigation=options.pop("mitigation", "none"), **options)


def test_a_grad_scaler_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="uses a GradScaler"):
        trainer(pipeline_models.stages(2), loss_fn=lambda output, y: scaler.scale(F.cross_entropy(output, y)))


def test_a_weight_of_the_loss_makes_a_mean_over_targets():
    """Micro-batches of 1, 4 and 2 targets, one update: as one batch of seven."""
    generator = torch.Generator().manual_seed(4)
    data = [
        (torch.randn(n, 6, generator=generator).double(), torch.randint(3, (n,), generator=generator))
        for n in (1, 4, 2, 3, 3)
    ]
    gradients: list[dict[str, Tensor]] = []
    stage = nn.Linear(6, 3).double()
    start = {name: p.detach().clone() for name, p in stage.named_parameters()}
    trainer(
        [stage], schedule="1f1b:3", loss_weight=len,
        on_gradients=lambda found: gradients.append({name: g.clone() for name, g in found.items()}),
    ).run(data)  # fmt: skip
    plain = nn.Linear(6, 3).double()
    plain.load_state_dict(start)
    F.cross_entropy(plain(torch.cat([x for x, _ in data[:3]])), torch.cat([y for _, y in data[:3]])).backward()
    torch.testing.assert_close(gradients[0]["weight"], plain.weight.grad, rtol=0, atol=1e-14)


class HandsOnItsWeight(nn.Module):
    """Gives its bias, a view of its weight and a count of its calls to the next stage."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.linear(x), self.linear.bias, self.linear.weight[:, 0], self.calls


class TakesAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, bias: Tensor, column: Tensor, calls: Tensor) -> Tensor:
        return self.linear(x * bias + column) * calls


def test_a_weight_that_is_handed_on_is_the_one_of_the_forward():
    """Not the one that the module holds again once its forward with predicted weights is over."""
    torch.manual_seed(0)
    stages = [HandsOnItsWeight(), TakesAWeight()]
    read: list[Tensor] = []
    taken: list[Tensor] = []
    stages[0].register_forward_hook(lambda module, *_: read.append(module.linear.bias.detach().clone()))
    stages[1].register_forward_pre_hook(lambda _, given: taken.append(given[1].detach().clone()))
    made = trainer(stages, mitigation="lwpv+sc")
    made.run(pipeline_models.batches(6))
    assert all(map(torch.equal, read, taken))
    assert not torch.equal(read[-1], made.stages[0].weights.masters[1])


def test_a_stage_may_begin_in_place():
    """As under plain training; neither the stage before nor the caller sees what is written."""
    ends = []
    for inplace in (True, False):
        torch.manual_seed(0)
        stages = [
            nn.Sequential(nn.ReLU(inplace), nn.Linear(6, 5), nn.Tanh()),
            nn.Sequential(nn.ReLU(inplace), nn.Linear(5, 3)),
        ]
        data = pipeline_models.batches(6)
        kept = [x.clone() for x, _ in data]
        made = trainer(stages, mitigation="stash")
        losses = [*made.run(data), *made.evaluate(data)]
        assert all(torch.equal(x, before) for (x, _), before in zip(data, kept, strict=True))
        ends.append([losses, [p.detach().tolist() for stage in stages for p in stage.parameters()]])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mitigation", ["spectrain", "pipemare-dc"])
def test_an_evaluation_under_autocast_needs_no_weights_of_a_backward(mitigation):
    made = trainer(pipeline_models.stages(3), mitigation=mitigation)
    data = pipeline_models.batches(4)
    made.run(data)
    with torch.autocast("cpu", torch.bfloat16):
        assert made.evaluate(data) == pytest.approx(made.evaluate(data))
