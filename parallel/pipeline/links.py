"""Point-to-point traffic of a pipeline: two first-in-first-out links to the stage before and two to the stage behind.

torch.distributed.pipelining posts its sends and receives step by step and waits for each; its shapes are fixed when
it is built. An endless asynchronous stream wants every receive posted before it is needed and every send left to run
beside the computation, and may end in a smaller micro-batch. So: `expect_*` posts a receive, `take_*` waits for it,
`send_*` starts a send and returns. Shapes are sent once for each signature (what the micro-batch looks like at the
pipeline's input, which every stage sees) and remembered.

Forward and backward traffic have tags of their own. NCCL knows no tags and runs what one communicator is given in one
order: a stage's send would wait behind the receive it posted ahead, its neighbour's behind that, and so in a circle.
There each direction has a group of its own, and so have even and odd links, hence a rank uses a communicator for one
link in one direction only. (NCCL has not been run with more than one device.)
"""

from collections import deque
from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FORWARD, _BACKWARD, _SHAPE = 7001, 7002, 7003
_MAX_DIMS = 8
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]  # of even and odd links, a link being numbered as its first stage


class PipelineError(RuntimeError):
    """A stage of the pipeline is gone; the message names it."""


class PipeLinks:
    """The links of one stage. One receive may be posted on each incoming link at a time.

    Args:
        group: one rank a stage, in order.
        device: where received tensors live.
        timeout_s: how long a receive may wait for a stage that is alive but silent; None: the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float | None = None) -> None:
        self.stage = dist.get_rank(group)
        self.num_stages = dist.get_world_size(group)
        self._device = device
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._ranks = dist.get_process_group_ranks(group)
        self._down: Groups = (group, group)
        self._up: Groups = (group, group)
        if self.num_stages > 1 and has_nccl(group):
            made = [dist.new_group(self._ranks, use_local_synchronization=True) for _ in range(3)]
            self._down, self._up = (group, made[0]), (made[1], made[2])
        self._received: dict[Hashable, tuple[torch.dtype, list[int]]] = {}
        self._announced: set[Hashable] = set()
        self._sends: deque[tuple[Any, Tensor, str]] = deque()
        self._activation: tuple[Any, Tensor, Hashable | None] | None = None
        self._gradient: tuple[Any, Tensor] | None = None

    def expect_activation(self, signature: Hashable) -> None:
        """Post the receive of the next activation from the stage before."""
        known = self._received.get(signature)
        if known is None:
            header = torch.empty(_MAX_DIMS + 2, dtype=torch.int64, device=self._device)
            self._activation = (
                self._receive(header, self.stage - 1, self._down, _SHAPE),
                header,
                signature,
            )
        else:
            payload = torch.empty(known[1], dtype=known[0], device=self._device)
            self._activation = self._receive(payload, self.stage - 1, self._down, _FORWARD), payload, None

    def take_activation(self, micro_batch: int) -> Tensor:
        """Wait for the activation that was expected."""
        assert self._activation is not None
        what = f"the activation of micro-batch {micro_batch}"
        work, tensor, signature = self._activation
        self._wait(work, self.stage - 1, what)
        if signature is not None:
            code, num_dims, *dims = tensor.tolist()
            self._received[signature] = _DTYPES[code], dims[:num_dims]
            self.expect_activation(signature)
            work, tensor, _ = self._activation
            self._wait(work, self.stage - 1, what)
        self._activation = None
        return tensor

    def send_activation(self, tensor: Tensor, signature: Hashable, micro_batch: int) -> None:
        """Start sending to the stage behind; `tensor` must not be written to any more."""
        if signature not in self._announced:
            if tensor.ndim > _MAX_DIMS or tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"stage {self.stage} sends {tensor.dtype} of shape {list(tensor.shape)}: at most 8 dims"
                )
            dims = [*tensor.shape, *[0] * (_MAX_DIMS - tensor.ndim)]
            header = torch.tensor([_DTYPES.index(tensor.dtype), tensor.ndim, *dims], device=self._device)
            self._send(header, self.stage + 1, self._down, _SHAPE, f"the shape of micro-batch {micro_batch}")
            self._announced.add(signature)
        self._send(tensor, self.stage + 1, self._down, _FORWARD, f"the activation of micro-batch {micro_batch}")

    def expect_gradient(self, like: Tensor) -> None:
        """Post the receive of the next gradient from the stage behind."""
        payload = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        self._gradient = self._receive(payload, self.stage + 1, self._up, _BACKWARD), payload

    def take_gradient(self, micro_batch: int) -> Tensor:
        """Wait for the gradient that was expected."""
        assert self._gradient is not None
        work, tensor = self._gradient
        self._wait(work, self.stage + 1, f"the gradient of micro-batch {micro_batch}")
        self._gradient = None
        return tensor

    def send_gradient(self, tensor: Tensor, micro_batch: int) -> None:
        """Start sending to the stage before; `tensor` must not be written to any more."""
        self._send(tensor, self.stage - 1, self._up, _BACKWARD, f"the gradient of micro-batch {micro_batch}")

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._sends:
            work, _, what = self._sends.popleft()
            self._wait(work, None, what)

    def guard(self, action: Callable[[], Any], what: str) -> Any:
        """Run a collective of the group, with a failed stage named."""
        try:
            return action()
        except RuntimeError as error:
            raise self._error(None, what, error) from error

    def leave_note(self, stage: int, what: str) -> None:
        """Tell all ranks which stage failed: others may notice only that a neighbour left."""
        _leave_note(f"stage {stage} (rank {self._ranks[stage]}) {what}")

    def _receive(self, tensor: Tensor, stage: int, groups: Groups, tag: int) -> Any:
        return self._post(dist.irecv, tensor, stage, groups, tag, "a message")

    def _send(self, tensor: Tensor, stage: int, groups: Groups, tag: int, what: str) -> None:
        while self._sends and self._sends[0][0].is_completed():
            work, _, sent = self._sends.popleft()
            self._wait(work, None, sent)
        self._sends.append((self._post(dist.isend, tensor, stage, groups, tag, what), tensor, what))

    def _post(self, post: Callable[..., Any], tensor: Tensor, stage: int, groups: Groups, tag: int, what: str) -> Any:
        try:
            return post(tensor, self._ranks[stage], group=groups[min(self.stage, stage) % 2], tag=tag)
        except RuntimeError as error:
            raise self._error(stage, what, error) from error

    def _wait(self, work: Any, stage: int | None, what: str) -> None:
        try:
            work.wait(self._timeout) if self._timeout is not None else work.wait()
        except RuntimeError as error:
            raise self._error(stage, what, error) from error

    def _error(self, stage: int | None, what: str, error: RuntimeError) -> PipelineError:
        note = _note()
        if note:
            return PipelineError(f"stage {self.stage} stops at {what}: {note}")
        if stage is None:
            return PipelineError(f"stage {self.stage} stops at {what}, because another stage is gone: {error}")
        who = f"stage {stage} (rank {self._ranks[stage]})"
        if "timed out" in str(error).lower():
            # Not noted for all: a stage that is silent may itself be waiting for another.
            return PipelineError(f"{who} sent nothing in time: stage {self.stage} stops at {what} ({error})")
        self.leave_note(stage, f"is gone, says stage {self.stage}")
        return PipelineError(f"{who} is gone: stage {self.stage} stops at {what} ({error})")


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Whether the group runs CUDA tensors through NCCL: the same answer on all its ranks."""
    return "nccl" in dist.get_backend_config(group)


