"""One measurement in a fresh process: a provider's forward and backward at one length.

Prints a JSON line: peak_mib is the high-water mark of resident memory above what is resident with weights and
gradients allocated; cpu_s is CPU time of the step. A short step comes first, so that lazy set-up is not counted.
"""

import argparse
import ctypes
import json
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.stream_backprop.shapes import SHAPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

Step = Callable[[Tensor], Tensor]


def build(shape: dict[str, Any], max_len: int) -> nn.Module:
    """A Qwen3-style decoder in fp32 with random weights. With a window, transformers builds a T x T mask."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, max_position_embeddings=max_len, sliding_window=None, attn_implementation="sdpa")
    return Qwen3ForCausalLM(config).train()


def plain_step(model: nn.Module) -> Step:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def chunked_loss_step(model: nn.Module, size: int = 512) -> Step:
    """The model's loss with the logits of `size` tokens at a time, each chunk checkpointed."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    def step(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        return sum(checkpoint(part, h, t, use_reentrant=False) for h, t in pairs) / len(targets)

    return step


def tile_mlps(model: nn.Module, size: int = 512) -> None:
    """Every MLP `size` tokens at a time, each tile checkpointed."""
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: torch.cat(
            [checkpoint(forward, part, use_reentrant=False) for part in x.split(size, dim=1)], dim=1
        )


def streambp_step(model: nn.Module, chunk: int) -> Step:
    """The released package: its backward runs inside its forward, so there is no loss to call backward on."""
    package = types.ModuleType("streambp")  # whose own __init__ wants trl, which a step does not
    package.__path__ = [str(Path(entry) / "streambp") for entry in sys.path]
    sys.modules["streambp"] = package
    from streambp.stream_model import StreamModel

    streaming = StreamModel(model, 1, logits_chunk_size=chunk, checkpoint_chunk_size=chunk)
    streaming.gradient_checkpointing_enable()
    streaming.train()

    def step(ids: Tensor) -> Tensor:
        out: Tensor = streaming(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
        return out

    return step


KINDS = re.compile(r"ours|streambp|(plain|liger|checkpoint|liger\+checkpoint)(\+ce)?(\+mlp)?")
OPTIONS = re.compile(r"(groups|keep)=\d+|(chunk|mlp|logits)=[1-9]\d*|keep|offload")


def known(name: str) -> str:
    """A provider's name, checked.

    plain, checkpoint[+ce[+mlp]], liger[+checkpoint], streambp[,chunk=..], and
    ours[,groups=..][,chunk=..][,mlp=..][,logits=..][,keep[=..]][,offload].

    Raises:
        ValueError: another name.
    """
    kind, *options = name.split(",")
    own = {"ours": OPTIONS, "streambp": re.compile(r"chunk=[1-9]\d*")}.get(kind, re.compile("offload"))
    if not KINDS.fullmatch(kind) or not all(own.fullmatch(option) for option in options):
        raise ValueError(f"{name!r} is no provider: the docstring of benchmarks.stream_backprop.step.known has them")
    return name


def provider(name: str, model: nn.Module) -> Step:
    """The step of a provider's name, see `known`."""
    kind, *options = known(name).split(",")
    given = dict(option.partition("=")[::2] for option in options)
    if kind == "streambp":
        return streambp_step(model, int(given.get("chunk", 512)))
    if kind.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(model=model)
    if kind == "ours":
        # Here, because the peers' environments have another transformers.
        from fourfold.parallel.stream.model import stream_backprop

        names = {"chunk": "chunk_size", "mlp": "mlp_chunk", "logits": "logits_chunk", "groups": "head_groups"}
        stream_backprop(
            model,
            keep_attention=int(given["keep"]) if given.get("keep") else "keep" in given,
            offload="host" if "offload" in given else None,
            **{names[key]: int(value) for key, value in given.items() if key in names},
        )
        return plain_step(model)
    if "checkpoint" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind.endswith("+mlp"):
        tile_mlps(model)
    return chunked_loss_step(model) if "+ce" in kind else plain_step(model)


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(name: str, seq_len: int, shape: str) -> dict[str, float]:
    torch.set_num_threads(1)
    model = build(SHAPES[shape], max(seq_len, 1024))
    step = provider(name, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, 1000, (1, seq_len), generator=torch.Generator().manual_seed(0))
    short = step(ids[:, :128])
    if short.requires_grad:
        short.backward()
    del short
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = resident_mib("VmRSS"), time.process_time()
    loss = step(ids)
    if loss.requires_grad:
        loss.backward()
    spent = time.process_time() - start
    return {"peak_mib": resident_mib("VmHWM") - before, "cpu_s": spent, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider")
    parser.add_argument("seq_len", type=int)
    parser.add_argument("--shape", default="page", choices=SHAPES)
    parser.add_argument("--limit-mib", type=int, default=0, help="address space limit: fail rather than pass it")
    arguments = parser.parse_args()
    if arguments.limit_mib:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_mib << 20,) * 2)
    print(json.dumps(measure(arguments.provider, arguments.seq_len, arguments.shape)))


if __name__ == "__main__":
    main()
