"""What a layout may combine, and what this runtime can run of it: one table.

The search, layout files, `parallelize`, `pipeline_decoder` and the launcher all read it, so that what a plan ranks is
what trains. An entry is a predicate and the words of its refusal, which name the mend. Predicates use operators that
work on single values and on numpy columns alike: the same text judges one layout, and a million candidates at once.

torch has no such table: each of its parts refuses for itself, mostly after the processes have started. This file does
not import torch, because the planner must answer without it.

    SHAPES    what any software needs to cut a decoder: heads that tp divides, a layer a stage
    FORMS     what makes a layout one at all, whatever the model: a batch that divides, late stages that are not sharded
    RUNTIME   what fourfold's own runtime has: four families, no experts, no tied embeddings in asynchronous stages
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fourfold.parallel.decoder.choice import CHECKPOINTING as CHECKPOINTING
from fourfold.parallel.decoder.choice import DOUBLE_BUFFERED, FULL, NONE, STREAM, ZERO_BUBBLE
from fourfold.parallel.decoder.choice import EVERY_SCHEDULE as EVERY_SCHEDULE
from fourfold.parallel.decoder.choice import FP8 as FP8
from fourfold.parallel.decoder.choice import LOCKSTEP as LOCKSTEP
from fourfold.parallel.decoder.choice import PRECISIONS as PRECISIONS
from fourfold.parallel.decoder.choice import SCHEDULES as SCHEDULES
from fourfold.parallel.decoder.choice import SELECTIVE as SELECTIVE
from fourfold.parallel.decoder.choice import Choice as Choice
from fourfold.parallel.decoder.choice import Limit as Limit
from fourfold.parallel.decoder.choice import as_number as as_number
from fourfold.parallel.decoder.choice import drains as drains
from fourfold.parallel.decoder.choice import may_stream_head as may_stream_head
from fourfold.parallel.decoder.facts import LENGTH_DEPENDENT_ROPE
from fourfold.parallel.decoder.facts import DecoderFacts as DecoderFacts
from fourfold.parallel.decoder.facts import decoder_facts as decoder_facts
from fourfold.parallel.decoder.fp8_limits import FP8_LIMITS, FP8_PACKED

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of the decoders that `parallelize` cuts; a test compares each with one process."""


def _divides(axis: str, count: str, what: str) -> Limit:
    """tp divides so many of something."""
    number = f"{{model.{count}}}"
    return Limit(
        fields=(axis,),
        allows=lambda model, layout: getattr(model, count) % getattr(layout, axis) == 0,
        reason=f"{axis} does not divide {number} {what}",
        message=(
            f"{number} {what} cannot be shared by {axis}={{layout.{axis}}}: choose a {axis} that divides {number}"
        ),
    )


SHAPES: tuple[Limit, ...] = (
    _divides("tp", "num_heads", "attention heads"),
    _divides("tp", "num_kv_heads", "key-value heads"),
    _divides("tp", "ffn_size", "columns of the feed-forward width"),
    Limit(
        fields=("pp",),
        allows=lambda model, layout: layout.pp <= model.num_layers,
        reason="pp is more than {model.num_layers} layers",
        message="{model.num_layers} layers cannot fill {layout.stages} stages: "
        "choose at most {model.num_layers} stages",
    ),
    Limit(
        fields=("pp", "vp"),
        allows=lambda model, layout: layout.pp * layout.vp <= model.num_layers,
        reason="pp x vp is more than the layers",
        message="{model.num_layers} layers cannot fill {layout.stages} stages: "
        "choose at most {model.num_layers} stages",
    ),
    Limit(
        fields=("cp", "seq_len"),
        allows=lambda model, layout: layout.seq_len % layout.pieces == 0,
        reason="2 cp does not divide the sequence of {layout.seq_len}",
        message="seq_len={layout.seq_len} cannot be cut into {layout.pieces} pieces for cp={layout.cp}: "
        "choose a multiple of {layout.pieces}, or another cp",
    ),
    Limit(
        fields=("ep",),
        allows=lambda model, layout: (layout.ep == 1) | (model.num_experts % layout.ep == 0) & (model.num_experts > 0),
        reason="ep does not divide the experts",
        message="{model.num_experts} experts cannot be shared by ep={layout.ep}: choose an ep that divides them",
    ),
)

