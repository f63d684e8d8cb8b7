"""A layout as the table of limits reads it: words as numbers, each field one value or a numpy column; without torch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fourfold.parallel.decoder.facts import DecoderFacts

CHECKPOINTING = ("none", "selective", "full", "stream")
NONE, SELECTIVE, FULL, STREAM = range(len(CHECKPOINTING))
SCHEDULES = ("1f1b", "lockstep", "1f1b-async", "2bw")
"""Of a pipeline, by their names in parallel.pipeline.schedule; the first drains at every step, the others never."""
EVERY_SCHEDULE = (*SCHEDULES, "zero-bubble")
"""And that of ranks with several runs of layers: it drains, and computes weight gradients while it would idle."""
DRAINED, LOCKSTEP, ONE_F_ONE_B, DOUBLE_BUFFERED, ZERO_BUBBLE = range(len(EVERY_SCHEDULE))

PRECISIONS = ("fp32", "bf16-mixed", "bf16", "fp64", "fp8", "fp8-emulated")
"""Dtypes of weights and of matrix products; decoder.precision has their meanings."""
FP8 = PRECISIONS[-2:]
"""Those whose products in layers are of fp8 factors."""


def drains(schedule: Any) -> Any:
    """Whether a pipeline drains before every update, so that no gradient is late.

    Args:
        schedule: an index of EVERY_SCHEDULE, or a column of them.
    """
    return (schedule == DRAINED) | (schedule == ZERO_BUBBLE)


def may_stream_head(tp: Any, schedule: Any) -> Any:
    """Whether head and loss may be computed some tokens at a time where layers do not stream; of columns, elementwise.

    Not where tp cuts the head, nor where a backward is split in two or comes late: such a loss has one that runs once.
    """
    return (tp == 1) & (schedule == DRAINED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout as the predicates read it: every field one value, or all those that vary a numpy column.

    `checkpointing` and `schedule` are indices of their words, `rotates` is whether a mitigation of late gradients turns
    whole matrices (Mitigation.rotate_every), `fp8` whether the precision is one of FP8. None is a value that is not
    known yet.
    """

    dp: Any = 1
    pp: Any = 1
    cp: Any = 1
    tp: Any = 1
    micro_batch: Any = 1
    checkpointing: Any = NONE
    zero_stage: Any = 0
    global_batch: int | None = None
    seq_len: int | None = None
    vp: Any = 1
    ep: Any = 1
    cp_heads: Any = 1
    sequence_parallel: Any = False
    checkpoint_every: Any = 1
    stream_chunks: Any = 1
    offload: Any = False
    embedding_counts_as: Any = 0
    head_counts_as: Any = 0
    schedule: Any = DRAINED
    sharded_accumulation: Any = False
    compile: Any = False
    rotates: Any = False
    fp8: Any = False

    @classmethod
    def of(cls, layout: Any) -> "Choice":
        """The choice of anything that has these fields, with words for `checkpointing` and `schedule`."""
        return cls(**{field.name: as_number(field.name, getattr(layout, field.name)) for field in fields(cls)})

    @property
    def num_micro_batches(self) -> Any:
        """Of one replica in a step."""
        assert self.global_batch is not None
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def local_tokens(self) -> Any:
        """Of a sequence, on one cp rank."""
        return self.seq_len // self.cp

    @property
    def pieces(self) -> Any:
        """Into which cp cuts the sequence: two a rank (zigzag), or the whole."""
        return (self.cp == 1) + 2 * self.cp * (self.cp > 1)

    @property
    def checkpointing_word(self) -> str:
        return CHECKPOINTING[self.checkpointing]

    @property
    def schedule_word(self) -> str:
        return EVERY_SCHEDULE[self.schedule]

    @property
    def stages(self) -> str:
        """pp=8, or pp=8 x vp=2."""
        return f"pp={self.pp}" + (f" x vp={self.vp}" if self.vp > 1 else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """One thing that cannot be.

    Attributes:
        fields: of the layout, that the predicate reads; none where it is about the model alone.
        allows: (model, layout) -> whether it can be: a bool, or a column of them.
        reason: the same in a few words, under which a plan counts what it ruled out. `{model.num_heads}` and the like
            are filled in, and of the layout what is one for all: `{layout.global_batch}`, `{layout.seq_len}`.
        message: the refusal of a single layout, with its values and the mend.
    """

    fields: tuple[str, ...] = ()
    allows: Callable[[DecoderFacts, Choice], Any]
    reason: str
    message: str

    def counted_as(self, model: DecoderFacts, layout: Choice) -> str:
        """The reason, filled in."""
        return self.reason.format(model=model, layout=layout)

    def told(self, model: DecoderFacts, layout: Choice) -> str:
        """The message, filled in."""
        return self.message.format(model=model, layout=layout)


def as_number(name: str, value: Any) -> Any:
    """A layout field's value as a Choice holds it: words by their index. Raises ValueError for a word that is none."""
    words = {"checkpointing": CHECKPOINTING, "schedule": EVERY_SCHEDULE}.get(name)
    if words is None:
        return value
    if value not in words:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(words)}")
    return words.index(value)
