"""Cut a list of modules, or a Hugging Face decoder, into pipeline stages balanced by measured time."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.parallel.decoder.limits import Choice, as_number
from fourfold.parallel.decoder.stage import DecoderStage, check_decoder, check_windows, has_sliding_window
from fourfold.parallel.pipeline.partition import balanced_ranges
from fourfold.parallel.ring.options import AgreedLength
from fourfold.parallel.stream.settings import StreamSettings


def cut_into_stages(
    modules: Sequence[nn.Module], num_stages: int, example: Tensor, *, repeats: int = 5
) -> list[nn.Sequential]:
    """Group `modules` into `num_stages` sequential stages, balanced by profiled time.

    Args:
        modules: applied one after another (an nn.Sequential, or a decoder's embedding, layers and head), each from one
            tensor to one tensor.
        example: one micro-batch's input, on the modules' device.
    Returns:
        One nn.Sequential a stage, holding the same module objects.
    Raises:
        ValueError: fewer modules than stages.
    Cost: `repeats` + 1 forwards and backwards. Every rank measures for itself: cut on one and share the ranges, or
        the ranks' cuts may differ.
    """
    seconds = profile_modules(modules, example, repeats=repeats)
    return [nn.Sequential(*(modules[i] for i in run)) for run in balanced_ranges(seconds, num_stages)]


def cut_decoder_into_stages(
    model: nn.Module,
    num_stages: int,
    input_ids: Tensor,
    *,
    checkpointing: str = "none",
    stream: StreamSettings | None = None,
    repeats: int = 5,
) -> list[DecoderStage]:
    """Cut a Hugging Face decoder into stages for PipelinedBackprop, balanced by profiled time.

    The embedding counts with the first layer, norm and head with the last.

    Args:
        model: a causal language model of the families in decoder.stage; its modules are shared, not copied.
        input_ids: one micro-batch [B, S] int64. The stages are for sequences of this S.
        checkpointing: "none", "full" to recompute each layer in the backward pass, or "stream" to do so in chunks of
            the sequence; logits are whole on the last stage all the same.
        stream: the chunks' sizes; None is stream_backprop's defaults.
    Returns:
        Stages from token ids to logits [B, S, vocab].
    Raises:
        ValueError: another family, fewer layers than stages, or embeddings tied to the head across stages (two stages
            would update one weight, each without the other's gradient); a sliding window without ring attention,
            unless the stages stream.
    """
    # Which schedule they will run under is not known yet, but that it never drains; 2bw refuses least.
    late = as_number("schedule", "2bw" if num_stages > 1 else "1f1b")
    check_decoder(model, Choice(pp=num_stages, checkpointing=as_number("checkpointing", checkpointing), schedule=late))
    if checkpointing != "stream":  # whose chunks know windows themselves
        check_windows(model)
    config: Any = model.config

    def stage(layers: range) -> DecoderStage:
        made = DecoderStage(model, layers, checkpointing=checkpointing, stream=stream)
        made.position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if checkpointing != "stream" and has_sliding_window(model):
            made.attention_arguments["ring_seq_len"] = AgreedLength(input_ids.shape[1])
        return made

    layers = [stage(range(layer, layer + 1)) for layer in range(config.num_hidden_layers)]
    seconds = profile_modules(layers, input_ids, repeats=repeats)
    return [stage(run) for run in balanced_ranges(seconds, num_stages)]


def profile_modules(modules: Sequence[nn.Module], example: Tensor, *, repeats: int = 5) -> list[float]:
    """Seconds of forward and backward of each module in turn: the median of `repeats` after one to warm up.

    Gradients of the parameters are left as they were.
    """
    samples: list[list[float]] = [[] for _ in modules]
    for repeat in range(repeats + 1):
        value = example
        for index, module in enumerate(modules):
            leaf = value.detach()
            if index and leaf.is_floating_point():
                leaf.requires_grad_()
            start = _now(leaf)
            output = module(leaf)
            wanted = [t for t in (leaf, *module.parameters()) if t.requires_grad]
            if output.requires_grad:
                torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
            if repeat:
                samples[index].append(_now(leaf) - start)
            value = output
    return [median(each) for each in samples]


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
