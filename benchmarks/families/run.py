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
WINDOWED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    **GROUPED, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
# Families that some columns take, and some that none does, for the reason that each gives.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3, a layer without rope": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "olmo": ("Olmo", {}),
    "olmo3, windows": ("Olmo3", WINDOWED),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "glm4_moe": ("Glm4Moe", {**GROUPED, "head_dim": 8}),
    "starcoder2": ("Starcoder2", {}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "granitemoe": ("GraniteMoe", EXPERTS),
    "olmoe": ("Olmoe", EXPERTS),
    "ministral, windows": ("Ministral", {**WINDOWED, "head_dim": 8}),
    "ministral3": ("Ministral3", {"head_dim": 8}),
    "exaone4, windows": ("Exaone4", {**WINDOWED, "head_dim": 8}),
    "helium": ("Helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {"head_dim": 8}),
    "cohere": ("Cohere", {}),
    "cohere2, windows": ("Cohere2", {**WINDOWED, "head_dim": 8}),
    "seed_oss": ("SeedOss", {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "vaultgemma, soft caps": ("VaultGemma", {**WINDOWED, "head_dim": 8, "attn_logit_softcapping": 2.0}),
    "phimoe": ("Phimoe", {**EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "gpt_neox": ("GPTNeoX", {}),
    "nemotron": ("Nemotron", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "stablelm": ("StableLm", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}


def make(family: str) -> nn.Module:
    """The same weights at every call."""
    if family in FAMILIES:
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
    for family in dict.fromkeys((*FAMILIES, *OTHERS)):
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
