"""The head's gradient summed a tile of the vocabulary at a time, where weights are narrower than sums."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourfold.parallel.stream import work_space
from fourfold.parallel.stream.model import stream_backprop
from fourfold.parallel.stream.settings import LogitsForm, StreamSettings, new_head, new_run
from fourfold.parallel.stream.statistics import token_statistics
from fourfold.parallel.testing.compare import gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

VOCABULARY, HIDDEN = 600, 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 5 tokens by 64 rows of the vocabulary."""
    sizes = work_space.CHUNK_SIZES["cpu"]
    monkeypatch.setitem(work_space.CHUNK_SIZES, "cpu", replace(sizes, tile=(4 * 5 * 64, 5)))


class LargestWide(TorchDispatchMode):
    """The most numbers that an operator's new fp32 tensor had while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def smoothed(model: nn.Module, ids: Tensor) -> Tensor:
    if "fourfold_stream" in vars(model):
        found = token_statistics(model, ids, ids)
        logprobs, mean, lse = found.logprobs, found.mean_logits, found.logsumexp
    else:
        logits = model(input_ids=ids).logits[:, :-1].to(torch.promote_types(model.dtype, torch.float32))
        lse, mean = logits.logsumexp(-1), logits.mean(-1)
        logprobs = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - lse
    return -(0.9 * logprobs + 0.1 * (mean - lse)).sum() / ids[:, 1:].numel() + 1e-3 * lse.square().sum()


@pytest.mark.parametrize("family", ["llama", "llama, tied", "phi", "gemma2, soft caps", "granite"])
@pytest.mark.parametrize("loss", [cross_entropy, smoothed])
def test_no_worse_than_plain_against_fp64(family, loss):
    model, ids = tiny(family, vocab_size=VOCABULARY).bfloat16(), batch(2, 21, VOCABULARY)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, loss(exact_model, ids))
    plain = gradient_errors(gradients(model, loss(model, ids)), exact)
    stream_backprop(model, logits_chunk=5)
    assert max(gradient_errors(gradients(model, loss(model, ids)), exact).values()) <= 1.5 * max(plain.values())
    # Twice the gradient, added where the first lies.
    head = model.get_output_embeddings().weight
    place = head.grad.data_ptr()
    loss(model, ids).backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert max(gradient_errors(twice, exact).values()) <= 1.5 * max(plain.values())
    assert head.grad.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [cross_entropy, smoothed])
def test_no_wide_tensor_of_the_whole_head_is_made(dtype, loss):
    model, ids = tiny("llama", vocab_size=VOCABULARY).to(dtype), batch(1, 21, VOCABULARY)
    stream_backprop(model, logits_chunk=5)
    for _ in range(2):
        with LargestWide() as wide:
            loss(model, ids).backward()
        assert 64 * HIDDEN <= wide.numbers < VOCABULARY * HIDDEN


def test_gradients_asked_for_alone_are_whole():
    model, ids = tiny("llama", vocab_size=VOCABULARY).bfloat16(), batch(1, 21, VOCABULARY)
    stream_backprop(model, logits_chunk=5)
    expected = gradients(model, 3 * cross_entropy(model, ids))["lm_head.weight"]
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    (found,) = torch.autograd.grad(3 * cross_entropy(model, ids), [model.lm_head.weight])
    assert torch.equal(found, expected)
    assert model.lm_head.weight.grad.eq(1).all()
    seen = []
    model.lm_head.weight.register_hook(lambda grad: seen.append(grad.clone()))
    (3 * cross_entropy(model, ids)).backward()
    assert torch.equal(seen[0], expected)


def test_a_norm_wider_than_the_head_keeps_its_gradient():
    model, ids = tiny("llama", vocab_size=VOCABULARY).bfloat16(), batch(1, 21, VOCABULARY)
    stream_backprop(model, logits_chunk=5)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, cross_entropy(model, ids))["model.norm.weight"]
        cross_entropy(model, ids).backward()
    assert expected.dtype == torch.float32
    assert (model.model.norm.weight.grad - 2 * expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "tokens", "tiles"),
    [(torch.float32, 21, False), (torch.bfloat16, 21, True), (torch.bfloat16, 1200, False)],
)
def test_tiles_only_where_they_save_memory(dtype, tokens, tiles):
    model, settings = tiny("llama", vocab_size=VOCABULARY).to(dtype), StreamSettings(logits_chunk=5)
    norm, head = model.model.norm, model.lm_head
    run = new_run(settings, model.config, [], (1, tokens), torch.device("cpu"), dtype)
    assert new_head(settings, run, LogitsForm(), norm, norm.forward, head).by_tiles(tokens) == tiles
