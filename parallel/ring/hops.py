"""One rank's way around the ring: hop by hop, forward and backward.

While a hop's keys and values are attended to, the next hop's are on their way. Rank 0 of 4, forward:

    compute    own keys  | keys of 3 | keys of 2 | keys of 1
    arriving   keys of 3 | keys of 2 | keys of 1 |

Backward goes the same way once more; the gradients of a hop's keys return to their rank during the following hop:

    compute    own keys  | keys of 3 | keys of 2       | keys of 1       |
    arriving   keys of 3 | keys of 2 | keys of 1       |                 |
    returning            |           | gradients for 3 | gradients for 2 | gradients for 1

Deterministic: blocks, hops and sums have one order, so a repeat gives the same bits (on CUDA if the kernel does).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Hop, Span
from fourfold.parallel.attention.calls import Tokens, add, attend_call, attend_call_backward, calls
from fourfold.parallel.attention.kernels import AttentionBackend, Gradients, SavedAttention, accumulation_dtype
from fourfold.parallel.attention.merged import Merged
from fourfold.parallel.communication import Exchange, Place, exchange
from fourfold.parallel.ring.heads import HeadExchange


@dataclass(frozen=True, slots=True)
class Ring:
    """One call of ring_attention, planned; made by `plan_ring`.

    Its methods are for callers that are an autograd.Function themselves (ring_attention's own, StreamBP's layers) and
    decide what to keep in between. Every rank of the group must call each of them, in the same order. A rank's tokens
    of all heads are [B, heads, S_local, D]; its heads of its ring rank's tokens are [B, heads/h, h*S_local, D].
    """

    place: Place
    hops: tuple[Hop, ...]
    heads: HeadExchange
    backend: AttentionBackend
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> SavedAttention:
        """What `backward` needs, by heads, for q, k and v by tokens; `to_tokens` makes the output of its `out`.

        Args:
            sinks: [H], see ring_attention.
        """
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = self.heads.to_heads(q, k, v)
            out, lse = _forward(q, k, v, self)
            if sinks is not None:
                # One more term of each softmax, with a value of zero: it takes its share of the weight.
                whole = torch.logaddexp(lse, self._own_sinks(sinks, lse))
                out, lse = out * (lse - whole).exp().unsqueeze(-1), whole
            return SavedAttention(q, k, v, out.to(q.dtype), lse)

    def to_tokens(self, out: Tensor) -> Tensor:
        """Attention's output for this rank's tokens, [B, H, S_local, D]."""
        return self.heads.to_tokens(out)

    def saved(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> SavedAttention:
        """What `forward` gave for q, k and v (by tokens), of which only out and lse were kept."""
        q, k, v = self.heads.to_heads(q, k, v)
        return SavedAttention(q, k, v, out, lse)

    def backward(self, grad_out: Tensor, saved: SavedAttention) -> Gradients:
        """(dq, dk, dv), by tokens and in the dtype of q, from the gradient [B, H, S_local, D] of the output."""
        return self.backward_with_sinks(grad_out, saved, None)[0]

    def backward_with_sinks(
        self, grad_out: Tensor, saved: SavedAttention, sinks: Tensor | None
    ) -> tuple[Gradients, Tensor | None]:
        """`backward`, and this rank's part of the gradient [H] of what forward was given as sinks."""
        with torch.autocast(grad_out.device.type, enabled=False):
            (grad_out,) = self.heads.to_heads(grad_out)
            sink_gradient = None if sinks is None else self._sink_gradient(grad_out, saved, sinks)
            dq, dk, dv = self.heads.gradients_to_tokens(*_backward(grad_out, saved, self))
            return (dq.to(saved.q.dtype), dk.to(saved.q.dtype), dv.to(saved.q.dtype)), sink_gradient

    def _own_sinks(self, sinks: Tensor, lse: Tensor) -> Tensor:
        """[1, H/h, 1] of this rank's heads."""
        return sinks[self.heads.own(len(sinks))].to(lse.dtype)[None, :, None]

    def _sink_gradient(self, grad_out: Tensor, saved: SavedAttention, sinks: Tensor) -> Tensor:
        """A sink's weight shrinks the output in proportion, so its gradient is -weight * (output . its gradient)."""
        weights = (self._own_sinks(sinks, saved.lse) - saved.lse).exp()
        agreement = (grad_out.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1)
        gradient = torch.zeros_like(sinks)
        gradient[self.heads.own(len(sinks))] = -(weights * agreement).sum((0, 2)).to(sinks.dtype)
        return gradient


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """Merged output and lse of this rank's queries, in the accumulation dtype where blocks had to be merged."""
    merged = Merged(q, [block.q for hop in ring.hops for block in hop.blocks], v.shape[3])
    keys, values = k, v
    for step, hop in enumerate(ring.hops):
        # The next hop's keys start travelling before this hop's are read.
        following = _Arrival(k, v, ring, step + 1)
        for call in calls(ring.backend, q, hop.blocks):
            merged.add_call(call, *attend_call(ring.backend, q, keys, values, call, ring.scale))
        keys, values = following.wait()
    return merged.out, merged.lse


