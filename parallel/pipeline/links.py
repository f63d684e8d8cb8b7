"""Point-to-point traffic of a pipeline: two first-in-first-out links to the stage before and two to the one after.

torch.distributed.pipelining posts its sends and receives step by step and waits for each; its shapes are fixed when
it is built. An endless asynchronous stream wants every receive posted before it is needed and every send left to run
beside the computation, with shapes that may change from micro-batch to micro-batch. So: `expect_*` posts receives,
`take_*` waits for them, `send_*` starts sends and returns.

A message is a header of three numbers, then the tensors as bytes. What the tensors are is described to the next stage
only where it is not what the message before was; the sender keeps what it announced and compares:

    the same as announced    header (DATA, 0, weight)           tensors
    something else           header (DATA, length, weight)      description of that length, tensors
    the stream has ended     header (END, 0, count)
    this stage has failed    header (ABORT, length, 0)          the reason, as text

After two messages alike, the receiver posts the receives of the next one's tensors before its header is there, so that
they arrive beside the computation. Should that message be another after all, the sender first fills these receives with
bytes that nobody reads. A gradient has the shape of what was sent down, hence never a description.

Forward and backward traffic have tags of their own. NCCL knows no tags and runs what one communicator is given in one
order: a stage's send would wait for the receive it posted ahead, its neighbour's for that, and so in a circle. There
each direction has a group of its own, and so have even and odd links, hence a rank uses a communicator for one link in
one direction only; headers go over gloo, beside. Their communicators are there before the first message: NCCL would
make one at a receive that is posted ahead, and hold the host there until the other stage sends, which may wait for more
from this one. (NCCL has not been run with more than one device.)
"""

import ctypes
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import new_group
from fourfold.parallel.pipeline.failure import PipelineError, leave_note, read_note
from fourfold.parallel.pipeline.values import Structure, TensorSpec, resolved

_DATA, _END, _ABORT = 0, 1, 2
_TAGS = {"down": (7001, 7002), "up": (7003, 7004)}  # of headers (and descriptions) and of tensors
_GRACE_S = 0.5

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]  # of even and odd links, a link being numbered as its first stage
Description = tuple[list[TensorSpec], Structure]


@dataclass(slots=True, eq=False)
class _Incoming:
    """A receive that is posted: the header, and the tensors where they could be foreseen."""

    header: Tensor
    work: Any
    tensors: list[Tensor] | None = None
    works: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class _Announced:
    """What both ends of a link know of its messages."""

    description: Description | None = None
    text: bytes = b""  # the description as it was sent; 1, 1.0 and True are told apart in it
    repeated: bool = False  # the last two were alike