_BATCH = (
    "global_batch={layout.global_batch} is no multiple of dp={layout.dp} x micro_batch={layout.micro_batch}: "
    "change one of the three"
)

UNEVEN_CUT = Limit(
    fields=("pp", "vp", "embedding_counts_as", "head_counts_as"),
    allows=lambda model, layout: (
        (layout.embedding_counts_as + layout.head_counts_as == 0) | (layout.pp > 1) & (layout.vp == 1)
    ),
    reason="stages cut unevenly need pp of at least 2, no interleaving, and a layer each",
    message="embedding_counts_as={layout.embedding_counts_as}, head_counts_as={layout.head_counts_as} with "
    "pp={layout.pp}, vp={layout.vp}: stages are cut unevenly with pp of at least 2 and without interleaving; "
    "choose 0 for both, or such stages",
)


INTERLEAVING: tuple[Limit, ...] = (
    Limit(
        fields=("pp", "vp"),
        allows=lambda model, layout: (layout.vp == 1) | (layout.pp > 1),
        reason="interleaving needs pp of at least 2",
        message="vp={layout.vp} with pp={layout.pp}: interleaving gives a pipeline rank several runs of layers; "
        "choose pp of at least 2, or vp=1",
    ),
    Limit(
        fields=("dp", "pp", "micro_batch", "global_batch", "vp"),
        # Of a batch that is not known yet parallelize asks nothing: without rounds it runs breadth-first.
        allows=lambda model, layout: (layout.vp == 1) | (layout.num_micro_batches % layout.pp == 0),
        reason="interleaving needs micro-batches in multiples of pp",
        message="vp={layout.vp} with {layout.num_micro_batches} micro-batches a step: interleaved stages take them in "
        "rounds of pp={layout.pp}; choose a global_batch or micro_batch that gives a multiple, or vp=1",
    ),
)
"""Of any software that interleaves."""

WHOLE_VOCABULARY = _divides("tp", "vocab_size", "entries of the vocabulary")
"""Not among SHAPES: Megatron pads the vocabulary where tp does not divide it."""


def _whole_stage(name: str, plain: Any) -> Limit:
    """An asynchronous stage is a rank, or a group of tp or cp ranks, with all its weights, and dp replicas of it."""
    return Limit(
        fields=(name, "schedule"),
        allows=lambda model, layout: drains(layout.schedule) | (getattr(layout, name) == plain),
        reason=f"an asynchronous stage needs {name}={str(plain).lower()}",
        message=f"{name}={{layout.{name}}} with schedule={{layout.schedule_word!r}}: an asynchronous stage is cut over "
        f"tp or cp alone, and not sharded; choose {name}={str(plain).lower()}, or schedule='1f1b'",
    )


def _split_backward(name: str, allows: Callable[[Any], Any], needs: str, why: str) -> Limit:
    """What it takes to compute the gradients of a stage's weights after that of its input, apart from it."""
    shown = f"{{layout.{name}_word!r}}" if name == "checkpointing" else f"{{layout.{name}}}"
    return Limit(
        fields=(name, "schedule"),
        allows=lambda model, layout: (layout.schedule != ZERO_BUBBLE) | allows(getattr(layout, name)),
        reason=f"zero-bubble needs {needs}",
        message=f"{name}={shown} with schedule='zero-bubble': {why}; choose {needs}, or schedule='1f1b'",
    )


