"""A trial of a few tokens: does a model around a ring compute what it would compute whole?

A ring replaces attention. All else in the model must act token by token, and know a token's place from its position
ids alone. Names do not tell (a decoder layer may hold a convolution, a scan, a pooling), so the model is tried: with
attention replaced by a function of each token alone,

1. a NaN in one token reaches no other token's output: a weight that happens to be zero hides no path, 0 * NaN is NaN,
2. in training mode another token in its place changes no other token's output, and no table is looked up at another
   index for one: what counts or hashes tokens passes no NaN on; and no buffer is updated,
3. a shard of the tokens gives what the whole gives for them,
4. the loss of a shard is the sum over its labels, over the global count.

Cost: four forward passes of some 130 tokens and two of some 40, without gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, None]]
NUM_TOKENS = 131  # more than the blocks of 128 tokens that some layers pool
SHARD = (*range(17), *range(101, 121))  # as zigzag cuts: an early and a late piece
POISONED = 40
# Of the largest output: roundings differ with the number of tokens a kernel gets, most of all in 16 bits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
COARSE = 0.05
MEND = "a ring shards the tokens for attention alone; train this model with dp, pp or tp instead of cp"


def attention_modules(
    model: nn.Module, replaced_attention: Callable[[AttentionFunction], AbstractContextManager[None]]
) -> list[nn.Module]:
    """The modules of a model that call the attention function, after a trial that all others act token by token.

    Args:
        model: with its weights, on any device.
        replaced_attention: makes the model call another attention function, as long as it is entered.
    Raises:
        ValueError: the model mixes tokens outside of the attention function, or counts its tokens by itself, or its
            loss is another than the tokens' sum over num_items_in_batch; names what does where it can.
    """
    callers: list[nn.Module] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module not in callers:
            callers.append(module)
        return _of_each_token_alone(module, query, key, value), None

    _refuse_statistics(model)
    with replaced_attention(attend), _quiet(model):
        _try(model, callers)
    return callers


def _try(model: nn.Module, callers: list[nn.Module]) -> None:
    name, device = type(model).__name__, next(model.parameters()).device
    ids = torch.arange(NUM_TOKENS, device=device)[None] * 7 % _vocabulary(model)
    positions, shard = torch.arange(NUM_TOKENS, device=device)[None], list(SHARD)
    try:
        whole = _outputs(model, ids, positions)
        mixing = _first_that_mixes(model, ids, positions)
        with _no_counting(callers):
            part = _outputs(model, ids[:, shard], positions[:, shard])
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} fails on {NUM_TOKENS} tokens of one process, before any ring ({type(error).__name__}: {error}): "
            "if it fails without use_ring_attention too, mend that first (an adapter on a router whose output is no "
            "tensor is one that does)"
        ) from error
    if whole.shape[:2] != (1, NUM_TOKENS):
        raise ValueError(f"{name} gives {tuple(whole.shape)} for {NUM_TOKENS} tokens: a ring needs an output a token")
    # 1. No way from one token to another.
    if not callers:
        mixes = f", and mixes tokens in {mixing}" if mixing else ""
        raise ValueError(
            f"{name} does not call transformers' attention interface{mixes}: use ring_attention in its code, or train "
            "it with dp, pp or tp instead of cp"
        )
    if mixing is not None:
        raise ValueError(f"{name} mixes tokens outside of attention, in {mixing}: {MEND}")
    # 2. Nor one that no NaN passes. A streaming model's own forward answers for itself.
    streams = "forward" in model.__dict__
    if not streams:
        _refuse_hidden_ways(model, ids, positions)
    # 3. A shard against the whole.
    tolerance = _tolerance(whole)
    if not (part.double() - whole[:, shard].double()).abs().max() <= tolerance:
        raise ValueError(f"{name} gives other outputs for a shard than for the whole sequence: {MEND}")
    # 4. The loss of a shard.
    if model.get_output_embeddings() is not None and not streams and not _sums_over_tokens(model, ids, positions):  # type: ignore[operator]
        raise ValueError(
            f"the loss of {name} is not the sum over its shift_labels, divided by num_items_in_batch: take the outputs "
            "of a shard and make the loss of them"
        )


def _sums_over_tokens(model: nn.Module, ids: Tensor, positions: Tensor) -> bool:
    """Whether a shard's loss is the cross-entropy of its shift_labels, summed and divided by num_items_in_batch."""
    shard = list(SHARD)
    logits = _outputs(model, ids[:, shard], positions[:, shard])
    targets = ids[:, shard].clone()
    targets[0, 0] = -100
    count = torch.tensor(NUM_TOKENS, device=ids.device)
    # A loss of the labels themselves, which are of the tokens in their own places, would show: there are none.
    arguments = {"labels": torch.full_like(targets, -100), "shift_labels": targets, "num_items_in_batch": count}
    try:
        loss = model(input_ids=ids[:, shard], position_ids=positions[:, shard], **_plain(model), **arguments).loss
        expected = F.cross_entropy(logits[0].float(), targets[0], ignore_index=-100, reduction="sum") / count
    except Exception:  # labels of another kind than tokens
        return False
    return loss is not None and bool(abs(loss - expected) <= COARSE / 5 * expected)


