"""Which models stream_backprop understands, and whether a model ends as streaming's head does.

What is not understood is refused, never streamed wrongly. A model whose end is not transformers' own (a loss, a head, a
hook of the user's) keeps its end: its layers stream, and its own code does the rest.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed._composable.contract import _get_registry
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourfold.parallel.stream.attention import RowMask
from fourfold.parallel.stream.kept_inputs import weights_are_sharded
from fourfold.parallel.stream.patching import (
    Patches,
    hooks_of,
    hooks_of_all_modules,
    is_transformed,
    operations_are_watched,
    plain_parameter,
)

# Model types that are tested against plain backpropagation; others are refused.
SUPPORTED = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "minimax_m2",
    "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3",
    "qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_text", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
# Packages whose hooks gather or move weights and leave values as they are.
FRAMEWORKS = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.", "fourfold.parallel.ring.")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, peft or DeepSpeed wrappers: one with a head of some kind.

    Of a vision-language model it is the language model inside, whose head is left to the wrapper.
    """
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    heads = [module for module in found if module.get_output_embeddings() is not None]
    # Classifiers and reward models: a base model with a small head of their own.
    heads += [module for module in found if module.base_model is not module]
    # A base model alone, of an embedding model for example.
    heads += [module for module in found if isinstance(getattr(module, "layers", None), nn.ModuleList)]
    if not heads:
        raise ValueError(f"{type(model).__name__} holds no transformers causal language model")
    inside = getattr(heads[0].base_model, "language_model", None)
    return inside if isinstance(inside, PreTrainedModel) else heads[0]


