"""The head alone streamed, in a single pass: plain cross-entropy's loss and gradients, and no product more."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fourfold.parallel.stream import work_space
from fourfold.parallel.stream.settings import LogitsForm, StreamSettings, new_head
from fourfold.parallel.testing.compare import gradient_errors

HIDDEN, VOCABULARY, TOKENS, CHUNK = 8, 96, 21, 5
WEIGHT = 0.3


class End(nn.Module):
    """A norm and a head, whose loss is streamed or plain."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.head = LlamaRMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=bias)
        self.norm.weight.data = torch.rand(HIDDEN) + 0.5

    def plain(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(hidden)).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") * WEIGHT

    def streamed(self, hidden: Tensor, targets: Tensor, **changes: bool) -> Tensor:
        head = new_head(StreamSettings(logits_chunk=CHUNK), None, LogitsForm(), self.norm, self.norm.forward, self.head)
        one = torch.ones((), dtype=torch.float64)
        return replace(head, **changes).loss(hidden, targets, one) * WEIGHT


def micro_batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Two, in which some tokens, and all of a chunk, have no target."""
    torch.manual_seed(2)
    hidden = torch.randn(2, 2, TOKENS, HIDDEN, dtype=dtype)
    targets = torch.randint(VOCABULARY, (2, 2, TOKENS))
    targets[:, 0, 3:14] = -100
    return list(zip(hidden, targets, strict=True))


def both(end: End, loss: str, dtype: torch.dtype, **changes: bool) -> dict[str, Tensor]:
    """The losses' sum, and gradients of parameters and hidden states, of two micro-batches."""
    found: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for index, (hidden, targets) in enumerate(micro_batches(dtype)):
        leaf = hidden.requires_grad_()
        value = getattr(end, loss)(leaf, targets, **changes)
        value.backward()
        total += value.detach()
        found[f"hidden {index}"] = leaf.grad
    return {**found, "loss": total, **{name: p.grad for name, p in end.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "head.weight", "norm.weight", "bias"])
def test_in_fp64_nothing_but_rounding_is_left(frozen, single_pass, skips):
    """Rounding is transformers' own: its norm is computed in fp32."""
    ends = [End(bias=frozen == "bias").double() for _ in range(2)]
    for end in ends:
        for name, parameter in end.named_parameters():
            parameter.requires_grad_(name != frozen)
    plain = both(ends[0], "plain", torch.float64)
    found = both(ends[1], "streamed", torch.float64, single_pass=single_pass, skips=skips)
    assert max(gradient_errors(found, plain).values()) <= 1e-6


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_no_worse_than_plain_against_fp64(autocast, single_pass, skips):
    dtype = torch.float32 if autocast else torch.bfloat16
    end = End().to(dtype)
    exact = both(copy.deepcopy(end).double(), "plain", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = gradient_errors(both(copy.deepcopy(end), "plain", dtype), exact)
        found = both(end, "streamed", dtype, single_pass=single_pass, skips=skips)
    assert max(gradient_errors(found, exact).values()) <= 1.5 * max(plain.values())


class Products(TorchDispatchMode):
    """How many matrix products were computed while it was on."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("single_pass", "products"), [(True, 3), (False, 4)])
def test_a_single_pass_computes_no_logit_again(single_pass, products):
    """Where the weight has a gradient, what is summed into it costs the logits once more; and nothing else does."""
    end = End()
    (hidden, targets), _ = micro_batches(torch.float32)
    for expected in (3, products):  # of the first micro-batch of a step, and of the next
        with Products() as counted:
            end.streamed(hidden.requires_grad_(), targets, single_pass=single_pass).backward()
        assert counted.number == expected * -(-int(targets.ge(0).sum()) // CHUNK)


def test_which_logits_are_whole():
    """Those of a chunk at most, or of fewer tokens than the head is wide."""
    least = work_space.loss_chunk_size(128_000, "cuda")
    assert least == 2097
    assert not work_space.streams_loss(least, 2048, 128_000, "cuda")
    assert work_space.streams_loss(least + 1, 2048, 128_000, "cuda")
    assert not work_space.streams_loss(least + 1, 4096, 128_000, "cuda")
    assert work_space.streams_loss(4097, 4096, 128_000, "cuda")