def device_of_stages(own: torch.device | None, group: dist.ProcessGroup) -> torch.device:
    """Where this stage's activations live: with its parameters, or as the other stages' where it has none.

    Raises:
        ValueError: on every rank, where the stages' parameters are on several kinds of device.
    Cost: under NCCL, one small collective; elsewhere none, as a stage without parameters is on the CPU.
    """
    if not has_nccl(group):
        return own or torch.device("cpu")
    kinds: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(kinds, None if own is None else own.type, group=group)
    found = sorted({kind for kind in kinds if kind is not None})
    if len(found) > 1:
        raise ValueError(f"stages are on {' and '.join(found)}: {kinds}; put the parameters of all on one kind")
    if own is not None:
        return own
    return torch.device("cuda", torch.cuda.current_device()) if found == ["cuda"] else torch.device("cpu")


def replica_lost(stage: int, group: dist.ProcessGroup, error: RuntimeError) -> PipelineError:
    """What to raise where the replicas of `stage` could not be reached over their `group`."""
    ranks = dist.get_process_group_ranks(group)
    cause = _note()
    if not cause:
        cause = f"a replica of stage {stage} is gone (one of ranks {', '.join(map(str, ranks))})"
        if "timed out" not in str(error).lower():
            _leave_note(f"{cause}, says rank {dist.get_rank()}")
    return PipelineError(f"stage {stage} stops at averaging over its replicas: {cause} ({error})")


def _store() -> Any:
    # Private, but the only way to the store that all ranks already share.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


# One note for all pipelines of a world: its replicas end together, and the first to notice saw the cause.
_NOTE = "fourfold/pipeline/failed"


def _leave_note(text: str) -> None:
    try:
        _store().compare_set(_NOTE, "", text)
    except Exception:  # the store may have died with the rank that held it; the neighbours' own messages remain
        return


def _note() -> str:
    try:
        store = _store()
        return store.get(_NOTE).decode() if store.check([_NOTE]) else ""
    except Exception:
        return ""