def final_norm(base: nn.Module) -> nn.Module:
    """The norm after the base model's last layer."""
    norm = getattr(base, "norm", None) or getattr(base, "final_layernorm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"{type(base).__name__} has neither norm nor final_layernorm: streaming does not know its end")
    return norm


def check_model(model: PreTrainedModel, *, any_type: bool = False) -> None:
    """Raises ValueError for a model whose layers streaming would not reproduce, or cannot cut.

    Args:
        any_type: admit model types that are not tested: they will be verified.
    """
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED and not any_type:
        raise ValueError(
            f"{name}: model type {config.model_type!r} is not among the tested {', '.join(sorted(SUPPORTED))}; "
            "verify='first' admits it if a first tiny batch has plain backpropagation's gradients"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends both ways: streaming needs causal attention")
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError(f"{name} is sharded already: call stream_backprop before fully_shard; tp is not supported")
    check_layers(model)
    for layer in plain_layers(model.base_model):
        attention = cast(nn.Module, layer.self_attn)
        if not any(each.kind is Parameter.VAR_KEYWORD for each in signature(attention.forward).parameters.values()):
            raise ValueError(f"{name}: its {type(attention).__name__} takes no further arguments: streaming needs one")


def plain_layers(base: nn.Module) -> list[nn.Module]:
    """The base model's decoder layers, inside torch.compile's wrappers where they have some."""
    return [cast(nn.Module, getattr(layer, "_orig_mod", layer)) for layer in cast(nn.ModuleList, base.layers)]


def check_weights(model: PreTrainedModel) -> None:
    """Raises ValueError for weights that no backward of streaming's can differentiate."""
    if model.device.type == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device and has no weights yet: load them first")
    if is_transformed(next(model.parameters())):
        raise ValueError(
            "torch.func's transforms cannot differentiate a streamed layer: use loss.backward() or "
            "torch.autograd.grad, or stream_backprop_disable(model)"
        )


def check_layers(model: PreTrainedModel) -> None:
    """Raises ValueError for layers that streaming cannot cut."""
    name, layers = type(model).__name__, getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{name}: its base model has no list of layers")
    _check_attention_function(model)
    for layer in plain_layers(model.base_model):
        if hasattr(layer, "_checkpoint_wrapped_module") or "checkpoint" in (_get_registry(layer) or {}):
            raise ValueError(
                f"{name}: its layers are wrapped for activation checkpointing, which streaming replaces: call "
                "stream_backprop on the model without these wrappers"
            )
        if not isinstance(getattr(layer, "self_attn", None), nn.Module):
            raise ValueError(
                f"{name}: a {type(layer).__name__} has no self_attn, so it may mix tokens in another way than by "
                "attention: streaming cannot cut it"
            )
        if not hasattr(layer.self_attn, "config"):
            raise ValueError(
                f"{name}: {type(layer.self_attn).__name__} has taken the place of an attention module of transformers: "
                "streaming cannot cut it"
            )
        for module in layer.modules():
            if isinstance(module, _NormBase):
                raise ValueError(
                    f"{name}: a {type(module).__name__} in a layer normalizes over tokens: streaming cannot cut it"
                )


def check_unchanged(
    model: PreTrainedModel, layers: Sequence[nn.Module], attentions: Sequence[object], norm: nn.Module,
    head_was_plain: bool,
) -> None:  # fmt: skip
    """Raises ValueError for modules put in place of those that were understood: their work would be left out.

    Args:
        layers, attentions, norm: as stream_backprop found them. head_was_plain: whether the head was a plain linear.
    """
    check_layers(model)
    base = model.base_model
    now = plain_layers(base)
    if now != layers or [layer.self_attn for layer in now] != attentions:
        raise ValueError("the model's layers are others than stream_backprop found: call stream_backprop again")
    head: Any = model.get_output_embeddings()
    replaced = head_was_plain and not is_plain_linear(projection_of(model))
    if final_norm(base) is not norm or (replaced and not type(head).__module__.startswith("peft.")):
        raise ValueError(
            f"the final norm or the head ({type(head).__name__}) is not the plain module that stream_backprop "
            "found: call stream_backprop after peft and whatever else replaces modules, and leave both whole"
        )


def projection_of(model: PreTrainedModel) -> nn.Module | None:
    """The head that computes logits now: where peft saves a head of its own, that one. None: no language model's."""
    head = cast(nn.Module, model.get_output_embeddings())
    saved = getattr(head, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict):
        return head
    wrapper = cast(Any, head)
    active = [name for name in wrapper.active_adapters if name in saved]
    return wrapper.original_module if wrapper.disable_adapters or not active else saved[active[0]]


def is_plain_linear(head: nn.Module | None) -> bool:
    """Whether the head is x @ weight.T + bias, with a weight of its own."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and plain_parameter(head, "weight")


def end_is_watched(norm: nn.Module, head: nn.Module) -> str | None:
    """Who has a say in the final norm or the head that a loss from their weights would pass by; None if nobody.

    A replaced forward of the norm is called, and counts for nothing here.
    """
    if hooks_of_all_modules():
        return "a hook is set on all modules"
    for module, name in ((norm, "final norm"), (head, "head")):
        mine = hooks_of(module)
        if mine:
            return f"the {name} has a hook of {_module_of(mine[0])}"
    if not is_plain_linear(head):
        return f"the head is a {type(head).__name__}"
    return "the head's forward was replaced" if "forward" in head.__dict__ else None


def unverifiable(model: PreTrainedModel) -> str | None:
    """Why the model cannot be compared with itself, plain, on a tiny batch here and now; None where it can."""
    if operations_are_watched():
        return "torch's operations are recorded now"
    layers = cast(nn.ModuleList, model.base_model.layers)
    if getattr(cast(Any, layers[0]).self_attn, "ring_settings", None) is not None:
        return "a rank of a ring holds a shard, which has no plain counterpart"
    if weights_are_sharded(model) or any(type(p) not in (nn.Parameter, Tensor) for p in model.parameters()):
        return "its weights are sharded"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "it has no weights yet"
    hooks = [hook for module in model.modules() for hook in hooks_of(module)]
    if any(not _from_framework(hook) for hook in (*hooks, *hooks_of_all_modules())):
        return "it has hooks, which would see the comparison"
    return None


def inner_hook(layers: Iterable[nn.Module]) -> str | None:
    """The class of a module inside a layer that has a hook of the user's; None where no module has."""
    general = hooks_of_all_modules()
    for layer in layers:
        for module in layer.modules():
            if module is not layer and any(not _from_framework(hook) for hook in (*hooks_of(module), *general)):
                return type(module).__name__
    return None


def own_end(model: PreTrainedModel, norm: nn.Module, patches: Patches) -> str | None:
    """What of the model's end is not transformers' own, or None: final norm, projection, scale, cap, and their loss.

    Args:
        norm: the final norm.
        patches: streaming's, which do not count.
    """
    base, projection = cast(nn.Module, model.base_model), projection_of(model)
    head = cast(nn.Module, model.get_output_embeddings())
    if projection is None:
        return f"{type(model).__name__} is no causal language model"
    for module, name in ((model, "model"), (base, "base model"), (norm, "final norm")):
        if not type(module).forward.__module__.startswith(("transformers.models.", "torch.nn.modules.")):
            return f"the {name}'s forward is {type(module).__name__}'s own"
    # What was wrapped around the model's patched forward since has its say before and after streaming's end.
    if not patches.was_stock(model):
        return "the model's forward was replaced"
    for module, name in ((base, "base model"), (norm, "final norm"), (projection, "head")):
        if not patches.stock(module):
            return f"the {name}'s forward was replaced"
    if not is_plain_linear(projection):
        return f"the head is a {type(projection).__name__}"
    if model.loss_function is not ForCausalLMLoss:
        return f"the loss is {getattr(model.loss_function, '__name__', model.loss_function)}"
    if any(not _from_framework(hook) for hook in hooks_of_all_modules()):
        return "a hook is set on all modules"
    for module, name in ((base, "base model"), (norm, "final norm"), (head, "head"), (projection, "head")):
        mine = [hook for hook in hooks_of(module) if not _from_framework(hook)]
        if mine:
            return f"the {name} has a hook of {_module_of(mine[0])}"
    return None


def _check_attention_function(model: PreTrainedModel) -> None:
    """Raises ValueError for an attention function of somebody's own, which streaming would replace by its own."""
    name = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None or f"{_module_of(function)}.".startswith((*FRAMEWORKS, "fourfold.")):
        return
    raise ValueError(
        f"{type(model).__name__} attends by {name!r}, a function of {_module_of(function)}: streaming would attend by "
        "its own; set_attn_implementation('sdpa') first"
    )


def _from_framework(hook: Callable[..., Any]) -> bool:
    return f"{_module_of(hook)}.".startswith(FRAMEWORKS)


def _module_of(hook: Callable[..., Any]) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def check_padding(masks: Sequence[RowMask], targets: Tensor, attentions: Sequence[nn.Module]) -> None:
    """Refuse a loss at padding that sees no token, where the model's own attention is "eager".

    What such padding attends is arbitrary: kernels give zeros, as streaming does, and eager attention the mean of all
    values. A plain loss then has another number in it. With attention sinks both give zeros.

    Args:
        targets: [B, T], negative where none is.
        attentions: of each layer.
    Raises:
        ValueError: padding that is asked for a label has no token before it, or none within a layer's window.
    """
    config = getattr(attentions[0], "config", None)
    if getattr(config, "_attn_implementation", None) != "eager" or getattr(attentions[0], "sinks", None) is not None:
        return
    windows = [getattr(each, "sliding_window", getattr(config, "sliding_window", None)) for each in attentions]
    reach = min((window - 1 for window in windows if window), default=targets.shape[1])
    for mask in masks:
        starts = [start for start, _ in mask.keys] + [targets.shape[1]]
        # The last key before each run of padding; before the first there is none.
        lasts = [-1 - reach] + [stop - 1 for _, stop in mask.keys]
        for last, stop in zip(lasts, starts, strict=True):
            first = last + reach + 1
            if first < stop and bool((targets[slice(*mask.rows), first:stop] >= 0).any()):
                raise ValueError(
                    f"rows {mask.rows[0]} to {mask.rows[1] - 1} have padding at tokens {first} to {stop - 1} that "
                    "sees no token and is to predict a label: with attn_implementation='eager' its loss is that of "
                    "the mean of all values; give -100 as the label of padding and of the first token after it, or use "
                    "attn_implementation='sdpa'"
                )
