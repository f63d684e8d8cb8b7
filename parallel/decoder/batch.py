"""Checks of a batch before anything is computed, the same under every layout.

Every rank of one replica's pp, cp and tp axes must be given the same rows, and a token id must be one of the
vocabulary. Nothing in torch says so: with a data sampler that shards over all ranks, tensor parallelism adds up halves
of different sentences, and its embedding takes an id beyond the vocabulary for a zero. The step needs the global number
of targets anyway; the same all-reduce carries a checksum of the rows and the number of ranks that refuse theirs.
"""

from dataclasses import dataclass, replace
from typing import cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.decoder.documents import trouble_with_documents
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, on_device

_CHECKSUM_BITS, _WEIGHT_BITS = 30, 16
"""A product has 46 bits, so that the sum over 2^16 ranks stays below 2^63."""


@dataclass(frozen=True, slots=True)
class LocalRows:
    """A rank's rows, or a micro-batch of them.

    Attributes:
        inputs, targets: [B, S_local] int64, targets shifted.
        document_ids: [B, S] int64, whole rows, where they are packed.
    """

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None = None

    def on(self, device: torch.device) -> "LocalRows":
        """The same, inputs and targets on `device`; document_ids stay where they are."""
        return replace(self, inputs=on_device(self.inputs, device), targets=on_device(self.targets, device))

    def cut(self, micro_batch: int) -> "list[LocalRows]":
        """Micro-batches of so many rows."""
        inputs, targets = (torch.split(x, micro_batch) for x in (self.inputs, self.targets))
        documents = [None] * len(inputs) if self.document_ids is None else torch.split(self.document_ids, micro_batch)
        return [LocalRows(*each) for each in zip(inputs, targets, documents, strict=True)]


def trouble_with(
    input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None, *, vocab_size: int, micro_batch: int | None
) -> str:
    """What is wrong with one rank's rows, in a sentence that names the value and the mend; empty where nothing is.

    Args:
        input_ids, labels, document_ids: as ParallelModel.forward_backward takes them.
        micro_batch: sequences of a forward pass; None takes the batch whole.
    Cost: a pass over the tokens where they are; on a GPU that waits for them.
    """
    for name, tensor in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            return f"{name} are a {type(tensor).__name__}: give a torch tensor, [batch, sequence]"
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            return f"{name} are {tensor.dtype}: give whole numbers, torch.int64"
    if input_ids.dim() != 2 or labels.shape != input_ids.shape:
        return f"input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)}: both are [batch, sequence]"
    if not input_ids.numel():
        return f"input_ids {tuple(input_ids.shape)} holds no token: give each dp rank its sequences"
    if len(input_ids) % (micro_batch or 1):
        return (
            f"a local batch of {len(input_ids)} sequences does not divide by micro_batch={micro_batch}: use a divisor"
        )
    least, most = (int(value) for value in torch.aminmax(input_ids))
    if least < 0 or most >= vocab_size:
        return (
            f"token id {least if least < 0 else most} in a vocabulary of {vocab_size}: give ids from 0 on, below that"
        )
    strange = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))]
    if len(strange):
        return (
            f"label {int(strange[0])} in a vocabulary of {vocab_size}: "
            f"give {IGNORED_LABEL} where there is no target, and token ids elsewhere"
        )
    return "" if document_ids is None else trouble_with_documents(document_ids, input_ids)


def checksum(input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None) -> int:
    """Of what two ranks must have alike: shape, ids, labels and documents."""
    value = crc32(repr(tuple(input_ids.shape)).encode())
    for tensor in (input_ids, labels, *(() if document_ids is None else (document_ids,))):
        value = crc32(tensor.cpu().to(torch.int64).contiguous().numpy().tobytes(), value)
    return value & (1 << _CHECKSUM_BITS) - 1


