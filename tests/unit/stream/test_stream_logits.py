"""Logits of a streaming model in evaluation: transformers' own, computed where they are read, and only there."""

import io

import pytest
import torch

from fourfold.parallel.stream import stream_backprop
from fourfold.parallel.stream.head import Head
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

# The same products of fp32 in pieces of another shape.
SAME = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def computed(monkeypatch):
    """The shapes of the hidden states whose logits were computed."""
    shapes, plain = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, x: shapes.append(tuple(x.shape)) or plain(head, x))
    return shapes


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", "gemma3, windows", "granite", "phi", "mixtral"])
def test_they_are_the_models_own(family, mode):
    ids, model = batch(2, 21), tiny(family).eval()
    with mode():
        plain = model(input_ids=ids, labels=ids)
        out = stream_backprop(model, chunk_size=8, mlp_chunk=3)(input_ids=ids, labels=ids)
    assert out.logits.shape == plain.logits.shape
    assert out.logits.dtype == plain.logits.dtype
    torch.testing.assert_close(out.logits + 0, plain.logits, **SAME)
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.to_tuple()[1].argmax(-1), plain.logits.argmax(-1))


def test_nothing_is_computed_before_it_is_read(computed):
    ids, model = batch(2, 21), stream_backprop(tiny("llama").eval())
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    assert isinstance(out.logits, torch.Tensor)
    assert (out.logits.shape, out.logits.dtype, out.logits.device) == ((2, 21, 97), torch.float32, ids.device)
    assert (out.logits.ndim, len(out.logits), out.logits.size(1), out.logits.numel()) == (3, 2, 21, 2 * 21 * 97)
    out.logits[:, :-1].detach()
    repr(out.logits)
    assert computed == []
    last = out.logits[:, -1]
    assert computed == [(2, 32)]
    torch.testing.assert_close(out.logits[:, 3:5] * 1, out.logits.clone()[:, 3:5], **SAME)
    assert computed == [(2, 32), (2, 2, 32), (2, 21, 32)]
    torch.testing.assert_close(last, out.logits[:, -1], **SAME)
    assert len(computed) == 3  # the whole is there


def test_whatever_reads_them_gets_their_values():
    ids, model = batch(2, 21), tiny("llama").eval()
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        stream_backprop(model)
        reads = {
            "numpy": lambda x: torch.from_numpy(x.numpy()),
            "list": lambda x: torch.tensor(x.tolist()),
            "stack": lambda x: torch.stack([x])[0],
            "out": lambda x: torch.empty(x.shape).copy_(x),
            "matmul": lambda x: torch.eye(21) @ x,
            "float": lambda x: x.float(),
            "iteration": lambda x: torch.stack(list(x)),
            "mask": lambda x: x[torch.ones(2, 21, dtype=torch.bool)].view(2, 21, 97),
            "saved": saved,
        }
        for name, read in reads.items():
            found = read(model(input_ids=ids, labels=ids).logits)
            torch.testing.assert_close(found, expected, **SAME, msg=lambda text, name=name: f"{name}: {text}")


def saved(logits):
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    return torch.load(file)


def test_training_gives_them_where_they_are_asked_for():
    ids, model = batch(2, 21), tiny("llama")
    out = model(input_ids=ids, labels=ids)
    plain = gradients(model, out.loss + out.logits.square().mean())
    stream_backprop(model, chunk_size=8, mlp_chunk=3)
    out = model(input_ids=ids, labels=ids, return_logits=True)
    assert_gradients(gradients(model, out.loss + out.logits.square().mean()), plain, 2e-6)
    assert model.eval()(input_ids=ids, labels=ids, return_logits=False).logits is None
