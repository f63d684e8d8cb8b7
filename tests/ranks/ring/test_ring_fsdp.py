"""FSDP2's mixed precision around the ring, plain and streamed: no further from fp64 than the whole model in bf16 is."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.testing.compare import gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

FP32 = MixedPrecisionPolicy()
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def errors(family: str, streams: bool) -> dict[str, tuple[float, float, str]]:
    """For each precision: (ours, plain's) worst gradient error from fp64, and the dtype of the gradients."""
    ids = batch(2, 45)
    whole = {"input_ids": ids, "labels": ids, "use_cache": False}
    model = tiny(family)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(**whole).loss)
    found = {}
    for policy, dtype in ((FP32, torch.float32), (BF16, torch.bfloat16)):
        plain_model = copy.deepcopy(model).to(dtype)
        plain = gradient_errors(gradients(plain_model, plain_model(**whole).loss), exact)
        sharded, mesh = copy.deepcopy(model), init_device_mesh("cpu", (dist.get_world_size(),))
        use_ring_attention(sharded, None)
        if streams:
            stream_backprop(sharded, chunk_size=6, mlp_chunk=4, logits_chunk=5)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        loss = sharded(**shard_batch({"input_ids": ids, "labels": ids}, None)).loss
        (loss * dist.get_world_size()).backward()  # FSDP averages what the ranks hold; the loss is their sum
        mine = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
        kinds = {str(gradient.dtype) for gradient in mine.values()}
        found[str(dtype)] = max(gradient_errors(mine, exact).values()), max(plain.values()), " ".join(kinds)
    return found


@pytest.mark.parametrize("streams", [False, True])
def test_mixed_precision_is_no_worse_than_plain_bf16(ranks, streams):
    for answers in ranks(2)(errors, "qwen3", streams):
        for dtype, (ours, plain, kinds) in answers.items():
            assert ours <= 1.5 * plain + 1e-6, dtype
            assert kinds == "torch.float32"
