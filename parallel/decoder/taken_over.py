"""What becomes of a model that `parallelize` took: it says so, where it would otherwise answer wrongly.

The modules work on as this rank's stage. The model around them still has a forward pass, a `generate` and a
`save_pretrained`, of parts that are cut, gathered late or never trained. Hooks that torch has for it refuse instead.
An optimizer made before holds parameters that tensor parallelism and FSDP2 have replaced: its step is refused, too.
"""

from collections.abc import Iterable
from typing import Any, NoReturn, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_WAY = (
    "this model was taken over by parallelize, and holds one rank's part of it: call forward_backward or evaluate of "
    "the ParallelModel, and its save_pretrained(folder) for a whole model to generate with"
)
_MARK = "_taken_over"


def refuse_taken_over(model: nn.Module) -> None:
    """Raise ValueError for a model that was parallelized before."""
    if model.__dict__.get(_MARK):
        raise ValueError("this model was parallelized before, and its modules belong to that layout: build it again")


def refuse_wrapped(model: nn.Module, *, adapters: bool = False) -> None:
    """Raise ValueError for a model whose layers other libraries call in a way that a stage would pass by.

    torch.compile's wrapper, or `compile()` of a module, holds code of the whole model; peft's adapters are modules in
    the place of the matrices that tp cuts and a folder is written from.

    Args:
        adapters: whether the caller knows them (decoder.adapters).
    """
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "this model"
        if hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None:
            raise ValueError(
                f"{where} went through torch.compile, which would be passed by: give parallelize the model as it was "
                "before, and compile=True to compile its layers"
            )
        if type(module).__module__.startswith("peft.") and not adapters:
            raise ValueError(
                f"{where} is peft's {type(module).__name__}: parallelize takes adapters in the PeftModel around them, "
                "nothing else does; give it that, or merge them first (merge_and_unload())"
            )


def take_over(model: nn.Module, *around: nn.Module) -> None:
    """Refuse, from now on, what only the whole model could do: forward and generate, state_dict and save_pretrained,
    load_state_dict; of the model, of the one inside it that has the layers, and of wrappers `around` it."""
    for module in (model, cast(nn.Module, cast(Any, model).model), *around):
        module.__dict__[_MARK] = True
        # First of all hooks: the ring's own would judge the call by a batch that this model never sees again.
        module.register_forward_pre_hook(_refuse, prepend=True)
        module.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(*_: Any) -> NoReturn:
    raise ValueError(_WAY)


def mark_replaced(parameters: Iterable[nn.Parameter]) -> None:
    """Let no optimizer step with these: the model trains others in their place."""
    for parameter in parameters:
        parameter._replaced_by_parallelize = True  # type: ignore[attr-defined]


def _refuse_replaced(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if any(hasattr(parameter, "_replaced_by_parallelize") for parameter in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} was made before parallelize, which has replaced the model's parameters by "
                "parts of them: make it afterwards, from ParallelModel.parameters()"
            )


register_optimizer_step_pre_hook(_refuse_replaced)
