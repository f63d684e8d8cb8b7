"""Reads a layout back from its printed name: "dp64 tp2 mb1 sp z1 full" and the like."""

import re
from typing import Any

from fourfold.layouts.inputs.layout import CHECKPOINTING, EVERY_SCHEDULE, PRECISIONS, Layout
from fourfold.layouts.inputs.reading import shown

_NUMBERS = {
    "dp": "dp", "pp": "pp", "cp": "cp", "tp": "tp", "mb": "micro_batch", "vp": "vp", "ep": "ep", "heads": "cp_heads",
    "z": "zero_stage",
}  # fmt: skip
_FLAGS = {"sp": "sequence_parallel", "offload": "offload", "shardacc": "sharded_accumulation"}


def parse_layout(words: str, *, num_devices: int, global_batch: int, seq_len: int) -> Layout:
    """A layout from its name; dp may be left out, and is then what the other axes leave.

    Raises:
        ValueError: a word that no layout has or that states a field again, or axes whose product is not `num_devices`.
    """
    fields: dict[str, Any] = {}
    for word in words.split():
        stated = _stated(word)
        if not stated:
            known = [
                *(f"{name}N" for name in _NUMBERS), "lessN+N", *_FLAGS, *CHECKPOINTING, *EVERY_SCHEDULE, *PRECISIONS,
                "compile", "nocompile",
            ]  # fmt: skip
            raise ValueError(f"layout {shown(words)}: {shown(word)} is none of {', '.join(known)}")
        twice = next((name for name in stated if name in fields), None)
        if twice is not None:
            raise ValueError(
                f"layout {shown(words)}: {shown(word)} states {twice} a second time: leave one of the two out"
            )
        fields |= stated
    rest = fields.get("pp", 1) * fields.get("cp", 1) * fields.get("tp", 1)
    if "dp" not in fields and rest and num_devices % rest == 0:
        fields["dp"] = num_devices // rest
    if fields.get("dp", 1) * rest != num_devices:
        raise ValueError(
            f"layout {shown(words)}: its axes make {fields.get('dp', 1) * rest} ranks, but there are {num_devices} "
            "devices"
        )
    return Layout(global_batch=global_batch, seq_len=seq_len, **fields)


def _stated(word: str) -> dict[str, Any]:
    """The fields that one word of a layout's name states; none where no layout has such a word."""
    number = re.fullmatch(r"([a-z]+)([0-9]{1,12})", word)
    checkpointing = re.fullmatch(r"none|(selective|full|stream)(/[0-9]{1,12})?|stream(/[0-9]{1,12})?x[0-9]{1,12}", word)
    cut = re.fullmatch(r"less([0-9]{1,12})\+([0-9]{1,12})", word)
    if word in _FLAGS:
        return {_FLAGS[word]: True}
    if word in ("compile", "nocompile"):
        return {"compile": word == "compile"}
    if word in PRECISIONS:
        return {"precision": word}
    if word.split("/")[0] in EVERY_SCHEDULE:
        schedule, slash, mitigation = word.partition("/")
        return {"schedule": schedule} | ({"mitigation": mitigation} if slash else {})
    if checkpointing:
        every, chunks = re.search(r"/([0-9]+)", word), re.search(r"x([0-9]+)", word)
        return {
            "checkpointing": re.split(r"[/x][0-9]", word)[0], "checkpoint_every": int(every[1]) if every else 1,
            "stream_chunks": int(chunks[1]) if chunks else 1,
        }  # fmt: skip
    if cut:
        return {"embedding_counts_as": int(cut[1]), "head_counts_as": int(cut[2])}
    if number and number[1] in _NUMBERS:
        return {_NUMBERS[number[1]]: int(number[2])}
    return {}
