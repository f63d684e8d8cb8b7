"""Every change that StreamBP makes to objects that are not its own, and every private name it reads, with the reason.

PATCHES is the whole list: no other file of this package replaces a module's forward, swaps a parameter, renames an
attention function or calls a private function of torch (switches.py sets modes back for a backward). Lasting changes
are made once, by `Patches.add`, and undone by `Patches.undo`; the others are context managers that put back what they
found, also after an exception.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from types import MethodType
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface

# The name by which transformers finds stream.attention's function.
NAME = "fourfold_stream"
# The attribute of a causal language model that streams.
ATTRIBUTE = "fourfold_stream"
# The function of a model's file that rotates queries and keys.
ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True, slots=True)
class Patch:
    """One kind of change.

    Attributes:
        what: the object and its attribute.
        lasts: "enabled" is from stream_backprop to stream_backprop_disable, "call" is one pass over a batch or the
            forward or backward of one layer; "read" changes nothing, and is a private name that is read or called.
        why: what would be wrong or slow without it.
    """

    what: str
    lasts: Literal["enabled", "call", "read"]
    why: str


PATCHES = (
    Patch("forward of the causal language model", "enabled", "a call with labels ends in the streamed head"),
    Patch("forward of its base model", "enabled", "whoever calls it, as TRL does, gets streamed layers"),
    Patch("forward of each decoder layer", "enabled", "the layer runs in chunks; its hooks still run once a pass"),
    Patch("forward of each attention module", "enabled", "a layer's forward is cut in two at its attention module"),
    Patch("forward of each nn.Linear in a layer", "enabled", "weights' gradients are added in place, chunk by chunk"),
    Patch("forward of each norm and gated MLP in a layer", "enabled", "a fused kernel of the same is faster"),
    Patch("forward of each router", "enabled", "the load-balancing loss needs each chunk's router logits"),
    Patch("forward of the final norm and the head", "enabled", "both run in chunks, inside their hooks' one call"),
    Patch("forward of the token embedding", "enabled", "its output is looked up again in backward, not kept"),
    Patch("_z3_leaf of each decoder layer", "enabled", "DeepSpeed's ZeRO-3 gathers a layer once for all its chunks"),
    Patch(f"{ATTRIBUTE} of the causal language model", "enabled", "finds, and undoes, what is listed here"),
    Patch(f"attention function {NAME!r}", "enabled", "transformers' registry is how its modules find ours"),
    Patch("config._attn_implementation_internal", "call", "masks and attention functions are chosen by this name"),
    Patch("apply_rotary_pos_emb of a model's file", "call", "the same of rotary embeddings, which are no module"),
    Patch("parameters of a layer or norm", "call", "hooks on them must see the sum over chunks, once, not each chunk"),
    Patch("switches of a layer's modules", "call", "backward recomputes with the forward's training mode and adapters"),
    Patch("gradient_checkpointing of a layer", "call", "a streamed layer must not checkpoint each of its chunks"),
    Patch("nn.Module._parameters", "read", "a parameter can be swapped for a leaf that is none only there"),
    Patch("hooks of nn.Module", "read", "hooks of the user's on the model's end must be found; torch has no list"),
    Patch("hooks of all modules", "read", "those, too; they would see the end of the model chunk by chunk"),
    Patch("torch._C._will_engine_execute_node", "read", "autograd.grad must not find its results added to .grad"),
    Patch("Tensor._use_count", "read", "a gradient that autograd.grad or a view holds must not be overwritten"),
    Patch("torch._C._storage_Use_Count", "read", "nor one whose memory a hook's detached tensor or array holds"),
    Patch("torch._C._DisableTorchDispatch", "read", "who holds a gradient is first counted where nobody looks on"),
    Patch("torch.utils._python_dispatch._disable_current_modes", "read", "no checkpoint keeps what is only tried"),
    Patch("Tensor._version", "read", "a tensor that is changed while it is copied to the host must not be used"),
    Patch("Tensor._make_wrapper_subclass", "read", "logits that nobody reads need a shape without memory"),
    Patch("torch._C.DisableTorchFunctionSubclass", "read", "the shape of such a tensor is read without computing it"),
    Patch("torch._C._autograd._top_saved_tensors_default_hooks", "read", "a layer inside a checkpoint must be refused"),
    Patch("torch._C._len_torch_dispatch_stack", "read", "a comparison must not be recorded and replayed by others"),
    Patch("torch._C._current_graph_task_id", "read", "a layer that a checkpoint calls again must be refused"),
    Patch("torch._C._functorch", "read", "torch.func cannot differentiate a streamed layer, and must be refused"),
    Patch("Tensor._backward_hooks", "read", "a hook that waits for a gradient must see all of it, not zeros"),
)


class PatchedForward:
    """A module's forward while it streams: replacement(plain, ...), where plain is the forward that was there.

    Args:
        before: what stood in the module's own attributes; None where its class has the forward.
    """

    def __init__(self, module: nn.Module, before: Any, replacement: Callable[..., Any]) -> None:
        self.module, self.before, self.replacement = module, before, replacement

    @property
    def plain(self) -> Callable[..., Any]:
        """Read at each call: somebody may give the class another forward while the model streams."""
        return _unpatched(self.module, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.plain, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The copied module's own forward: peft copies modules that it saves."""
        copied = memo.get(id(self.module))
        if copied is None:
            refuse_copy()
        return MethodType(type(self.module).forward, copied)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Raises ValueError: a copied or pickled model would run the layers of the one it was made of."""
    raise ValueError(
        "a copy of a streaming model would run the original's layers: call stream_backprop_disable before copying or "
        "pickling it, and stream_backprop on both; to save it, save its state_dict"
    )


class Patches:
    """Changes to modules that last until `undo`, each made once."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, tuple[Any, Any]] = {}
        self._leaves: list[nn.Module] = []

    @property
    def active(self) -> bool:
        """Whether some change is in place."""
        return bool(self._forwards)

    def stock(self, module: nn.Module) -> bool:
        """Whether the module's forward is its class's own, but for ours."""
        patched = self._forwards.get(module, (None, None))[0]
        now = module.__dict__.get("forward")
        return self.was_stock(module) if now is patched else _of_class(module, now)

    def was_stock(self, module: nn.Module) -> bool:
        """Whether it was its class's own when it was patched, whatever was wrapped around ours since."""
        return _of_class(module, self._forwards.get(module, (None, None))[1])

    def add(self, module: nn.Module, replacement: Callable[..., Any], *, method: bool = False) -> None:
        """Let module.forward be replacement(plain, ...); nothing if it is already one of these.

        Args:
            method: replace it by a bound method with the signature of the one that was there: Trainer reads the
                signature, and Accelerate wraps the function and binds it again.
        """
        if module in self._forwards:
            return
        before = module.__dict__.get("forward")
        patched = _bound(module, before, replacement) if method else PatchedForward(module, before, replacement)
        module.__dict__["forward"] = patched
        self._forwards[module] = (patched, before)

    def plain(self, module: nn.Module) -> Callable[..., Any]:
        """The forward that a patched module had."""
        patched: PatchedForward = self._forwards[module][0]
        return patched.plain

    def gather_whole(self, layer: nn.Module) -> None:
        """Let DeepSpeed's ZeRO-3 gather the layer's parameters at once."""
        if "_z3_leaf" not in layer.__dict__:
            layer.__dict__["_z3_leaf"] = True
            self._leaves.append(layer)

    def undo(self) -> None:
        """Put everything back. A forward that somebody has wrapped since stays, and what it wraps must be inert."""
        for module, (patched, before) in self._forwards.items():
            now = module.__dict__.get("forward")
            if now is not patched and getattr(now, "__func__", None) is not getattr(patched, "__func__", self):
                continue
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        for layer in self._leaves:
            layer.__dict__.pop("_z3_leaf", None)
        self._forwards, self._leaves = {}, []


