"""Stages of a pipeline that never drains whose matrices are cut over tp, against the emulator with whole ones."""

import io
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.pipeline_models import small_llama
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fourfold.parallel import PipelinedBackpropEmulator, init_mesh
from fourfold.parallel.decoder import decoder_stages, pipeline_decoder
from fourfold.parallel.decoder.async_pipeline import next_token_loss, num_targets
from fourfold.parallel.pipeline import ClipNorm, PipelineError
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
NADAM = partial(torch.optim.NAdam, lr=0.01)
PACKED = "packed"


def exact_norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """transformers' own computes in fp32 even of an fp64 model, whose roundings would hide what is looked for."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden * scale)


def rows(count: int, *, packed: bool = False) -> list[tuple[Any, Tensor]]:
    """Micro-batches of two rows of 8 tokens, each with another number of targets."""
    generator = torch.Generator().manual_seed(2)
    made: list[tuple[Any, Tensor]] = []
    for number in range(count):
        ids = torch.randint(0, 32, (2, 9), generator=generator)
        targets = ids[:, 1:].clone()
        targets[:, : number % 4] = -100
        inputs: Any = ids[:, :-1]
        if packed:
            inputs = {"input_ids": inputs, "document_ids": (torch.arange(8) > 2 + number % 3).long().expand(2, 8)}
        made.append((inputs, targets))
    return made


def cut_stages(cut: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """What differs between this rank's part after a stream, and the emulator's stage."""
    mesh = init_mesh(pp=2, tp=2, device_type="cpu")
    cut, sequence = {"precision": "fp64", **cut}, cut.get("sequence_parallel", False)
    data = rows(7, packed=cut.pop(PACKED, False))
    with patch.object(LlamaRMSNorm, "forward", exact_norm):
        made = pipeline_decoder(small_llama().double(), mesh, seq_len=8, **cut, **options)
        found = made.run(data)
        with torch.inference_mode():
            found += made.evaluate(data[:2])
        for runs_otherwise in ("sequence_parallel", "compile"):
            cut.pop(runs_otherwise, None)
        stages: Any = decoder_stages(small_llama().double(), 2, seq_len=8, **cut)
        emulator = PipelinedBackpropEmulator(stages, loss_fn=next_token_loss, loss_weight=num_targets, **options)
        losses = [*emulator.run(data), *emulator.evaluate(data[:2])]
    stage = mesh.get_local_rank("pp")
    expected = dict(emulator.stages[stage].module.named_parameters())
    mine = dict(made.stage.module.named_parameters())
    assert mine.keys() == expected.keys()
    assert sequence == (made.stage.module.sequence_shards == 2)
    matrices = [p for p in mine.values() if p.ndim == 2]
    assert matrices
    assert all(isinstance(p, DTensor) and p.to_local().numel() * 2 == p.numel() for p in matrices)
    errors = {name: relative_error(full_tensor(p.detach()), expected[name].detach()) for name, p in mine.items()}
    return errors | {"loss": max(abs(one - other) for one, other in zip(found, losses, strict=True))}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lockstep": ({}, {"optimizer": ADAMW, "clip": 0.05}),
    "sequence": ({"sequence_parallel": True}, {"optimizer": SGD, "schedule": "1f1b-async", "skip_nonfinite": True}),
    "2bw": (
        {"sequence_parallel": True, "checkpointing": "full"},
        {"optimizer": SGD, "schedule": "2bw:2", "clip": ClipNorm(max_norm=0.05, scope="model")},
    ),
    "split": ({"sequence_parallel": True}, {"optimizer": SGD, "schedule": "zb-h1:3"}),
    "stash": ({"checkpointing": "full"}, {"optimizer": NADAM, "mitigation": "stash+ef+nesterov"}),
    "pipemare": (
        {"sequence_parallel": True, PACKED: True},
        {"optimizer": SGD, "mitigation": "pipemare-lr+pipemare-dc+lwpw", "schedule": "1f1b-async"},
    ),
    "spectrain": (
        {"compile": "aot_eager", "sequence_parallel": True},
        {"optimizer": ADAMW, "mitigation": "spectrain+shrink", "clip": ClipNorm(max_norm=0.1, scope="model")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_stages_are_the_emulators_whole_ones(ranks, case):
    # Sums over tp are in another order: roundings of fp64, which a few updates with momentum make larger.
    assert_ranks(ranks(4)(cut_stages, *CASES[case]), 1e-11, case)


def reports() -> dict[str, float]:
    """What stages tell of themselves with tp, less what two replicas with the same rows do."""
    options: dict[str, Any] = {"optimizer": ADAMW, "observe": True, "precision": "fp64", "seq_len": 8}
    told = []
    with patch.object(LlamaRMSNorm, "forward", exact_norm):
        for axes, extra in (({"tp": 2}, {"sequence_parallel": True}), ({"dp": 2}, {})):
            made = pipeline_decoder(
                small_llama().double(), init_mesh(pp=2, device_type="cpu", **axes), **options, **extra
            )
            made.run(rows(6))
            told.append(made.reports)
    errors = {}
    for own, other in zip(*told, strict=True):
        assert own.num_updates == 6
        for name in ("num_micro_batches", "num_updates", "delay_mean", "delay_max", "prediction_error"):
            errors[f"{name} of stage {own.stage}"] = abs(getattr(own, name) - getattr(other, name))
        assert own.gradient_norm > 0
        errors[f"gradient norm of stage {own.stage}"] = abs(own.gradient_norm / other.gradient_norm - 1)
        assert (own.prediction_error > 0) == (own.stage == 0)
    return errors


def test_cut_stages_report_on_all_their_parts_together(ranks):
    assert_ranks(ranks(4)(reports), 1e-11)  # roundings of fp64, as above


def paused(cut: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """What differs between a stream without a stop, and one that was saved in flight and went on elsewhere."""
    mesh = init_mesh(pp=2, tp=2, device_type="cpu")
    data = rows(8)

    def made() -> Any:
        return pipeline_decoder(small_llama(), mesh, seq_len=8, precision="fp32", **cut, **options)

    alone, stopped, found = made(), made(), []
    losses = alone.run(data)
    for part in (
        data[:4],
        data[4:5],
    ):  # with two micro-batches an update, first in the middle of one on stage 0, then 1
        found += stopped.run(part, drain=False)
        file = io.BytesIO()
        torch.save(stopped.state_dict(), file)
        file.seek(0)
        stopped = made()
        stopped.load_state_dict(torch.load(file, weights_only=True))
    found += stopped.run(data[5:])
    named = zip(alone.stage.module.named_parameters(), stopped.stage.module.parameters(), strict=True)
    differences = {name: float((p - other).detach().to_local().abs().max()) for (name, p), other in named}
    return differences | {"loss": max(abs(one - other) for one, other in zip(losses, found, strict=True))}


@pytest.mark.parametrize(
    ("cut", "options"),
    [
        ({}, {"optimizer": ADAMW}),
        # Where the stream stops between two updates, some gradients are summands that tp has not added yet.
        ({"sequence_parallel": True}, {"optimizer": SGD, "schedule": "paci:2", "mitigation": "stash+ef"}),
    ],
    ids=["lockstep", "sequence"],
)
def test_cut_stages_go_on_from_what_was_in_flight(ranks, cut, options):
    assert_ranks(ranks(4)(paused, cut, options), 0.0)


def muon_and_adamw(parameters: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices, rest = ([p for p in parameters if (p.ndim == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]


def refused() -> list[str]:
    mesh = init_mesh(pp=2, tp=2, device_type="cpu")
    cases: list[dict[str, Any]] = [
        {"optimizer": muon_and_adamw},
        {"optimizer": ADAMW, "mitigation": "rotate"},
        {"optimizer": ADAMW, "checkpointing": "stream"},
        {"optimizer": Doubled, "mitigation": "none"},
    ]
    messages = []
    for options in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            pipeline_decoder(small_llama(), mesh, seq_len=8, **options)
        messages.append(str(error.value))
    model = small_llama()
    pipeline_decoder(model, mesh, seq_len=8, optimizer=ADAMW)
    for use in (lambda: model(rows(1)[0][0]), lambda: pipeline_decoder(model, mesh, seq_len=8, optimizer=ADAMW)):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            use()
        messages.append(str(error.value))
    return messages


class Doubled(torch.optim.SGD):
    """A step that nobody knows."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        super().step(closure)


