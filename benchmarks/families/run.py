"""Which model family streams, goes around the ring, packed, with a router loss, with LoRA: exact, or refused by name.

    PYTHONPATH=src python -m benchmarks.families.run      # two gloo ranks, minutes; rewrites docs/families.md

A cell is the worst relative L2 error of any parameter's gradient, fp32, against plain backpropagation of one process,
or the first words of the refusal. Tiny models; chunks and shards that do not divide.
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn

from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.testing.compare import gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import FAMILIES, SMALL, batch, tiny

EXACT = 2e-6  # the tests' bound: a few roundings of fp32 over sums of some hundred terms
CHUNKS = {"chunk_size": 6, "mlp_chunk": 4, "logits_chunk": 5}
LENGTHS = ((9, 1, 14), (20, 4))  # of the documents in two rows of 24 tokens
# What a column turns on.
COLUMNS: dict[str, set[str]] = {
    "stream": {"stream"},
    "ring": {"ring"},
    "both": {"stream", "ring"},
    "both, packed documents": {"stream", "ring", "packed"},
    "both, router loss": {"stream", "ring", "router"},
    "both, LoRA": {"stream", "ring", "lora"},
}
# Families that the columns refuse, for the reason that each gives.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "stablelm": ("StableLm", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}


def make(family: str) -> nn.Module:
    """The same weights at every call."""
    if family in FAMILIES:
        return tiny(family)
    name, changes = OTHERS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.train()


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters on every projection, small but not zero, the same at every call; peft freezes the rest."""
    import peft

    torch.manual_seed(1)
    adapted: nn.Module = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
    return adapted


def inputs(packed: bool) -> dict[str, Tensor]:
    """Two rows of 24 tokens; packed, no document's first token is a target, as collators have it."""
    ids = batch(2, 24)
    if not packed:
        return {"input_ids": ids, "labels": ids}
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def worst_error(family: str, ways: set[str]) -> float:
    """Of one column, on the ranks of the world, which all call.

    Raises:
        ValueError: what the family refuses.
    """
    whole, extra = inputs("packed" in ways), {"output_router_logits": True} if "router" in ways else {}
    plain, model = make(family), make(family)
    if "lora" in ways:
        plain, model = with_lora(plain), with_lora(model)
    group = dist.group.WORLD
    if "ring" in ways:
        use_ring_attention(model.get_base_model() if "lora" in ways else model, group)
    if "stream" in ways:
        stream_backprop(model, **CHUNKS)
    arguments = shard_batch(whole, group) if "ring" in ways else whole
    found = gradients(model, model(**arguments, **extra).loss)
    if "ring" in ways:
        for gradient in found.values():
            dist.all_reduce(gradient, group=group)
    # With a cache, which is the default, transformers does not look for documents.
    expected = gradients(plain, plain(**whole, use_cache=False, **extra).loss)
    return max(gradient_errors(found, expected).values())


def cell(family: str, ways: set[str]) -> str:
    if "router" in ways and not hasattr(make(family), "router_aux_loss_coef"):
        return "-"
    try:
        error = worst_error(family, ways)
    except ValueError as refusal:
        return "refused: " + str(refusal).replace("\n", " ").replace("|", "/")
    return f"{error:.0e}" if error <= EXACT else f"**differs: {error:.0e}**"


def table(note: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Rows of the table, and the refusals that it numbers."""
    rows, reasons = [], []
    for family in (*FAMILIES, *OTHERS):
        cells = []
        for ways in COLUMNS.values():
            said = cell(family, ways)
            if said.startswith("refused: "):
                reason = said.removeprefix("refused: ")
                if reason not in reasons:
                    reasons.append(reason)
                said = f"refused ({reasons.index(reason) + 1})"
            cells.append(said)
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
        note(rows[-1])
    return rows, reasons


INTRODUCTION = f"""# Model families

What was compared with plain backpropagation of one process, on two gloo ranks, in fp32. A figure is the worst relative
L2 error of any parameter's gradient (bound {EXACT:g}), a number in brackets is that of the refusal below, and a dash
stands where a family has no such thing. `python -m benchmarks.families.run` prints it and rewrites this file.

The families that `parallelize` takes are in `parallel/decoder/limits.py`, those that the planner reads in
`layouts/inputs/families.py`.
"""


def document(rows: list[str], reasons: list[str]) -> str:
    """docs/families.md."""
    head = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    refusals = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([INTRODUCTION, *head, *rows, "", "Refusals:", "", *refusals, ""])


def _rank(rank: int, rendezvous: str, out: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows, reasons = table(lambda row: print(row, flush=True) if rank == 0 else None)
    if rank == 0:
        out.write_text(document(rows, reasons))
        print("\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "families.md")
    arguments = parser.parse_args()
    rendezvous = os.path.join(tempfile.mkdtemp(), "rendezvous")
    mp.spawn(_rank, (rendezvous, arguments.out), nprocs=2)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