def _of_class(module: nn.Module, forward: Any) -> bool:
    """Whether what stands in the module's own attributes, if anything, is its class's forward."""
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _unpatched(module: nn.Module, before: Any) -> Callable[..., Any]:
    """The module's forward without ours: what stood in its own attributes, or its class's."""
    return MethodType(type(module).forward, module) if before is None else cast(Callable[..., Any], before)


def _bound(module: nn.Module, before: Any, replacement: Callable[..., Any]) -> MethodType:
    # Dynamo would trace into autograd functions that change modules while they run; it goes around this one.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:  # a copy of the module alone
            return type(module).forward(self, *args, **kwargs)
        if args and args[0] is module:  # Accelerate's unwrapping binds what is bound once more
            args = args[1:]
        return replacement(_unpatched(module, before), *args, **kwargs)

    # Not functools.wraps: Accelerate and inspect follow __wrapped__, past this function to the plain one.
    vars(forward).pop("__wrapped__", None)
    own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = Signature([own, *signature(module.forward).parameters.values()])
    return MethodType(forward, module)


def register_attention(function: Callable[..., Any]) -> None:
    """Make `function` what transformers' modules attend with while attention_function is entered."""
    AttentionInterface.register(NAME, function)


@contextmanager
def attention_function(config: Any) -> Iterator[None]:
    """transformers makes masks, and its modules attend, by the name in the config, read at every call."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


# The names that an attention module's code sees, and what is to stand there for its rotary embedding.
Rotary = tuple[dict[str, Any], Callable[..., Any]]


@contextmanager
def fused_rotary(rotary: Rotary | None) -> Iterator[None]:
    """An attention module's code with another rotary embedding; None is its own."""
    if rotary is None:
        yield
        return
    names, function = rotary
    before = names[ROTARY]
    names[ROTARY] = function
    try:
        yield
    finally:
        names[ROTARY] = before