def _backward(grad_out: Tensor, saved: SavedAttention, ring: Ring) -> Gradients:
    """(dq, dk, dv); gradients of keys go back to their rank while the next hop computes."""
    dq, dk, dv = _Sum(saved.q), _Sum(saved.k), _Sum(saved.v)
    returning: _Return | None = None
    held = saved
    for step, hop in enumerate(ring.hops):
        following = _Arrival(saved.k, saved.v, ring, step + 1)
        key_sum, value_sum = (dk, dv) if step == 0 else (_Sum(held.k), _Sum(held.v))
        for call in calls(ring.backend, held.q, hop.blocks):
            gradients = attend_call_backward(ring.backend, grad_out, held, call, ring.scale)
            queries, keys = call.queries(held.q.device), call.keys(held.k.device)
            for total, tokens, part in zip((dq, key_sum, value_sum), (queries, keys, keys), gradients, strict=True):
                total.add(tokens, part)
        held = saved  # free the hop's keys before the next buffers are made
        leaving = _Return((key_sum, value_sum), (dk, dv), hop, ring) if step else None
        arrived = following.wait()
        held = saved._replace(k=arrived[0], v=arrived[1])
        del arrived
        # The hop before this one has had all of this hop's time to return its gradients.
        if returning:
            returning.wait()
        returning = leaving
    if returning:
        returning.wait()
    if ring.heads.degree > 1:  # they go on as messages, whose dtype must not depend on the rank
        return dq.value(), dk.value(), dv.value()
    return dq.final(), dk.final(), dv.final()


class _Arrival:
    """The keys and values of a hop on their way here, and this rank's own on theirs."""

    def __init__(self, k: Tensor, v: Tensor, ring: Ring, step: int) -> None:
        self._tensors, self._flight = (k, v), None
        if step >= len(ring.hops):
            return
        hop = ring.hops[step]
        degree, inner = ring.heads.degree, ring.heads.inner
        buffers = [_message(x, hop.num_received) for x in (k, v)]
        self._tensors = (buffers[0].transpose(1, 2), buffers[1].transpose(1, 2))
        self._flight = exchange(
            ring.place,
            [(_pack(x, hop.send), hop.target * degree + inner) for x in (k, v)],
            [(buffer, hop.source * degree + inner) for buffer in buffers],
        )

    _flight: Exchange | None
    _tensors: tuple[Tensor, Tensor]

    def wait(self) -> tuple[Tensor, Tensor]:
        if self._flight:
            self._flight.wait()
        return self._tensors


class _Return:
    """Gradients of another rank's keys on their way home, and those of this rank's keys coming in."""

    def __init__(self, leaving: "tuple[_Sum, _Sum]", totals: "tuple[_Sum, _Sum]", hop: Hop, ring: Ring) -> None:
        degree, inner = ring.heads.degree, ring.heads.inner
        num_expected = sum(stop - start for start, stop in hop.send)
        self._totals, self._spans = totals, hop.send
        self._buffers = [total.message(num_expected) for total in totals]
        self._flight = exchange(
            ring.place,
            [(total.value().transpose(1, 2).contiguous(), hop.source * degree + inner) for total in leaving]
            if hop.receive
            else [],
            [(buffer, hop.target * degree + inner) for buffer in self._buffers],
        )

    def wait(self) -> None:
        self._flight.wait()
        for total, buffer in zip(self._totals, self._buffers, strict=True):
            start = 0
            for span in self._spans:
                stop = start + span[1] - span[0]
                total.add(span, buffer[:, start:stop].transpose(1, 2))
                start = stop


class _Sum:
    """A gradient summed from parts over some tokens each: in their own dtype where one is all, else accumulated."""

    def __init__(self, like: Tensor) -> None:
        # Of `like` only what a zero of its shape needs: the tensor itself may go.
        self._zero = like.new_zeros((), dtype=accumulation_dtype(like.dtype))
        self._batch, self._heads, self._tokens, self._size = like.shape
        self._total: Tensor | None = None

    def add(self, tokens: Tokens, part: Tensor) -> None:
        if self._total is None and isinstance(tokens, tuple) and tokens == (0, self._tokens):
            self._total = part
        else:
            add(self.value(), tokens, part)

    def value(self) -> Tensor:
        """The sum so far in the accumulation dtype."""
        if self._total is None:
            self._total = self.message(self._tokens).zero_().transpose(1, 2)
        self._total = self._total.to(self._zero.dtype)
        return self._total

    def final(self) -> Tensor:
        """The sum, in the dtype of its one part where there was no other."""
        return self.value() if self._total is None else self._total

    def message(self, num_tokens: int) -> Tensor:
        """An empty [B, n, H, D] of this sum's dtype."""
        return self._zero.new_empty((self._batch, num_tokens, self._heads, self._size))


def _message(x: Tensor, num_tokens: int) -> Tensor:
    return x.new_empty((x.shape[0], num_tokens, x.shape[1], x.shape[3]))


def _pack(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Spans of tokens as one contiguous [B, n, H, D]; no copy for one span of a tensor that is laid out so."""
    tokens = x.transpose(1, 2)
    if len(spans) == 1:
        return tokens[:, slice(*spans[0])].contiguous()
    if not spans:
        return tokens[:, :0]
    return torch.cat([tokens[:, slice(*span)] for span in spans], dim=1)
