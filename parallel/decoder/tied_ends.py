"""The embedding of a decoder whose head is the same weight, where two pipeline stages need it.

The first stage looks tokens up in it, the last multiplies by it. Each holds a copy under its one name in the whole
model, model.embed_tokens.weight, so that optimizers, checkpoints and folders find it by name under every layout:

    first stage   gradient of the lookup \\
                                           + the same sum on both, bit for bit
    last stage    gradient of the head   /

The copies begin equal. With equal gradients the same optimizer takes the same steps, so they stay equal.

Megatron-LM makes a process group of the two stages and all-reduces whole gradients. Here the two ranks exchange theirs
in the pipeline's own group, after the reduction over replicas: where ZeRO shards gradients, a shard each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.communication import agree, digest, exchange, place_in
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.gradients import local_gradient, local_part

_PIECE_BYTES = 32 * 2**20
"""Of a gradient, received at a time: as gradients.average_gradients has its buckets."""


def check_ends_alike(whole: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse stages of models with other ends, of which they would hold unlike copies; every rank of the mesh calls.

    Args:
        whole: the model that the stages are cut from, before they are placed.
        dtype: that its weights will be stored in.
    Raises:
        ValueError: on every rank of a pipeline, where its stages' models differ in whether the ends are tied, or then
            in the embedding's size, its dtype or whether it is trained.
    Cost: one all-reduce of 24 bytes.
    """
    weight = cast(nn.Parameter, cast(Any, whole).model.embed_tokens.weight)
    rows, columns = weight.shape
    tied = int(bool(cast(Any, whole).config.tie_word_embeddings))
    numbers = {
        "whether the head is the embedding (tie_word_embeddings)": tied,
        "the rows of the tied embedding": tied * rows,
        "the columns of the tied embedding": tied * columns,
        "whether the tied embedding is trained (requires_grad)": tied * weight.requires_grad,
        "the dtype of the tied embedding": tied * digest(str(dtype)),
    }
    agree(place_in(mesh.get_group("pp")), numbers, device)


@torch.no_grad()
def copy_to_last_stage(stage: DecoderStage, mesh: DeviceMesh) -> None:
    """Give the last stage's embedding the first stage's weights, in place; ranks of both call, others may.

    Args:
        stage: before its parameters are sharded over replicas; tp may have cut them, alike on both.
    Cost: this rank's part of the embedding travels once.
    """
    place = place_in(mesh.get_group("pp"))
    if stage.is_first == stage.is_last:  # neither end, or both of a model that is in one piece
        return
    local = local_part(_embedding(stage))
    if stage.is_first:
        exchange(place, [(local, place.size - 1)], []).wait()
    else:
        exchange(place, [], [(local, 0)]).wait()


class TiedEnd:
    """This rank's copy of the embedding in steps; none where the ends are not tied, or lie on other ranks, or on one.

    Args:
        stage: this rank's, placed.
        mesh: (dp, pp, cp, tp).
    """

    def __init__(self, stage: DecoderStage, mesh: DeviceMesh) -> None:
        self._stage = stage
        self._holds = bool(stage.config.tie_word_embeddings) and stage.is_first != stage.is_last
        self._place = place_in(mesh.get_group("pp"))
        self._other = self._place.size - 1 if stage.is_first else 0

    @property
    def frozen(self) -> bool:
        """Whether this rank has a copy, and does not train it."""
        return self._holds and not _embedding(self._stage).requires_grad

    @property
    def counted_elsewhere(self) -> nn.Parameter | None:
        """The last stage's copy: where each weight counts once, as in the norm of all gradients, the first's does."""
        return _embedding(self._stage) if self._holds and self._stage.is_last else None

    @contextmanager
    def gradients_summed(self) -> Iterator[None]:
        """Around a step's backwards and reductions: what they add to this copy's gradient is both copies' sum.

        Ranks of both stages call. Gradients of earlier steps, which are sums already, are put aside meanwhile.

        Cost: this rank's part of the gradient, sent and received once; a copy of an earlier gradient.
        """
        if not self._holds or self.frozen:
            yield
            return
        weight = _embedding(self._stage)
        # A copy: DistributedDataParallel would write the new gradient over it.
        earlier = None if weight.grad is None else weight.grad.clone()
        weight.grad = None
        yield
        with torch.no_grad():
            if weight.grad is None:  # nothing of this stage depended on it
                weight.grad = torch.zeros_like(weight)
            gradient = local_gradient(weight)
            assert gradient is not None
            self._add_other(gradient)
            if earlier is not None:
                weight.grad.add_(earlier)

    def _add_other(self, gradient: Tensor) -> None:
        """Add the other stage's gradient in place. A sum of two is the same in either order."""
        flat = gradient.reshape(-1)
        for piece in torch.split(flat, max(1, _PIECE_BYTES // gradient.element_size())):
            other = torch.empty_like(piece)
            exchange(self._place, [(piece, self._other)], [(other, self._other)]).wait()
            piece += other
        if flat.data_ptr() != gradient.data_ptr():  # it was no piece of memory to be seen as one row
            gradient.copy_(flat.view_as(gradient))


def _embedding(stage: DecoderStage) -> nn.Parameter:
    return cast(nn.Parameter, cast(Any, stage.model).embed_tokens.weight)
