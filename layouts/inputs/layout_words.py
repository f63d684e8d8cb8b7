"""Reads a layout back from its printed name: "dp64 tp2 mb1 sp z1 full" and the like."""

import re
from typing import Any

from fourfold.layouts.inputs.layout import CHECKPOINTING, PRECISIONS, SCHEDULES, Layout

_NUMBERS = {
    "dp": "dp", "pp": "pp", "cp": "cp", "tp": "tp", "mb": "micro_batch", "vp": "vp", "ep": "ep", "heads": "cp_heads",
    "z": "zero_stage",
}  # fmt: skip
_FLAGS = {"sp": "sequence_parallel", "offload": "offload", "shardacc": "sharded_accumulation"}


def parse_layout(words: str, *, num_devices: int, global_batch: int, seq_len: int) -> Layout:
    """A layout from its name; dp may be left out, and is then what the other axes leave.

    Raises:
        ValueError: a word that no layout has, or axes whose product is not `num_devices`.
    """
    fields: dict[str, Any] = {}
    for word in words.split():
        number = re.fullmatch(r"([a-z]+)(\d{1,12})", word)
        checkpointing = re.fullmatch(r"(none|selective|full|stream)(?:/(\d{1,12}))?(?:x(\d{1,12}))?", word)
        cut = re.fullmatch(r"less(\d{1,12})\+(\d{1,12})", word)
        if word in _FLAGS:
            fields[_FLAGS[word]] = True
        elif word in ("compile", "nocompile"):
            fields["compile"] = word == "compile"
        elif word in PRECISIONS:
            fields["precision"] = word
        elif word.split("/")[0] in SCHEDULES:
            fields["schedule"], _, mitigation = word.partition("/")
            fields |= {"mitigation": mitigation} if mitigation else {}
        elif checkpointing:
            fields["checkpointing"] = checkpointing[1]
            fields["checkpoint_every"] = int(checkpointing[2] or 1)
            fields["stream_chunks"] = int(checkpointing[3] or 1)
        elif cut:
            fields |= {"embedding_counts_as": int(cut[1]), "head_counts_as": int(cut[2])}
        elif number and number[1] in _NUMBERS:
            fields[_NUMBERS[number[1]]] = int(number[2])
        else:
            known = [
                *(f"{name}N" for name in _NUMBERS), "lessN+N", *_FLAGS, *CHECKPOINTING, *SCHEDULES, *PRECISIONS,
                "compile", "nocompile",
            ]  # fmt: skip
            raise ValueError(f"layout {words!r}: {word!r} is none of {', '.join(known)}")
    rest = fields.get("pp", 1) * fields.get("cp", 1) * fields.get("tp", 1)
    if "dp" not in fields and rest and num_devices % rest == 0:
        fields["dp"] = num_devices // rest
    if fields.get("dp", 1) * rest != num_devices:
        raise ValueError(
            f"layout {words!r}: its axes make {fields.get('dp', 1) * rest} ranks, but there are {num_devices} devices"
        )
    return Layout(global_batch=global_batch, seq_len=seq_len, **fields)