FORMS: tuple[Limit, ...] = (
    Limit(
        fields=("dp", "global_batch"),
        allows=lambda model, layout: layout.global_batch % layout.dp == 0,
        reason="dp does not divide the global batch {layout.global_batch}",
        message=_BATCH,
    ),
    Limit(
        fields=("dp", "micro_batch", "global_batch"),
        allows=lambda model, layout: layout.global_batch % (layout.dp * layout.micro_batch) == 0,
        reason="the micro-batch does not divide a replica's batch",
        message=_BATCH,
    ),
    UNEVEN_CUT,
    Limit(
        fields=("zero_stage", "sharded_accumulation"),
        allows=lambda model, layout: (layout.sharded_accumulation == 0) | (layout.zero_stage == 3),
        reason="gradients are sharded at every micro-batch with ZeRO 3",
        message="sharded_accumulation=true with zero_stage={layout.zero_stage}: gradients are sharded with ZeRO 3; "
        "choose zero_stage=3, or false",
    ),
    _whole_stage("vp", 1),
    _whole_stage("ep", 1),
    Limit(
        fields=("cp", "tp", "schedule"),
        allows=lambda model, c: drains(c.schedule) | (c.cp == 1) | (c.tp == 1),
        reason="asynchronous stages need cp=1 or tp=1",
        message="cp={layout.cp} and tp={layout.tp} with schedule={layout.schedule_word!r}: an asynchronous stage "
        "shares sequences or is cut, not both; choose cp=1 or tp=1, or schedule='1f1b'",
    ),
    Limit(
        fields=("zero_stage", "schedule"),
        allows=lambda model, layout: drains(layout.schedule) | (layout.zero_stage <= 1),
        reason="an asynchronous stage needs zero_stage of 0 or 1",
        message="zero_stage={layout.zero_stage} with schedule={layout.schedule_word!r}: replicas of an asynchronous "
        "stage share out optimizer states alone; choose zero_stage=1 or 0, or schedule='1f1b'",
    ),
    _whole_stage("offload", False),
    _whole_stage("checkpoint_every", 1),
    Limit(
        fields=("pp", "schedule"),
        allows=lambda model, layout: drains(layout.schedule) | (layout.pp > 1),
        reason="an asynchronous pipeline needs pp of at least 2",
        message="schedule={layout.schedule_word!r} is for a pipeline, but pp={layout.pp}: choose pp of at least 2, or "
        "'1f1b'",
    ),
    Limit(
        fields=("checkpointing", "schedule"),
        # What is kept would be of other weights than what a later backward recomputes around it; with double buffering
        # both read the same.
        allows=lambda model, layout: (
            drains(layout.schedule) | (layout.schedule == DOUBLE_BUFFERED) | (layout.checkpointing != SELECTIVE)
        ),
        reason="selective checkpointing in an asynchronous stage needs schedule=2bw",
        message="checkpointing={layout.checkpointing_word!r} with schedule={layout.schedule_word!r}: what is kept "
        "would be of other weights than what is recomputed around it; choose none or full, stream, or schedule='2bw'",
    ),
    _split_backward("vp", lambda vp: vp > 1, "vp of at least 2", "it is of ranks with several runs of layers"),
    _split_backward(
        "checkpointing",
        lambda checkpointing: checkpointing == NONE,
        "checkpointing='none'",
        "each layer would run again for its input's gradient and once more for each weight's, if it can more than once",
    ),
    _split_backward(
        "compile", lambda compiled: compiled == 0, "compile=false", "a compiled layer's backward is in one piece"
    ),
    Limit(
        fields=("tp", "zero_stage", "rotates", "schedule"),
        allows=lambda model, c: drains(c.schedule) | (c.tp == 1) | (c.zero_stage == 0) & (c.rotates == 0),
        reason="asynchronous stages cut over tp need zero_stage=0 and no rotate",
        message="tp={layout.tp} with schedule={layout.schedule_word!r}: ZeRO and basis rotation need whole matrices "
        "there; choose tp=1, or zero_stage=0 and a mitigation without rotate",
    ),
    Limit(
        fields=("dp", "pp", "micro_batch", "global_batch", "schedule"),
        allows=lambda model, layout: (layout.schedule != DOUBLE_BUFFERED) | (layout.num_micro_batches >= layout.pp),
        reason="2bw needs pp micro-batches a step",
        message="schedule='2bw' with {layout.num_micro_batches} micro-batches a step needs at least pp={layout.pp} of "
        "them for two versions of the weights: choose a larger global_batch or a smaller micro_batch",
    ),
)


def _absent(name: str, plain: Any, what: str) -> Limit:
    """An option that only other software has."""
    return Limit(
        fields=(name,),
        allows=lambda model, layout: getattr(layout, name) == plain,
        reason=name,
        message=f"{name}={{layout.{name}}}: fourfold's runtime has no {what}; choose {name}={str(plain).lower()}, or "
        "export the layout",
    )