class BatchAgreement:
    """Counts targets over a mesh, and refuses a batch on all ranks where one rank's is wrong.

    The sum over a replica's ranks of checksum times weight is zero where all have the same checksum, because their
    weights add up to zero; one that differs by d leaves d times its weight. So one sum over all ranks tells.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        peers = mesh["pp"].size() * mesh["cp"].size() * mesh["tp"].size()
        place = (mesh.get_local_rank("pp") * mesh["cp"].size() + mesh.get_local_rank("cp")) * mesh[
            "tp"
        ].size() + mesh.get_local_rank("tp")
        weights = [crc32(bytes([peer % 251, peer // 251 % 251])) % (1 << _WEIGHT_BITS) | 1 for peer in range(1, peers)]
        self._is_first_peer = place == 0
        self._weight = -sum(weights) if place == 0 else weights[place - 1]
        everyone = dist.group.WORLD if mesh.size() == dist.get_world_size() else mesh._flatten("all").get_group()
        self._group = cast(dist.ProcessGroup, everyone)
        # On the host where a backend is there for it: the batch is, and no device has to be waited for.
        on_host = "cpu" in dist.get_backend_config(self._group) or mesh.device_type == "cpu"
        self._device = torch.device("cpu" if on_host else mesh.device_type)
        # torch's fake group, of a dry run, sums nothing.
        self._alone = mesh.size() == 1 or dist.get_backend(self._group) == "fake"

    def num_targets(
        self,
        input_ids: Tensor,
        labels: Tensor,
        trouble: str,
        document_ids: Tensor | None = None,
        *,
        frozen_end: bool = False,
    ) -> int:
        """Targets of the global batch; every rank of the mesh calls.

        Args:
            input_ids, labels, document_ids: [B, S], this rank's rows.
            trouble: what `trouble_with` said of them.
            frozen_end: whether this rank holds one of two copies of tied embeddings, and does not train it.
        Raises:
            ValueError: on every rank, where a rank has trouble (it is named), peers have different rows, or some of the
                copies are frozen and others not.
        Cost: one all-reduce of 32 bytes; beyond that only where something is wrong.
        """
        if self._alone:
            if trouble:
                raise ValueError(trouble)
            return int((labels[:, 1:] != IGNORED_LABEL).sum())
        count, product = 0, 0
        if not trouble:
            count = int((labels[:, 1:] != IGNORED_LABEL).sum()) if self._is_first_peer else 0
            product = checksum(input_ids, labels, document_ids) * self._weight
        values = torch.tensor([count, product, bool(trouble), frozen_end], dtype=torch.int64, device=self._device)
        dist.all_reduce(values, group=self._group)
        total, difference, num_refusing, num_frozen = values.tolist()
        if num_refusing or difference:
            self._refuse(trouble, 0 if trouble else checksum(input_ids, labels, document_ids))
        num_copies = 2 * self._mesh.size() // self._mesh["pp"].size()
        if num_frozen not in (0, num_copies):
            raise ValueError(
                f"the tied embedding is frozen on {num_frozen} of the {num_copies} ranks that hold it: set "
                "requires_grad of model.embed_tokens.weight alike on the first and the last pipeline stage"
            )
        return int(total)

    def _refuse(self, trouble: str, mine: int) -> None:
        """Tell every rank which of them has what; raises ValueError."""
        told = (dist.get_rank(), self._mesh.get_local_rank("dp"), trouble, trouble or mine)
        everyone: list[tuple[int, int, str, int | str]] = [told] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, told, group=self._group)
        for rank, _, said, _ in everyone:
            if said:
                raise ValueError(f"rank {rank}: {said}")
        rows: dict[int, dict[int | str, list[int]]] = {}
        for rank, replica, _, value in everyone:
            rows.setdefault(replica, {}).setdefault(value, []).append(rank)
        for replica, groups in rows.items():
            if len(groups) > 1:
                apart = " and ".join(f"ranks {', '.join(map(str, ranks))}" for ranks in groups.values())
                raise ValueError(
                    f"{apart} share the sequences of dp rank {replica} (pp, cp and tp cut the same rows), but were "
                    "given different input_ids, labels or document_ids: give each of them the rows of its dp rank "
                    "(batch_rows), and seed the shuffling alike"
                )
        raise AssertionError("the checksums' sum is not zero, though all are alike")