def _outputs(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """[1, tokens, vocabulary or hidden size]."""
    out = model(input_ids=ids, position_ids=positions, **_plain(model))
    values: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return values


def _plain(model: nn.Module) -> dict[str, Any]:
    """Arguments that leave out what only some calls want."""
    routed = hasattr(getattr(model, "config", None), "output_router_logits")
    return {"use_cache": False, **({"output_router_logits": False} if routed else {})}


def _first_that_mixes(model: nn.Module, ids: Tensor, positions: Tensor) -> str | None:
    """The innermost module that carries a NaN of one token to another token's output; None where nothing does."""

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, POISONED] = torch.nan
        return output

    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if not found and _mixed(output) and not any(map(_mixed, args)):
            found.append(f"{name} ({type(module).__name__})")

    hooks = [model.get_input_embeddings().register_forward_hook(poison)]  # type: ignore[operator]
    hooks += [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        outputs = _outputs(model, ids, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), "its own forward") if found or _mixed(outputs) else None


def _refuse_hidden_ways(model: nn.Module, ids: Tensor, positions: Tensor) -> None:
    """Refuse what shows in training mode only, or when another token stands in a place."""
    looked_up: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, args: Any) -> None:
        looked_up.append((name, args[0].clone()))

    model.train()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.__dict__["gradient_checkpointing"] = False
    kept = [(name, buffer, buffer.clone()) for name, buffer in model.named_buffers() if not buffer.is_meta]
    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_pre_hook(partial(note, name)) for name, table in tables]
    changed = ids.clone()
    changed[0, POISONED] = (ids[0, POISONED] + 1) % _vocabulary(model)
    outputs, indices = [], []
    try:
        for tokens in (ids, changed):
            torch.manual_seed(0)  # the same dropout in both
            outputs.append(_outputs(model, tokens, positions))
            indices.append(list(looked_up))
            looked_up.clear()
    finally:
        model.eval()
        for hook in hooks:
            hook.remove()
    others = [token for token in range(NUM_TOKENS) if token != POISONED]
    for (name, first), (_, second) in zip(*indices, strict=True):
        if first.shape[:2] == (1, NUM_TOKENS) and not torch.equal(first[:, others], second[:, others]):
            raise ValueError(
                f"{type(model).__name__} mixes tokens outside of attention, in {name} (nn.Embedding), whose index "
                f"depends on other tokens: {MEND}"
            )
    tolerance = _tolerance(outputs[0])
    if not (outputs[0].double() - outputs[1].double())[:, others].abs().max() <= tolerance:
        raise ValueError(f"{type(model).__name__} mixes tokens outside of attention while it trains: {MEND}")
    for name, buffer, before in kept:
        if "rotary" not in name and not torch.equal(buffer, before):
            raise ValueError(
                f"{name} changes with the tokens that the model trains on: each rank of a ring would have its own; "
                "update it outside of the model's forward, from what all ranks have seen"
            )


def _tolerance(outputs: Tensor) -> Tensor:
    """By how much rounding may change one of them."""
    return TOLERANCE.get(outputs.dtype, COARSE) * outputs.double().abs().max().clamp(min=1e-6)


def _mixed(value: Any) -> bool:
    """Whether it is a tensor [1, tokens, ...] in which another token than the poisoned one has a NaN."""
    if not isinstance(value, Tensor) or value.shape[:2] != (1, NUM_TOKENS) or not value.is_floating_point():
        return False
    others = [token for token in range(NUM_TOKENS) if token != POISONED]
    return bool(value[:, others].isnan().any())


def _of_each_token_alone(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, S, H, D]: a function of a token's own query, key and value, in which all of them show."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} has {query.shape[2]} queries for {key.shape[2]} keys: a ring has as many, so "
            "neither cross-attention nor a cache"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    alike: Tensor = (query * key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5
    return (value * (1 + alike.tanh())).transpose(1, 2).contiguous()


def _refuse_statistics(model: nn.Module) -> None:
    """Normalisation by statistics of a batch: in eval mode, in which the trial runs, it acts on each token alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which normalises over tokens: a ring cannot hold it"
            )


@contextmanager
def _no_counting(callers: list[nn.Module]) -> Iterator[None]:
    """Refuse attention modules that count a shard's tokens from 0, which may show at late positions only."""
    inside: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda m, a: inside.append(m)) for module in callers]
    hooks += [module.register_forward_hook(lambda m, a, o: inside.clear()) for module in callers]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.arange and inside and args[-1:] == (len(SHARD),):
                raise ValueError(
                    f"{type(inside[-1]).__name__} counts its tokens from 0 instead of reading position_ids: a shard of "
                    "a sequence has others"
                )
            return function(*args, **(kwargs or {}))

    try:
        with Watch():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; afterwards random numbers, modes, buffers and attributes are those of before.

    Some rotary embeddings remember the longest sequence that they have seen.
    """
    before = [
        (module, dict(module.__dict__), [(name, buffer, buffer.clone()) for name, buffer in _buffers(module)])
        for module in model.modules()
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, attributes, buffers in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for name, buffer, content in buffers:
                    module._buffers[name] = buffer.copy_(content)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _vocabulary(model: nn.Module) -> int:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])
