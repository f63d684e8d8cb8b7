"""Stand-ins for the kernels of a GPU, in fp64 on a CPU, with the signatures and the strictness of the real ones.

They compute one (query, key) mask at a time, by the formula of each package: key j is seen by query i of its own
sequence when -left <= j - (i + keys - queries) <= right. Each call is noted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from fourfold.parallel.attention.kernels import widen


@dataclass
class Calls:
    """What was called: (kernel, sequences, causal, left, right)."""

    seen: list[tuple[str, int, bool, int, int]] = field(default_factory=list)

    def note(self, kernel: str, mask: "Mask") -> None:
        self.seen.append((kernel, len(mask.starts_q) - 1, mask.causal, mask.left, mask.right))


@dataclass(frozen=True)
class Mask:
    """The arguments that say who sees whom."""

    starts_q: Tensor
    starts_k: Tensor
    causal: bool
    left: int = -1
    right: int = -1
    cap: float = 0.0

    def sequences(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(queries, keys, what is hidden [queries, keys]) of each sequence."""
        right = 0 if self.causal else self.right
        for q, k in zip(self._spans(self.starts_q), self._spans(self.starts_k), strict=True):
            queries, keys = q.stop - q.start, k.stop - k.start
            assert queries > 0, "no kernel is called for nothing"
            assert keys > 0, "no kernel is called for nothing"
            distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
            hidden = torch.zeros_like(distance, dtype=torch.bool)
            if self.left >= 0:
                hidden |= distance < -self.left
            if right >= 0:
                hidden |= distance > right
            yield q, k, hidden

    @staticmethod
    def _spans(starts: Tensor) -> list[slice]:
        ends = starts.tolist()
        return [slice(first, last) for first, last in pairwise(ends)]


def check(tensors: dict[str, Tensor], mask: Mask, longest: tuple[int, int] | None = None) -> None:
    """What the real kernels refuse, or read wrongly without a word."""
    q, k = tensors["q"], tensors["k"]
    for name, x in tensors.items():
        assert x.dim() == 3, f"{name} is [tokens, heads, D]"
        assert x.stride(-1) == 1, f"{name}: its last dim is contiguous"
    assert q.shape[1] % k.shape[1] == 0
    for starts, x in ((mask.starts_q, q), (mask.starts_k, k)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert (int(starts[0]), int(starts[-1])) == (0, len(x))
    if longest is not None:
        assert longest == (int(mask.starts_q.diff().max()), int(mask.starts_k.diff().max()))


def check_efficient(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What torch's memory-efficient kernels take of [B, H, S, D] in fp32 on compute capability 8.0 and later."""
    assert q.shape[1] == k.shape[1] == v.shape[1], "no groups of query heads"
    for x in (q, k, v):
        assert x.dtype in (torch.float32, torch.float64), "fp64 only to compare the calls"
        assert x.shape[3] % 4 == 0
        assert x.stride(3) == 1
        assert not any(step % 4 for step in (*x.stride()[:3], x.storage_offset())), "read four numbers at a time"
        assert max(x.stride()[1:]) < 2**31


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse [H, T]), summed in fp32 (fp64) as kernels do."""
    out, (q, k, v) = torch.full_like(q, torch.nan), map(widen, (q, k, v))
    lse = q.new_full((q.shape[1], len(q)), torch.nan)
    for queries, keys, hidden in mask.sequences():
        _, scores = _scores(q[queries], k[keys], mask.cap, scale)
        scores = scores.masked_fill(hidden, -torch.inf)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = (scores.softmax(-1) @ _heads(v[keys], q.shape[1])).transpose(0, 1)
    return out, lse


def backward(grad: Tensor, saved: tuple[Tensor, ...], mask: Mask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), from an output and lse that may be those of more keys."""
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in saved[:3])
    q, k, v, out, lse, grad = map(widen, (*saved, grad))
    assert lse.shape == (q.shape[1], len(q))
    for queries, keys, hidden in mask.sequences():
        slope, scores = _scores(q[queries], k[keys], mask.cap, scale)
        weights = (scores.masked_fill(hidden, -torch.inf) - lse[:, queries, None]).exp()
        given, here = grad[queries].transpose(0, 1), out[queries].transpose(0, 1)
        delta = (given * here).sum(-1, keepdim=True)
        grad_scores = weights * (given @ _heads(v[keys], q.shape[1]).mT - delta) * slope * scale
        dq[queries] = (grad_scores @ _heads(k[keys], q.shape[1])).transpose(0, 1)
        dk[keys] = _by_key_head(grad_scores.mT @ q[queries].transpose(0, 1), k.shape[1])
        dv[keys] = _by_key_head(weights.mT @ given, k.shape[1])
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """(what a cap's slope is, the scores), [H, queries, keys]."""
    scores = q.transpose(0, 1) @ _heads(k, q.shape[1]).mT * scale
    if not cap:
        return torch.ones_like(scores), scores
    capped = (scores / cap).tanh() * cap
    return 1 - (capped / cap).square(), capped


