"""One loss and one set of gradients over every way to lay eight ranks out that the table of limits allows.

A spread of them by default; all of them (minutes) with the other parameters of a sweep:

    pytest tests/ranks/decoder/test_eight_ranks.py --hypothesis-profile=thorough
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import settings
from support.one_loss import tiny_model
from torch import Tensor, nn

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder.documents import document_positions, seen_tokens, without_first_tokens
from fourfold.parallel.decoder.limits import FORMS, PACKED, RUNTIME, SHAPES, Choice, as_number, broken, decoder_facts
from fourfold.parallel.stream import StreamSettings
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

RANKS, GLOBAL_BATCH, SEQ_LEN = 8, 8, 64
MODEL = {"num_key_value_heads": 4, "num_hidden_layers": 4}
LENGTHS = ((64,), (40, 1, 23), (20, 44), (33, 31), (64,), (17, 47), (3, 61), (50, 14))
FACTS = decoder_facts(tiny_model(**MODEL).config.to_dict())
CHUNKS = StreamSettings(chunk_size=5)
EVERY = 28
"""One in so many is tested by default."""


def fits(shape: dict[str, int], options: dict[str, Any]) -> bool:
    """Whether the table of limits has nothing against it."""
    words = {name: as_number(name, value) for name, value in options.items() if name != "documents"}
    choice = Choice(**shape, **words, global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN)
    limits = (*FORMS, *RUNTIME, *SHAPES, *(PACKED if options["documents"] else ()))
    return next(broken(limits, FACTS, choice), None) is None


def layouts() -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    """Every mesh of eight ranks with every combination of options that fits."""
    sizes = (1, 2, 4, 8)
    for shape in (dict(zip(("dp", "pp", "cp", "tp"), each, strict=True)) for each in product(sizes, repeat=4)):
        if shape["dp"] * shape["pp"] * shape["cp"] * shape["tp"] != RANKS:
            continue
        local_batch = GLOBAL_BATCH // shape["dp"]
        for checkpointing, documents, zero_stage, sequence_parallel, vp in product(
            ("none", "stream"), (False, True), range(4), (False, True), (1, 2)
        ):
            options = {
                "checkpointing": checkpointing, "documents": documents, "zero_stage": zero_stage,
                "sequence_parallel": sequence_parallel, "vp": vp, "micro_batch": max(1, local_batch // 4),
            }  # fmt: skip
            if fits(shape, options):
                yield shape, options


def batch(documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, labels with uneven counts of targets, and the number of each token's document."""
    ids = torch.randint(64, (GLOBAL_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :30] = labels[5, 40:] = -100
    numbers = [[index for index, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    return ids, labels, torch.tensor(numbers) if documents else None


def one_process(documents: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the untouched model, documents by a mask and positions."""
    ids, labels, numbers = batch(documents)
    model, told = tiny_model(double=True, **MODEL), {}
    if numbers is not None:
        labels = without_first_tokens(labels, numbers)
        told = {"attention_mask": seen_tokens(None, numbers), "position_ids": document_positions(numbers)}
    loss = model(ids, labels=labels, **told).loss
    loss.backward()
    return loss.item(), {name: gradient_of(parameter) for name, parameter in model.named_parameters()}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return full_tensor(gradient)


def errors(
    shape: dict[str, int], choices: list[dict[str, Any]], truth: dict[bool, tuple[float, dict[str, Tensor]]]
) -> dict[str, float]:
    """This rank's errors under one mesh and several options, by what differs."""
    mesh, found = init_mesh(**shape, device_type="cpu"), {}
    for options in choices:
        loss, gradients = truth[options["documents"]]
        words = {name: value for name, value in options.items() if name != "documents"}
        stream = CHUNKS if options["checkpointing"] == "stream" else None
        model = parallelize(tiny_model(double=True, **MODEL), mesh, stream=stream, **words)
        rows = model.batch_rows(GLOBAL_BATCH)
        ids, labels, documents = (None if part is None else part[rows] for part in batch(options["documents"]))
        named = str(options)
        before = model.evaluate(ids, labels, documents).item()
        found[f"loss, {named}"] = abs(model.forward_backward(ids, labels, documents).item() / loss - 1)
        found[f"evaluation, {named}"] = abs(before / loss - 1)
        worst = max(
            (relative_error(gradient_of(parameter), gradients[name]), name)
            for name, parameter in model.named_parameters()
        )
        found[f"gradient of {worst[1]}, {named}"] = worst[0]
    return found


ALL = list(layouts())
TRIED = ALL if settings().max_examples >= 500 else ALL[::EVERY]
BY_SHAPE: dict[str, tuple[dict[str, int], list[dict[str, Any]]]] = {}
for each_shape, each_options in TRIED:
    BY_SHAPE.setdefault(str(each_shape), (each_shape, []))[1].append(each_options)


@pytest.fixture(scope="module")
def truth() -> dict[bool, tuple[float, dict[str, Tensor]]]:
    return {documents: one_process(documents) for documents in (False, True)}


@pytest.mark.parametrize("name", BY_SHAPE)
def test_one_loss(ranks, truth, name):
    """In fp64: what remains is transformers' own, its norms and rotary tables are fp32."""
    shape, choices = BY_SHAPE[name]
    assert_ranks(ranks(RANKS)(errors, shape, choices, truth, timeout_s=280.0), 1e-6, f"mesh {shape}")


def test_the_spread_has_a_bit_of_everything():
    """So that what is left out by default differs from what is tested in combinations alone."""
    tried = ALL[::EVERY]
    for name, values in (
        ("checkpointing", {"none", "stream"}), ("documents", {False, True}), ("zero_stage", {0, 1, 2, 3}),
        ("sequence_parallel", {False, True}), ("vp", {1, 2}),
    ):  # fmt: skip
        assert {options[name] for _, options in tried} == values
    for axis in ("dp", "pp", "cp", "tp"):
        assert max(shape[axis] for shape, _ in tried) >= 4
