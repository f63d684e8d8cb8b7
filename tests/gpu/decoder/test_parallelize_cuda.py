"""The same loss on a GPU: fp32 as exact as on the CPU, bf16 within its rounding, under DDP's and FSDP2's arithmetic."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold.parallel import init_mesh, parallelize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
IDS = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(2))


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def truth() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in fp64 on the CPU."""
    model = tiny_model().double()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


# bf16 keeps 8 bits (4e-3 relative) at each of some twenty roundings on the way to a gradient.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16-mixed", 3e-2), (None, 3e-2)], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_one_gpu(truth, precision, tolerance, zero_stage, checkpointing):
    model = parallelize(
        tiny_model(),
        init_mesh(),
        micro_batch=2,
        zero_stage=zero_stage,
        checkpointing=checkpointing,
        precision=precision,
    )
    loss = model.forward_backward(IDS)
    assert loss.item() == pytest.approx(truth[0], rel=tolerance)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        error = (gradient.double().cpu() - truth[1][name]).norm() / truth[1][name].norm()
        assert error < tolerance, name
