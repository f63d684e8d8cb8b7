"""The ring on two CUDA devices that are only pretended: fp64's or the CPU's numbers, and what the host waits for.

Two ranks of a pool of their own: autograd counts the devices once a process (support.pretended_cuda).
"""

from typing import Any

import torch
import torch.distributed as dist
from support.pretended_cuda import pretended
from support.pretended_library import only_pretended, own_pool
from support.ring_cases import make_inputs
from support.ring_models import EXPERTS, tiny_batch, tiny_model
from torch import nn

from fourfold.parallel import init_mesh, ring_attention, shard_batch, shard_sequence, use_ring_attention
from fourfold.parallel.testing.compare import assert_ranks, gradient_errors, gradients, relative_error
from fourfold.parallel.testing.reference import attention_reference

pytestmark = only_pretended
two = own_pool(2)
MASK: dict[str, Any] = {"window": (20, 0), "cu_seqlens": (0, 3, 60, 61, 130)}


def attended() -> tuple[dict[str, float], list[Any], list[str]]:
    """Of bf16 in zigzag shards, with the kernels that an H100 gets: errors of this rank's shard against fp64."""
    whole = make_inputs({"B": 1, "H": 4, "H_kv": 2, "S": 137, "D": 32}, torch.bfloat16)
    with pretended(devices=2) as seen:
        group = init_mesh(cp=2, device_type="cuda").get_group("cp")
        mine = [shard_sequence(x, group, dim=2, cu_seqlens=MASK["cu_seqlens"]).to("cuda") for x in whole]
        leaves, grad = [x.requires_grad_() for x in mine[:3]], mine[3]
        for _ in range(2):  # a plan's tensors go to the device once
            waits = len(seen.waits)
            out = ring_attention(*leaves, group, **MASK)
            found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        new = seen.waits[waits:]
        found = [x.cpu() for x in found]
    exact = [x.double().requires_grad_() for x in whole[:3]]
    truth = attention_reference(*exact, **MASK)
    truths = [truth.detach(), *torch.autograd.grad(truth, exact, whole[3].double())]
    shards = [shard_sequence(x, dist.group.WORLD, dim=2, cu_seqlens=MASK["cu_seqlens"]) for x in truths]
    names = ("o", "dq", "dk", "dv")
    return dict(zip(names, map(relative_error, found, shards), strict=True)), new, seen.faults


def mixture() -> nn.Module:
    model = tiny_model("Mixtral", **EXPERTS, sliding_window=9, output_router_logits=True)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def trained() -> tuple[dict[str, float], list[Any], list[str]]:
    """Of a mixture of experts with windows, its documents told by positions: errors of its loss and its gradients."""
    batch = tiny_batch(rows=1)
    batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(25)])[None]
    batch["labels"][0, 20] = -100
    with pretended(devices=2) as seen:
        group = init_mesh(cp=2, device_type="cuda").get_group("cp")
        model = mixture().to("cuda")
        use_ring_attention(model, group)
        there = {name: x.to("cuda") for name, x in batch.items()}
        for _ in range(2):  # the first compares weights, and the experts' loss with what is known of it
            waits = len(seen.waits)
            loss = model(**shard_batch(there, group)).loss
            found = gradients(model, loss)
        new = seen.waits[waits:]
        sums = {name: x.detach().cpu() for name, x in {**found, "loss": loss}.items()}
    for x in sums.values():
        dist.all_reduce(x)
    whole = mixture()
    expected = whole(**batch, use_cache=False).loss
    total = sums.pop("loss")
    errors = gradient_errors(sums, gradients(whole, expected))
    # What transformers' own code waits for (the mask's kind, each expert's tokens) has no file of ours before a test's.
    ours = [wait for wait in new if wait[1][0].startswith("parallel/")]
    return errors | {"loss": relative_error(total, expected.detach())}, ours, seen.faults


def test_attention_waits_for_nothing(two):
    found = two(attended)
    assert_ranks([errors for errors, _, _ in found], 6e-3, "bf16")  # rounded by block and hop, and as their sum
    assert [(waits, faults) for _, waits, faults in found] == [([], [])] * 2


def test_a_step_of_a_model_waits_before_it_begins_alone(two):
    found = two(trained)
    assert_ranks([errors for errors, _, _ in found], 1e-5, "fp32")
    for rank, (_, waits, faults) in enumerate(found):
        # Sums of the batch and where documents begin, by shard_batch; then all that the call's checks must know.
        assert len(waits) == 3, f"rank {rank}: {waits}"
        assert faults == []