@contextmanager
def swapped_parameters(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Detached leaves in the parameters' places: a chunk's gradients must not run hooks set on the parameters."""
    leaves = {id(p): p.detach().requires_grad_() for p in parameters}
    places = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if id(parameter) in leaves
    ]
    try:
        for home, name, parameter in places:
            home[name] = leaves[id(parameter)]  # type: ignore[assignment]
        yield [leaves[id(p)] for p in parameters]
    finally:
        for home, name, parameter in places:
            home[name] = parameter


@contextmanager
def without_checkpointing(layer: nn.Module) -> Iterator[None]:
    """The layer with transformers' gradient checkpointing off."""
    before = layer.__dict__.get("gradient_checkpointing")
    if not before:
        yield
        return
    layer.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        layer.__dict__["gradient_checkpointing"] = before


def plain_parameter(module: nn.Module, name: str) -> bool:
    """Whether the module's `name` is a parameter of its own, and not computed from others (a parametrization)."""
    return module._parameters.get(name) is not None


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave this module a forward, besides its class's."""
    return not _of_class(module, module.__dict__.get("forward"))


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks set on the module's forward and backward."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def hooks_of_all_modules() -> list[Callable[..., Any]]:
    """The hooks that torch runs for every module (register_module_forward_hook and its like)."""
    names = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks",
             "_global_backward_hooks")  # fmt: skip
    return [hook for name in names for hook in getattr(torch.nn.modules.module, name).values()]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def inside_checkpoint() -> bool:
    """Whether what autograd saves now is taken by torch.utils.checkpoint, to be recomputed."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def operations_are_watched() -> bool:
    """Whether somebody sees, counts or replays each of torch's operations now."""
    return torch._C._len_torch_dispatch_stack() > 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def inside_backward() -> bool:
    """Whether autograd runs a backward now, in this thread."""
    return torch._C._current_graph_task_id() != -1


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func differentiates or maps with regard to the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def accumulates_now(parameter: Tensor) -> bool:
    """Whether the backward that runs now will add to the parameter's .grad, and no hook waits for the gradient."""
    if not parameter.is_leaf or parameter._backward_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # inside autograd.grad
        return False


def holders(tensor: Tensor) -> tuple[int, int, int]:
    """How many hold the tensor in autograd and in Python, and how many tensors its memory."""
    return tensor._use_count(), sys.getrefcount(tensor), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def unseen() -> AbstractContextManager[None]:
    """While entered, no mode of the user's sees what is computed."""
    return torch._C._DisableTorchDispatch()  # type: ignore[no-any-return, attr-defined]


def unwatched() -> AbstractContextManager[Any]:
    """While entered, no mode sees what is computed; tensors of subclasses are what they are."""
    return _disable_current_modes()


def num_changes(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return tensor._version


def tensor_without_memory(kind: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the subclass `kind` that has this shape and no storage."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def untouched() -> AbstractContextManager[None]:
    """While entered, functions of torch treat a tensor of a subclass as any other."""
    return torch._C.DisableTorchFunctionSubclass()  # type: ignore[no-any-return, attr-defined]