def _heads(x: Tensor, heads: int) -> Tensor:
    """[keys, H_kv, D] as [H, keys, D]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[H, keys, D] summed to [keys, H_kv, D]."""
    return x.unflatten(0, (key_heads, -1)).sum(1).transpose(0, 1)


def _whole(q: Tensor, k: Tensor, causal: bool, cap: float = 0.0) -> Mask:
    """Of plain calls, [B, S, H, D]."""
    starts = [torch.arange(x.shape[0] + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    return Mask(starts[0], starts[1], causal, cap=cap)


def _row(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@contextmanager
def emulated() -> Iterator[Calls]:
    """Meanwhile flash-attn, FlashAttention 3 and torch's CUDA operators of attention run here, and are noted."""
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
        third = ModuleType("flash_attn_interface")
        _fill_flash_attn(interface, calls)
        _fill_flash_attn_3(third, calls)
        for name, module in (("flash_attn", package), (interface.__name__, interface), (third.__name__, third)):
            patch.setitem(sys.modules, name, module)
        with torch_kernels(calls):
            yield calls


@contextmanager
def torch_kernels(calls: Calls) -> Iterator[None]:
    """Meanwhile torch's CUDA operators of attention run here, and are noted in `calls`."""
    library = torch.library.Library("aten", "IMPL")
    _fill_aten(library, calls)
    try:
        yield
    finally:
        library._destroy()


def _fill_flash_attn(module: Any, calls: Calls) -> None:
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        mask = _whole(q, k, causal, softcap)
        calls.note("flash_attn", mask)
        out, lse = forward(_row(q), _row(k), _row(v), mask, softmax_scale)
        return out.view_as(q), lse.unflatten(1, q.shape[:2]).transpose(0, 1), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        lse = softmax_lse.transpose(0, 1).flatten(1)
        rows = (_row(q), _row(k), _row(v), _row(out), lse)
        found = backward(_row(dout), rows, _whole(q, k, causal, softcap), softmax_scale)
        for target, part in zip((dq, dk, dv), found, strict=True):
            target.copy_(part.view_as(target))

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        mask = Mask(cu_seqlens_q, cu_seqlens_k, causal, window_size_left, window_size_right, softcap)
        check({"q": q, "k": k, "v": v}, mask, (max_seqlen_q, max_seqlen_k))
        calls.note("flash_attn, packed", mask)
        return (*forward(q, k, v, mask, softmax_scale), None, None)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        mask = Mask(cu_seqlens_q, cu_seqlens_k, causal, window_size_left, window_size_right, softcap)
        assert softmax_lse.is_contiguous()
        check({"q": q, "k": k, "v": v, "out": out, "dout": dout}, mask, (max_seqlen_q, max_seqlen_k))
        for target, part in zip(
            (dq, dk, dv), backward(dout, (q, k, v, out, softmax_lse), mask, softmax_scale), strict=True
        ):
            target.copy_(part)

    for function in (
        _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward
    ):  # fmt: skip
        setattr(module, function.__name__, function)


def _fill_flash_attn_3(module: Any, calls: Calls) -> None:
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        if cu_seqlens_q is None:
            mask = _whole(q, k, causal, softcap)
            calls.note("flash_attn_3", mask)
            out, lse = forward(_row(q), _row(k), _row(v), mask, softmax_scale)
            return out.view_as(q), lse.unflatten(1, q.shape[:2]).transpose(0, 1), None, None
        mask = Mask(cu_seqlens_q, cu_seqlens_k, causal, window_size_left, window_size_right, softcap)
        check({"q": q, "k": k, "v": v}, mask, (max_seqlen_q, max_seqlen_k))
        calls.note("flash_attn_3, packed", mask)
        return (*forward(q, k, v, mask, softmax_scale), None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        if cu_seqlens_q is None:
            mask, lse = _whole(q, k, is_causal, softcap), softmax_lse.transpose(0, 1).flatten(1)
            rows = (_row(q), _row(k), _row(v), _row(out), lse)
            found = backward(_row(dout), rows, mask, softmax_scale)
        else:
            mask = Mask(cu_seqlens_q, cu_seqlens_k, is_causal, window_size_left, window_size_right, softcap)
            assert softmax_lse.is_contiguous()
            check({"q": q, "k": k, "v": v, "out": out, "dout": dout}, mask, (max_seqlen_q, max_seqlen_k))
            found = backward(dout, (q, k, v, out, softmax_lse), mask, softmax_scale)
        for target, part in zip((dq, dk, dv), found, strict=True):
            target.copy_(part.view_as(target))

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward


def _fill_aten(library: torch.library.Library, calls: Calls) -> None:
    def packed(
        q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        mask = Mask(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
        check({"q": q, "k": k, "v": v}, mask, (max_q, max_k))
        calls.note("cuda_flash, packed", mask)
        empty = q.new_empty(0)
        return (*forward(q, k, v, mask, scale), empty, empty, empty)

    def packed_backward(
        grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        mask = Mask(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
        assert logsumexp.is_contiguous()
        check({"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out}, mask, (max_q, max_k))
        return backward(grad_out, (q, k, v, out, logsumexp), mask, scale)

    def cudnn(
        q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        out, lse = _plain("cudnn", q, k, v, is_causal, scale)
        empty = q.new_empty(0)
        return out, lse.unsqueeze(-1), empty, empty, q.shape[2], k.shape[2], empty, empty, empty

    def cudnn_backward(
        grad_out, q, k, v, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        return _plain_backward(grad_out, (q, k, v, out, logsumexp.squeeze(-1)), is_causal, scale)

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        out, lse = _plain("cuda_flash", q, k, v, is_causal, scale)
        empty = q.new_empty(0)
        return out, lse, empty, empty, q.shape[2], k.shape[2], empty, empty, empty

    def flash_backward(
        grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
        philox_offset, *, scale=None,
    ):  # fmt: skip
        return _plain_backward(grad_out, (q, k, v, out, logsumexp), is_causal, scale)

    def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        check_efficient(q, k, v)
        out, lse = _plain("efficient", q, k, v, is_causal, scale)
        empty = q.new_empty((), dtype=torch.int64)
        return out, pad(lse, (0, -q.shape[2] % 32), value=torch.inf), empty, empty

    def efficient_backward(
        grad_out, q, k, v, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,
        is_causal=False, *, scale=None,
    ):  # fmt: skip
        check_efficient(q, k, v)
        assert out.transpose(1, 2).is_contiguous(), "the kernel takes its rows to lie H * D apart, and does not look"
        assert logsumexp.is_contiguous()
        assert logsumexp.shape[2] % 32 == 0
        lse, beyond = logsumexp.tensor_split([q.shape[2]], dim=2)
        assert beyond.eq(torch.inf).all()
        assert list(grad_input_mask) == [True, True, True, False]
        return *_plain_backward(grad_out, (q, k, v, out, lse), is_causal, scale), None

    def _plain(name, q, k, v, causal, scale):
        tokens = [x.transpose(1, 2) for x in (q, k, v)]
        mask = _whole(tokens[0], tokens[1], causal)
        calls.note(name, mask)
        out, lse = forward(*map(_row, tokens), mask, scale)
        return out.view_as(tokens[0]).transpose(1, 2), lse.unflatten(1, (len(q), -1)).transpose(0, 1)

    def _plain_backward(grad_out, saved, causal, scale):
        *tokens, grad = (x.transpose(1, 2) for x in (*saved[:4], grad_out))
        lse = saved[4].transpose(0, 1).flatten(1)
        found = backward(_row(grad), (*map(_row, tokens), lse), _whole(tokens[0], tokens[1], causal), scale)
        return tuple(x.view_as(like).transpose(1, 2) for x, like in zip(found, tokens, strict=False))

    names = {
        "_flash_attention_forward": packed,
        "_flash_attention_backward": packed_backward,
        "_scaled_dot_product_cudnn_attention": cudnn,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_flash_attention_backward": flash_backward,
    }
    for name, function in names.items():
        library.impl(name, function, "CPU")
