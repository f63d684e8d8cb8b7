"""Which model family streams, goes around the ring, packed, with a router loss, with LoRA: exact, or refused by name.

    PYTHONPATH=src python -m benchmarks.families.run      # two gloo ranks, minutes; rewrites docs/families.md

A cell is the worst relative L2 error of any parameter's gradient in fp32 from fp64, ours and plain backpropagation's of
one process, or the number of a refusal. Tiny models; chunks and shards that do not divide.
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.testing.compare import gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import FAMILIES, MORE_FAMILIES, SMALL, batch, tiny

# Ours is exact where it is not further from fp64 than MORE times plain fp32's own error and FLOOR: other orders of sums
# of some hundred terms are a few roundings apart. A parameter of one number (apertus has some) has one rounding, and
# not a norm of many: by chance alone two orders of a sum that nearly cancels differ by more.
MORE, MORE_OF_ONE_NUMBER, FLOOR = 1.5, 4.0, 2e-6
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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Beside those that stream: families that the ring alone takes, and some that nothing takes.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vaultgemma, soft caps": ("VaultGemma", {"sliding_window": 7, "head_dim": 8, "attn_logit_softcapping": 2.0}),
    "phimoe": ("Phimoe", {**EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}


def make(family: str) -> nn.Module:
    """The same weights at every call."""
    if family not in OTHERS:
        return tiny(family)
    name, changes = OTHERS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
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


class WithoutRounding(TorchFunctionMode):
    """Within it, what a model's code casts to fp32 (norms, routers, rotary angles) is cast to fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        exact = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*exact, **named)


def documents(whole: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], float]]:
    """Every document of packed rows alone, and its targets' part of all targets; those without targets have none."""
    parts = []
    for row, lengths in enumerate(LENGTHS):
        for ids in whole["input_ids"][row].split(lengths):
            parts.append(({"input_ids": ids[None], "labels": ids[None]}, len(ids) - 1))
    targets = sum(count for _, count in parts)
    return [(part, count / targets) for part, count in parts if count]


@cache
def truth(family: str, kinds: frozenset[str], precision: torch.dtype) -> dict[str, Tensor]:
    """Gradients of plain backpropagation of one process, by name; packed documents are run one by one.

    Args:
        kinds: those of "packed", "router" and "lora" that are on.
    """
    model, extra = make(family), {"output_router_logits": True} if "router" in kinds else {}
    if precision == torch.float64:  # in which grouped products of experts do not exist
        model.set_experts_implementation("eager")  # type: ignore[operator]
    model = (with_lora(model) if "lora" in kinds else model).to(precision)
    whole = inputs("packed" in kinds)
    parts = documents(whole) if "packed" in kinds else [(whole, 1.0)]
    sums: dict[str, Tensor] = {}
    for part, weight in parts:
        if precision == torch.float64:
            with WithoutRounding():
                loss = model(**part, use_cache=False, **extra).loss
        else:
            loss = model(**part, use_cache=False, **extra).loss
        for name, gradient in gradients(model, loss * weight).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def ours(family: str, ways: set[str]) -> dict[str, Tensor]:
    """Gradients of one column, by name, on the ranks of the world, which all call.

    Raises:
        ValueError: what the family refuses.
    """
    whole, extra = inputs("packed" in ways), {"output_router_logits": True} if "router" in ways else {}
    model, group = make(family), dist.group.WORLD
    if "lora" in ways:
        model = with_lora(model)
    if "ring" in ways:
        use_ring_attention(model.get_base_model() if "lora" in ways else model, group)
    if "stream" in ways:
        stream_backprop(model, **CHUNKS)
    arguments = shard_batch(whole, group) if "ring" in ways else whole
    found = gradients(model, model(**arguments, **extra).loss)
    if "ring" in ways:
        summed = torch.cat([gradient.flatten() for gradient in found.values()])
        dist.all_reduce(summed, group=group)
        parts = summed.split([gradient.numel() for gradient in found.values()])
        found = {name: part.view_as(found[name]) for name, part in zip(found, parts, strict=True)}
    return found


def cell(family: str, ways: set[str]) -> str:
    if "router" in ways and not hasattr(make(family), "router_aux_loss_coef"):
        return "-"
    try:
        found = ours(family, ways)
    except ValueError as refusal:
        return "refused: " + str(refusal).replace("\n", " ").replace("|", "/")
    kinds = frozenset(ways - {"stream", "ring"})
    exact = truth(family, kinds, torch.float64)
    mine, plain = gradient_errors(found, exact), gradient_errors(truth(family, kinds, torch.float32), exact)
    figures = f"{max(mine.values()):.0e} / {max(plain.values()):.0e}"
    exactly = is_rounding(mine, plain, {name: gradient.numel() for name, gradient in exact.items()})
    return figures if exactly else f"**differs: {figures}**"


def is_rounding(mine: dict[str, float], plain: dict[str, float], sizes: dict[str, int]) -> bool:
    """Whether no gradient is further from fp64 than plain fp32's worst allows.

    Args:
        mine, plain: relative L2 errors of each parameter's gradient, by name.
        sizes: numbers in each parameter.
    """
    allowed = MORE * max(error for name, error in plain.items() if sizes[name] > 1) + FLOOR
    return all(
        error <= (MORE_OF_ONE_NUMBER * plain[name] + FLOOR if sizes[name] == 1 else allowed)
        for name, error in mine.items()
    )


def table(note: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Rows of the table, and the refusals that it numbers."""
    rows, reasons = [], []
    for family in (*FAMILIES, *MORE_FAMILIES, *OTHERS):
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

What was compared on two gloo ranks in fp32. The first figure of a cell is our worst relative L2 error of any
parameter's gradient from fp64, the second is that of plain backpropagation of one process in fp32, which is rounding.
A cell is exact where ours is at most {MORE:g} times plain's worst and {FLOOR:g} more; a parameter of one number, a sum
that may nearly cancel, {MORE_OF_ONE_NUMBER:g} times plain's error of that number and {FLOOR:g} more. The truth of
packed documents is every document run alone. A number in brackets is that of the refusal below, and a dash stands
where a family has no such thing. `python -m benchmarks.families.run` prints it and rewrites this file.

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