RUNTIME: tuple[Limit, ...] = (
    Limit(
        allows=lambda model, layout: model.family in ("", *FAMILIES),
        reason="model_type {model.family!r} is not a family that fourfold's runtime cuts",
        message=f"model_type {{model.family!r}} is not supported by fourfold's runtime: use a causal language model of "
        f"{', '.join(FAMILIES)}",
    ),
    Limit(
        allows=lambda model, layout: model.attention_dropout == 0,
        reason="attention_dropout={model.attention_dropout}",
        message="attention_dropout={model.attention_dropout} is not supported: set it to 0.0",
    ),
    Limit(
        allows=lambda model, layout: model.rope_type not in LENGTH_DEPENDENT_ROPE,
        reason="rope_type {model.rope_type!r}",
        message="rope_type={model.rope_type!r} computes frequencies from the length a rank sees and is not supported: "
        "use 'default', 'linear', 'llama3' or 'yarn'",
    ),
    WHOLE_VOCABULARY,
    Limit(
        fields=("pp", "schedule"),
        # The two stages see a micro-batch at different times, so at no update is there a gradient of both.
        allows=lambda model, layout: (not model.tied_embeddings) | (layout.pp == 1) | drains(layout.schedule),
        reason="tied embeddings in a pipeline that never drains",
        message="tie_word_embeddings=true with pp={layout.pp} and schedule={layout.schedule_word!r}: the first and the "
        "last stage update one weight with gradients of different micro-batches; choose schedule='1f1b' (parallelize), "
        "use pp=1 or untie them (set tie_word_embeddings=False)",
    ),
    *INTERLEAVING,
    Limit(
        fields=("vp", "zero_stage"),
        # torch's schedule gathers the weights of whole stages, and lets go of their gradients at the end of a step.
        allows=lambda model, layout: (layout.vp == 1) | (layout.zero_stage <= 1),
        reason="interleaving with ZeRO 2 or 3",
        message="zero_stage={layout.zero_stage} with vp={layout.vp}: in a step of interleaved stages weights and "
        "gradients are whole; choose zero_stage=1 or 0, or vp=1",
    ),
    _absent("ep", 1, "expert parallelism"),
    _absent("cp_heads", 1, "exchange of heads among cp ranks"),
    Limit(
        fields=("tp", "sequence_parallel"),
        allows=lambda model, layout: (layout.sequence_parallel == 0) | (layout.tp > 1),
        reason="sequence parallelism needs tp of at least 2",
        message="sequence_parallel=true with tp={layout.tp}: it cuts what tp ranks repeat; choose tp of at least 2, or "
        "false",
    ),
    Limit(
        fields=("cp", "tp", "seq_len", "sequence_parallel"),
        allows=lambda model, layout: (layout.sequence_parallel == 0) | (layout.local_tokens % layout.tp == 0),
        reason="sequence parallelism: tp does not divide a cp rank's tokens",
        message="sequence_parallel=true with tp={layout.tp} and {layout.local_tokens} tokens a cp rank: "
        "choose a seq_len that cp x tp divides, or sequence_parallel=false",
    ),
    _absent("checkpoint_every", 1, "checkpointing of some layers only"),
    Limit(
        fields=("checkpointing", "offload"),
        allows=lambda model, layout: (layout.offload == 0) | (layout.checkpointing == STREAM),
        reason="offload",
        message="offload=true with checkpointing={layout.checkpointing_word!r}: fourfold's runtime moves the inputs of "
        "layers that stream; choose checkpointing='stream', or offload=false",
    ),
    Limit(
        fields=("pp", "sharded_accumulation"),
        # torch's pipeline stages reduce gradients at the last backward of a step only.
        allows=lambda model, layout: (layout.sharded_accumulation == 0) | (layout.pp == 1),
        reason="gradients are sharded at every micro-batch with pp=1",
        message="sharded_accumulation=true with pp={layout.pp}: a pipeline stage reduces gradients once a step; "
        "choose pp=1, or false",
    ),
    Limit(
        fields=("tp", "checkpointing"),
        allows=lambda model, layout: (layout.checkpointing != STREAM) | (layout.tp == 1),
        reason="checkpointing=stream with tp",
        message="checkpointing='stream' with tp={layout.tp}: chunks of cut matrices are not supported; use tp=1 and "
        "more cp or zero_stage=3, or checkpointing='full'",
    ),
    Limit(
        fields=("pp", "zero_stage"),
        # As for sharded_accumulation: between the micro-batches of a stage gradients are whole, which is ZeRO 1.
        allows=lambda model, layout: (layout.zero_stage != 2) | (layout.pp == 1),
        reason="zero_stage=2 needs pp=1",
        message="zero_stage=2 with pp={layout.pp}: a pipeline stage reduces gradients once a step, so that they are "
        "whole until then; choose zero_stage=1 or 3, or pp=1",
    ),
    Limit(
        fields=("tp",),
        allows=lambda model, layout: (not model.adapters) | (layout.tp == 1),
        reason="adapters with tp",
        message="adapters of peft with tp={layout.tp}: they are not cut with their matrices; use tp=1, or merge them "
        "first (merge_and_unload())",
    ),
    Limit(
        fields=("checkpointing", "compile"),
        allows=lambda model, layout: (
            (layout.compile == 0) | (layout.checkpointing == NONE) | (layout.checkpointing == FULL)
        ),
        reason="compile with selective checkpointing or StreamBP",
        message="compile=true with checkpointing={layout.checkpointing_word!r}: the compiler itself chooses what of a "
        "layer to keep, and StreamBP runs layers in pieces; choose checkpointing='none' or 'full', or compile=false",
    ),
    *FP8_LIMITS,
)