class PipeLinks:
    """The links of one stage. One receive may be posted on each incoming link at a time.

    Args:
        group: one rank a stage, in order.
        device: where received tensors live.
        timeout_s: how long a receive may wait for a stage that is alive but silent; None: the group's timeout. Under
            NCCL only headers are waited for on the host: with a limit NCCL would let the host wait for tensors too,
            which follow their header, and its own watchdog ends a process whose tensors do not come.

    Attributes:
        device: where received tensors live.
        control_group: for small tensors on the host.
        idle_s: time spent waiting for messages, so far.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float | None = None) -> None:
        self.stage = dist.get_rank(group)
        self.num_stages = dist.get_world_size(group)
        self.idle_s = 0.0
        self.device = device
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._ranks = dist.get_process_group_ranks(group)
        self._down: Groups = (group, group)
        self._up: Groups = (group, group)
        self.control_group = group
        self._tensors_on_host = not has_nccl(group)
        if self.num_stages > 1 and not self._tensors_on_host:
            made = [new_group(self._ranks) for _ in range(4)]
            self._down, self._up = (made[0], made[1]), (made[2], made[3])
            self.control_group = new_group(self._ranks, "gloo")
        self._sends: deque[tuple[Any, Tensor, str]] = deque()
        self._known: dict[tuple[str, str], _Announced] = {}  # by purpose ("train", "evaluate") and direction
        self._activation: _Incoming | None = None
        self._gradient: _Incoming | None = None
        self._receives: list[_Incoming] = []  # posted and not yet taken

    def expect_activation(self, purpose: str) -> None:
        """Post the receive of the next activation from the stage before, or of the end of its stream."""
        known = self._known.setdefault((purpose, "in"), _Announced())
        self._activation = self._expect(self.stage - 1, "down")
        if known.repeated and known.description is not None:
            self._post_tensors(self._activation, known.description[0], self.stage - 1, "down")

    def take_activation(self, purpose: str, micro_batch: int) -> tuple[list[Tensor], Description]:
        """Wait for the activation that was expected: its tensors, and what they are.

        Raises:
            ValueError: the stream of the stage before has ended.
        """
        assert self._activation is not None
        incoming, self._activation = self._activation, None
        known = self._known[purpose, "in"]
        what = f"the activation of micro-batch {micro_batch}"
        kind, length, count = self._header(incoming, self.stage - 1, "down", what)
        if kind == _END:
            raise ValueError(
                f"stage {self.stage - 1}'s stream ended after {int(count)} micro-batches, but stage {self.stage}'s has "
                "more: give every stage a stream of the same length"
            )
        if length:
            # Something else than announced: what was foreseen is discarded, and the description comes first.
            self._wait_all(incoming.works, self.stage - 1, what)
            known.description = pickle.loads(self._bytes(length, self.stage - 1, "down", what))
            known.repeated, incoming.tensors, incoming.works = False, None, []
        else:
            known.repeated = True
        assert known.description is not None
        if incoming.tensors is None:
            self._post_tensors(incoming, known.description[0], self.stage - 1, "down")
        self._wait_all(incoming.works, self.stage - 1, what)
        self._receives.remove(incoming)
        return incoming.tensors or [], known.description

    def send_activation(
        self, purpose: str, tensors: Sequence[Tensor], description: Description, micro_batch: int
    ) -> None:
        """Start sending to the stage after; the tensors must not be written to any more."""
        known = self._known.setdefault((purpose, "out"), _Announced())
        what = f"the activation of micro-batch {micro_batch}"
        to = self.stage + 1
        text = pickle.dumps(description)
        if known.text == text:
            known.repeated = True
            self._send_header((_DATA, 0, 0.0), to, "down", what)
        else:
            self._send_header((_DATA, len(text), 0.0), to, "down", what)
            if known.repeated and known.description is not None:
                # The receiver has posted receives for tensors as before: fill them.
                for spec in known.description[0]:
                    self._send_tensor(torch.empty(spec.shape, dtype=spec.dtype, device=self.device), to, "down", what)
            self._send_bytes(text, to, "down", what)
            known.description, known.text, known.repeated = description, text, False
        for tensor in tensors:
            self._send_tensor(tensor, to, "down", what)

    def send_end(self, count: int) -> None:
        """Tell the stage after that this stage's stream has ended, after `count` micro-batches."""
        self._send_header((_END, 0, float(count)), self.stage + 1, "down", "the end of the stream")

    def take_end(self, purpose: str, count: int) -> None:
        """Wait for the end of the stream of the stage before, whose receive is posted.

        Args:
            count: micro-batches of this stage's own stream.
        Raises:
            ValueError: another activation comes instead.
        """
        if self._activation is None:
            self._activation = self._expect(self.stage - 1, "down")
        incoming, self._activation = self._activation, None
        kind, _, _ = self._header(incoming, self.stage - 1, "down", "the end of the stream")
        if kind == _END:
            self._receives.remove(incoming)
        else:
            raise ValueError(
                f"stage {self.stage}'s stream ended after {count} micro-batches, but stage {self.stage - 1}'s goes on: "
                "give every stage a stream of the same length"
            )

    def confirm(self) -> None:
        """After a stream: wait until the stage after has taken all of it, or says why not."""
        if self.stage > 0:
            self._send_header((_END, 0, 0.0), self.stage - 1, "up", "the end of the stream")
        if self.stage < self.num_stages - 1:
            incoming = self._expect(self.stage + 1, "up")
            self._header(incoming, self.stage + 1, "up", "the end of the stream")
            self._receives.remove(incoming)

    def expect_gradient(self, like: Sequence[TensorSpec]) -> None:
        """Post the receive of the next gradient from the stage after, which has the shape of what was sent to it."""
        self._gradient = self._expect(self.stage + 1, "up")
        self._post_tensors(self._gradient, like, self.stage + 1, "up")

    def take_gradient(self, micro_batch: int) -> tuple[list[Tensor], float]:
        """Wait for the gradient that was expected; and how much its micro-batch counts."""
        assert self._gradient is not None
        incoming, self._gradient = self._gradient, None
        what = f"the gradient of micro-batch {micro_batch}"
        _, _, weight = self._header(incoming, self.stage + 1, "up", what)
        self._wait_all(incoming.works, self.stage + 1, what)
        self._receives.remove(incoming)
        return incoming.tensors or [], weight

    def send_gradient(self, tensors: Sequence[Tensor], weight: float, micro_batch: int) -> None:
        """Start sending to the stage before; the tensors must not be written to any more."""
        what = f"the gradient of micro-batch {micro_batch}"
        self._send_header((_DATA, 0, weight), self.stage - 1, "up", what)
        for tensor in tensors:
            self._send_tensor(tensor, self.stage - 1, "up", what)

    def abort(self, reason: str) -> None:
        """Tell all ranks which stage failed and why, and end the neighbours' waiting; the links are of no use after."""
        text = f"stage {self.stage} (rank {self._ranks[self.stage]}) {reason}"
        leave_note(text)
        data = text.encode()
        for stage, direction in ((self.stage + 1, "down"), (self.stage - 1, "up")):
            if 0 <= stage < self.num_stages:
                try:
                    self._send_header((_ABORT, len(data), 0.0), stage, direction, "its failure")
                    self._send_bytes(data, stage, direction, "its failure")
                except PipelineError:  # that neighbour is gone as well
                    continue
        _abandon(self._sends, self._receives)

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

    def _expect(self, stage: int, direction: str) -> _Incoming:
        header = torch.empty(3, dtype=torch.float64, device="cpu")  # whatever torch.set_default_device says
        incoming = _Incoming(header, self._post(dist.irecv, header, stage, (direction, "header"), "a message"))
        self._receives.append(incoming)
        return incoming

    def _header(self, incoming: _Incoming, stage: int, direction: str, what: str) -> tuple[int, int, float]:
        """Wait for a header. Raises PipelineError where it says that its sender has failed."""
        self._wait(incoming.work, stage, what)
        kind, length, number = incoming.header.tolist()
        if kind == _ABORT:
            text = self._bytes(int(length), stage, direction, what).decode()
            # Whose failure it is should be the first to show its own error.
            time.sleep(_GRACE_S)
            raise PipelineError(f"stage {self.stage} stops at {what}: {text}")
        return int(kind), int(length), number

    def _post_tensors(self, incoming: _Incoming, specs: Sequence[TensorSpec], stage: int, direction: str) -> None:
        incoming.tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
        incoming.works = [
            self._post(dist.irecv, _as_bytes(tensor), stage, (direction, "tensor"), "a message")
            for tensor in incoming.tensors
            if tensor.numel()
        ]

    def _bytes(self, length: int, stage: int, direction: str, what: str) -> bytes:
        text = torch.empty(length, dtype=torch.uint8, device="cpu")
        self._wait(self._post(dist.irecv, text, stage, (direction, "header"), what), stage, what)
        return text.numpy().tobytes()

    def _send_header(self, numbers: tuple[int, int, float], stage: int, direction: str, what: str) -> None:
        self._send(torch.tensor(numbers, dtype=torch.float64, device="cpu"), stage, (direction, "header"), what)

    def _send_bytes(self, text: bytes, stage: int, direction: str, what: str) -> None:
        self._send(torch.frombuffer(bytearray(text), dtype=torch.uint8), stage, (direction, "header"), what)

    def _send_tensor(self, tensor: Tensor, stage: int, direction: str, what: str) -> None:
        if tensor.numel():
            self._send(_as_bytes(resolved(tensor)), stage, (direction, "tensor"), what)

    def _send(self, tensor: Tensor, stage: int, channel: tuple[str, str], what: str) -> None:
        while self._sends and self._sends[0][0].is_completed():
            work, _, sent = self._sends.popleft()
            self._wait(work, None, sent)
        self._sends.append((self._post(dist.isend, tensor, stage, channel, what), tensor, what))

    def _post(self, post: Callable[..., Any], tensor: Tensor, stage: int, channel: tuple[str, str], what: str) -> Any:
        direction, part = channel
        groups = self._down if direction == "down" else self._up
        group = self.control_group if part == "header" else groups[min(self.stage, stage) % 2]
        try:
            return post(tensor, self._ranks[stage], group=group, tag=_TAGS[direction][part == "tensor"])
        except RuntimeError as error:
            raise self._error(stage, what, error) from error

    def _wait_all(self, works: Sequence[Any], stage: int, what: str) -> None:
        for work in works:
            self._wait(work, stage, what, limited=self._tensors_on_host)

    def _wait(self, work: Any, stage: int | None, what: str, *, limited: bool = True) -> None:
        start = time.perf_counter()
        try:
            work.wait(self._timeout) if limited and self._timeout is not None else work.wait()
        except RuntimeError as error:
            raise self._error(stage, what, error) from error
        finally:
            self.idle_s += time.perf_counter() - start

    def _error(self, stage: int | None, what: str, error: RuntimeError) -> PipelineError:
        note = read_note()
        if note:
            return PipelineError(f"stage {self.stage} stops at {what}: {note}")
        if stage is None:
            return PipelineError(f"stage {self.stage} stops at {what}, because another stage is gone: {error}")
        who = f"stage {stage} (rank {self._ranks[stage]})"
        if "timed out" in str(error).lower():
            # Not noted for all: a stage that is silent may itself be waiting for another.
            return PipelineError(f"{who} sent nothing in time: stage {self.stage} stops at {what} ({error})")
        leave_note(f"{who} is gone, says stage {self.stage}")
        return PipelineError(f"{who} is gone: stage {self.stage} stops at {what} ({error})")


_ABANDONED: list[Any] = []
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_ABANDONED))  # also beyond the interpreter's end


def _abandon(*works: Any) -> None:
    """Keep messages that nobody will match until the process ends.

    Ranks that freed them were seen to hang; that gloo waits in their destructors is inferred, not shown.
    """
    _ABANDONED.extend(works)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8, which every backend sends whatever the dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8)


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
