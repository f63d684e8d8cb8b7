"""StreamBP under data parallelism: one process's gradients, and as many collectives for many chunks as for one."""

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool

from fourfold.parallel import stream_backprop
from fourfold.parallel.testing.compare import assert_errors, assert_ranks, gradient_errors
from fourfold.parallel.testing.data_parallel import WHOLE, gradients_of, make_model, step, whole_gradients, wrap

# Sums over ranks in another order than one process's: fp32 roundings.
TOLERANCE = 2e-6


def steps(kind, arguments):
    return [step(kind, *each) for each in arguments]


def check(kind, answers):
    for rank, answer in enumerate(answers):
        for errors, calls in answer:
            assert_errors(errors, TOLERANCE, f"{kind}, rank {rank}")
            assert calls == answer[0][1]
            assert calls


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_one_processes_and_collectives_do_not_count_chunks(ranks, kind):
    check(kind, ranks(2)(steps, kind, [(WHOLE, False), (5, False), (5, True)]))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_reduces_once_and_gathers_a_layer_once_for_all_its_chunks():
    pool = RankPool(2)  # its own: deepspeed changes torch
    try:
        check("zero2", pool(steps, "zero2", [(5,)]))
        check("zero3", pool(steps, "zero3", [(WHOLE,), (5,)]))
    finally:
        pool.close()


def micro_batches(kind: str) -> dict[str, float]:
    """Each gradient's relative error after two micro-batches: the second adds to what the first left unreduced."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    ids = torch.randint(0, 64, (world_size, 33), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=ids).loss.backward()
    streaming = wrap(stream_backprop(model, chunk_size=5, mlp_chunk=3, logits_chunk=4), kind)
    mine = ids[rank : rank + 1]
    for last in (False, True):
        if kind == "ddp":
            streaming.require_backward_grad_sync = last
        else:
            streaming.set_requires_gradient_sync(last)
        streaming(input_ids=mine, labels=mine).loss.backward()
    mean = {name: gradient / 2 for name, gradient in whole_gradients(model, kind).items()}
    return gradient_errors(mean, gradients_of(plain))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_micro_batches_accumulate_before_they_are_reduced(ranks, kind):
    assert_ranks(ranks(2)(micro_batches, kind), TOLERANCE, kind)