PACKED: tuple[Limit, ...] = (
    Limit(
        fields=("cp", "pp", "schedule"),
        allows=lambda model, layout: (layout.cp == 1) | (layout.pp == 1) | (drains(layout.schedule) == 0),
        reason="packed rows with cp and pp",
        message="packed rows with cp={layout.cp} and pp={layout.pp}: a ring's shares of them are of many lengths, and "
        "a pipeline's buffers of one; choose cp=1 or pp=1, or rows of one document",
    ),
    Limit(
        fields=("cp", "sequence_parallel"),
        allows=lambda model, layout: (layout.cp == 1) | (layout.sequence_parallel == 0),
        reason="packed rows with cp and sequence parallelism",
        message="packed rows with cp={layout.cp} and sequence_parallel=true: a ring's shares of them are of many "
        "lengths, which tp={layout.tp} does not always divide; choose cp=1 or sequence_parallel=false, or rows of one "
        "document",
    ),
    Limit(
        fields=("checkpointing", "schedule", "cp"),
        allows=lambda model, layout: drains(layout.schedule) | (layout.checkpointing != STREAM) | (layout.cp > 1),
        reason="packed rows in an asynchronous stage that streams without a ring",
        message="packed rows with checkpointing='stream' and schedule={layout.schedule_word!r}: there attention takes "
        "no documents but around a ring; choose checkpointing='none' or 'full', cp of at least 2, or rows of one "
        "document",
    ),
    FP8_PACKED,
)
"""What a layout cannot be whose rows hold several documents."""


def broken(limits: Iterable[Limit], model: DecoderFacts, layout: Choice) -> Iterator[Limit]:
    """The limits that a single layout breaks; one that reads a value which is not known yet is passed over."""
    for limit in limits:
        if all(getattr(layout, name) is not None for name in limit.fields) and not limit.allows(model, layout):
            yield limit


def refuse_decoder(model: DecoderFacts, layout: Choice) -> None:
    """Raise ValueError for what `parallelize` or `pipeline_decoder` cannot run, with the words of the first limit."""
    refuse((*FORMS, *RUNTIME, *SHAPES), model, layout)


def refuse(limits: Iterable[Limit], model: DecoderFacts, layout: Choice) -> None:
    """Raise ValueError with the words of the first limit that a single layout breaks."""
    for limit in broken(limits, model, layout):
        raise ValueError(limit.told(model, layout))
