"""Worst gradient error of streamed against plain backpropagation: every model family, every loss; and what is refused.

    PYTHONPATH=src python -m benchmarks.stream_backprop.families                      # half a minute, one process

Tiny models in fp32, chunks that do not divide, a masked prompt and an unequal batch. Errors are relative L2 of one
parameter's gradient, the worst of all parameters.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.rows import measurement, write_rows
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fourfold.parallel import stream_backprop
from fourfold.parallel.stream import token_statistics
from fourfold.parallel.stream.checks import SUPPORTED
from fourfold.parallel.testing.compare import gradients, worst_error
from fourfold.parallel.testing.objectives import CHUNKS, every_loss, masked_batch, whole_statistics
from fourfold.parallel.testing.tiny_models import FAMILIES, batch, tiny


def compare(family: str) -> dict[str, float]:
    """Worst gradient error by loss, and of plain and streamed cross-entropy against fp64."""
    model, (ids, labels) = tiny(family), masked_batch()
    exact_model = copy.deepcopy(model).double()
    if hasattr(exact_model, "router_aux_loss_coef"):
        exact_model.set_experts_implementation("eager")  # grouped products have no fp64
    extra = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    exact = gradients(exact_model, exact_model(input_ids=ids, labels=labels, **extra).loss)
    logprobs = whole_statistics(model, ids, labels).logprobs
    assert logprobs is not None
    fixed = logprobs.detach() + 0.1 * torch.randn(ids.shape, generator=torch.Generator().manual_seed(5))
    plain = every_loss(model, fixed, whole_statistics)
    streamed = every_loss(stream_backprop(model, **CHUNKS), fixed, token_statistics)
    errors = {name: worst_error(found, plain[name][1]) for name, (_, found) in streamed.items()}
    return {
        **errors,
        "plain to fp64": worst_error(plain["cross-entropy"][1], exact),
        "ours to fp64": worst_error(streamed["cross-entropy"][1], exact),
    }


def refusals() -> dict[str, str]:
    """Messages for some models and calls that are not streamed."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    ids = batch(1, 9)

    def model(name: str, **changes: Any) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
        made: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        return made

    attempts: dict[str, Callable[[], Any]] = {
        "an untested family": lambda: stream_backprop(model("Persimmon", intermediate_size=8)),
        "attention dropout": lambda: stream_backprop(tiny("llama", attention_dropout=0.1))(input_ids=ids, labels=ids),
        "no causal language model": lambda: stream_backprop(nn.Linear(2, 2)),
        "hidden states asked for": lambda: stream_backprop(tiny("llama"))(
            input_ids=ids, labels=ids, output_hidden_states=True
        ),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "accepted"
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "families.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, lines = [], []
    for family in FAMILIES:
        errors = compare(family)
        if not lines:
            lines = ["| | " + " | ".join(errors) + " |", "|---" * (len(errors) + 1) + "|"]
        lines.append(f"| {family} | " + " | ".join(f"{error:.1e}" for error in errors.values()) + " |")
        rows += [
            measurement(
                benchmark="stream_families", provider="ours", case=f"family={family} loss={name}",
                metric="gradient_error", unit="", samples=[error], kind="cpu",
            )
            for name, error in errors.items()
        ]  # fmt: skip
    write_rows(arguments.out, rows)
    print("\n".join(lines))
    others = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - SUPPORTED
    print(f"\nStreamed: {', '.join(sorted(SUPPORTED))}.")
    print(f"Refused by name: the other {len(others)} model types with a causal language model in transformers.")
    for name, message in refusals().items():
        print(f"- {name}: {message}")


if __name__ == "__main__":
    main()
