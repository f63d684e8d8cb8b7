"""What goes with matrix products in fp8: a part of the table in decoder.limits.

Scaled products take dimensions in multiples of 16 (torch._scaled_mm). Here a layer that cannot have them is refused by
name, because a model of which some matrices quietly stay in bf16 is another one than was asked for; torchtitan skips
such matrices.
"""

from fourfold.parallel.decoder.choice import STREAM, ZERO_BUBBLE, Choice, Limit, drains
from fourfold.parallel.decoder.facts import DecoderFacts

MULTIPLE = 16
"""Of the rows, columns and tokens of a scaled product."""


def _sizes_divide(model: DecoderFacts, layout: Choice) -> object:
    cut = MULTIPLE * layout.tp
    heads, keys = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    shared = (heads % cut == 0) & (keys % cut == 0) & (model.ffn_size % cut == 0)
    return (layout.fp8 == 0) | (model.hidden_size % MULTIPLE == 0) & shared


FP8_LIMITS: tuple[Limit, ...] = (
    Limit(
        fields=("fp8", "checkpointing"),
        # StreamBP adds gradients of an nn.Linear in place by products of its own, which would be in bf16.
        allows=lambda model, layout: (layout.fp8 == 0) | (layout.checkpointing != STREAM),
        reason="fp8 with StreamBP",
        message="fp8 with checkpointing={layout.checkpointing_word!r}: StreamBP makes weight gradients by products of "
        "its own; choose checkpointing='full', or precision='bf16-mixed'",
    ),
    Limit(
        fields=("fp8", "schedule"),
        allows=lambda model, layout: (layout.fp8 == 0) | drains(layout.schedule),
        reason="fp8 in an asynchronous pipeline",
        message="fp8 with schedule={layout.schedule_word!r}: it was not compared in stages of late gradients; choose "
        "schedule='1f1b', or precision='bf16-mixed'",
    ),
    Limit(
        fields=("fp8", "schedule"),
        allows=lambda model, layout: (layout.fp8 == 0) | (layout.schedule != ZERO_BUBBLE),
        reason="fp8 with zero-bubble",
        message="fp8 with schedule={layout.schedule_word!r}: torchao makes both gradients of a matrix at once, and "
        "would make them twice; choose schedule='1f1b', or precision='bf16-mixed'",
    ),
    Limit(
        fields=("fp8", "tp"),
        allows=_sizes_divide,
        reason="fp8 with matrices that are no multiples of 16",
        message="fp8 with tp={layout.tp}: a rank's part of every matrix must be a multiple of 16 wide and high, but "
        "the hidden size is {model.hidden_size}, heads x head size {model.num_heads} x {model.head_size} and "
        "{model.num_kv_heads} x {model.head_size}, the feed-forward width {model.ffn_size}; choose a tp that leaves "
        "multiples of 16, or precision='bf16-mixed'",
    ),
    Limit(
        fields=("fp8", "cp", "micro_batch", "seq_len"),
        # They are what the product that is a weight's gradient sums over.
        allows=lambda model, layout: (layout.fp8 == 0) | (layout.micro_batch * layout.local_tokens % MULTIPLE == 0),
        reason="fp8 with micro-batches whose tokens are no multiple of 16",
        message="fp8 with micro_batch={layout.micro_batch} of {layout.local_tokens} tokens a cp rank: choose "
        "micro_batch and seq_len so that a rank's micro-batch has a multiple of 16 tokens, or precision='bf16-mixed'",
    ),
)

FP8_PACKED = Limit(
    fields=("fp8", "cp"),
    allows=lambda model, layout: (layout.fp8 == 0) | (layout.cp == 1),
    reason="packed rows with cp in fp8",
    message="packed rows with cp={layout.cp} in fp8: a ring's shares of them are of many lengths, and fp8 takes "
    "multiples of 16 tokens; choose cp=1, rows of one document, or precision='bf16-mixed'",
)