def test_what_needs_whole_matrices_is_refused(ranks):
    expected = (
        "Muon with tp=2", "leave out rotate", "tp=2: chunks of cut matrices", "Doubled with tp=2",
        "was taken over", "was parallelized before",
    )  # fmt: skip
    for messages in ranks(4)(refused):
        for message, words in zip(messages, expected, strict=True):
            assert words in message


def unlike(how: str) -> tuple[str, str]:
    """What is raised where the last rank, of stage 1, is not as its tp neighbour."""
    made = pipeline_decoder(
        small_llama(), init_mesh(pp=2, tp=2, device_type="cpu"), seq_len=8, optimizer=ADAMW, precision="fp32"
    )
    data, odd = rows(4), torch.distributed.get_rank() == 3
    if how == "weights" and odd:
        norm = made.stage.module.model.norm.weight
        norm.data.to_local().mul_(2)

    def stream() -> Iterator[Any]:
        for number, (inputs, targets) in enumerate(data):
            if how == "raises" and odd and number == 2:
                raise KeyError("lost")
            errs = odd and number == 2
            if errs and how == "order":  # the same numbers, in another order
                targets = targets.flip(0)
            yield inputs, targets + 1 if errs and how == "other" else targets

    stream_of = stream() if how != "shorter" else iter(data[: 3 if odd else 4])
    try:
        made.run(stream_of)
    except (ValueError, PipelineError, KeyError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("other", "the stream of rank 3 has another micro-batch than that of rank 2"),
        ("order", "the stream of rank 3 has another micro-batch than that of rank 2"),
        ("shorter", "the stream of rank 3 has another length than that of rank 2"),
        ("raises", "the stream of rank 3 has raised an error"),
        ("weights", "weight model.norm.weight of rank 3 is not that of the first tp rank"),
    ],
)
def test_tp_ranks_that_are_not_alike_end_at_once(ranks, how, words):
    pool = ranks(4)
    try:
        raised = pool(unlike, how, timeout_s=60.0)
    finally:
        pool.close()
    assert words in raised[2][1]
    assert [kind for kind, _ in raised[:2]] == ["PipelineError"] * 2
    assert raised[3][0] == ("KeyError" if how == "raises" else "ValueError")
