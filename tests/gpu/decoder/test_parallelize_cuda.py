"""Gradients on a GPU against fp64, held to what plain backpropagation of the same model is itself off there.

Plain is transformers' own model and torch's autograd in the same precision on the same device: fp32; autocast over fp32
weights, which is what DDP runs; or a bf16 copy of the weights, which is what FSDP2 gathers.
"""

from functools import cache

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder.compiled import chosen_backend
from fourfold.parallel.decoder.limits import Choice, as_number

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
IDS = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(2))
TIMES_PLAIN = 1.5
"""The issue's bound: a new path may be so many times as far from fp64 as plain backpropagation is, all gradients
together; a single one, whose error is a few roundings, twice that."""


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def backpropagated(model: torch.nn.Module, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients in fp64 on the CPU, of two micro-batches of two sequences."""
    model, ids = model.to(device), IDS.to(device)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        loss = model(ids[rows], labels=ids[rows]).loss / 2
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters()}


@cache
def truth() -> tuple[float, dict[str, torch.Tensor]]:
    return backpropagated(tiny_model().double(), "cpu")


def errors(loss: float, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 errors against fp64: of the loss, of each gradient, and of all of them as one vector ("all")."""
    true_loss, true = truth()
    found = {name: ((gradients[name] - true[name]).norm() / true[name].norm()).item() for name in true}
    squares = [((gradients[name] - true[name]).norm() ** 2, true[name].norm() ** 2) for name in true]
    found["all"] = (sum(error for error, _ in squares) / sum(size for _, size in squares)).sqrt().item()
    found["loss"] = abs(loss / true_loss - 1)
    return found


@cache
def plain_errors(kind: str) -> dict[str, float]:
    model = tiny_model()
    if kind == "fp32":
        return errors(*backpropagated(model, "cuda"))
    if kind == "weights in bf16":
        return errors(*backpropagated(model.bfloat16(), "cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        return errors(*backpropagated(model, "cuda"))


@pytest.mark.parametrize("compile", [False, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", None])
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_one_gpu_is_as_near_to_fp64_as_plain_backpropagation(precision, zero_stage, checkpointing, compile):
    layout = Choice(checkpointing=as_number("checkpointing", checkpointing), zero_stage=zero_stage)
    # No Triton, or a layout that the limits do not compile: then None is the same test as False.
    if compile is None and chosen_backend(None, "cuda", layout) is None:
        pytest.skip("layers are not compiled here")
    model = parallelize(
        tiny_model(),
        init_mesh(),
        micro_batch=2,
        zero_stage=zero_stage,
        checkpointing=checkpointing,
        precision=precision,
        compile=compile,
    )
    loss = model.forward_backward(IDS).item()
    gradients = {
        name: (value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad).double().cpu()
        for name, value in model.named_parameters()
    }
    found = errors(loss, gradients)
    plain = plain_errors("fp32" if precision == "fp32" else "autocast" if zero_stage == 0 else "weights in bf16")
    assert found["all"] <= TIMES_PLAIN * plain["all"], plain["all"]
    # A loss can be right by luck: it is held to the gradients' error as well.
    assert found["loss"] <= TIMES_PLAIN * max(plain["loss"], plain["all"])
    worst = {name: (found[name], plain[name]) for name in gradients if found[name] > 2 * TIMES_PLAIN * plain[name]}
    assert not worst
