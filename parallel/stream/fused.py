"""Fused kernels for what surrounds matrix products in a layer: norms, rotary embeddings, gated activations.

In a model's own code each of these is some ten kernels in fp32 on a GPU, and copies between them: at 32k tokens more of
a streamed layer's time than its matrix products beside attention. Liger-Kernel has each as one Triton kernel; where it
is installed, and tensors are on CUDA, its kernels take the place of the modules' own forwards while the model streams.

What is computed stays the model's: a kernel is taken for a kind of modules (a class, its code, and what they were made
with) only after it gave such a module's own output and gradients for a few random numbers, within the rounding of their
dtype. Everything else keeps its own code: modules that somebody gave a forward, activations that hooks look at.
"""

import importlib.util
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fourfold.parallel.stream.gradients import autocast_now, own_saved_tensors
from fourfold.parallel.stream.patching import (
    ROTARY,
    Patches,
    Rotary,
    has_own_forward,
    hooks_of,
    hooks_of_all_modules,
    swapped_parameters,
    unwatched,
)

# What a kernel's output and gradients may differ by from the module's own, relative L2: some roundings of the dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Forms of RMS norm among transformers' models: (added to the weight, whether the weight multiplies before rounding).
NORMS: tuple[tuple[float, str], ...] = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))
TRIED_ROWS = 3
# Of attributes that say what a module was made with.
PLAIN_TYPES = frozenset((bool, int, float, str, NoneType, FunctionType, BuiltinFunctionType))
Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels of one kind of device.

    Attributes:
        device_type: where they run.
        rms_norm: (x, weight, eps, added to the weight, casting mode) to x's shape.
        silu_mul, gelu_mul: activation(a) * b.
        rotary: (q [B, H, S, D], k, cos [1 or B, S, D], sin) to both, rotated; may overwrite q and k.
    """

    device_type: str
    rms_norm: Callable[[Tensor, Tensor, float, float, str], Tensor]
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    gelu_mul: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@lru_cache(maxsize=1)
def liger() -> "Fused | None":
    """Liger-Kernel's, or None where it or Triton is not installed. Not yet run here: no GPU was at hand."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return None
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)  # type: ignore[no-any-return]

    return Fused(
        Kernels("cuda", rms_norm, LigerSiLUMulFunction.apply, LigerGELUMulFunction.apply, LigerRopeFunction.apply)
    )


@dataclass(slots=True)
class Fused:
    """Kernels, and for which kinds of modules they were found to compute the same."""

    kernels: Kernels
    _norms: dict[Hashable, tuple[float, str] | None] = field(default_factory=dict)
    _gates: dict[Hashable, Callable[[Tensor, Tensor], Tensor] | None] = field(default_factory=dict)
    _rotary: dict[Hashable, torch.dtype | None] = field(default_factory=dict)

    def replace_in(self, layer: nn.Module, patches: Patches) -> None:
        """Let the layer's norms and gated activations be fused, until patches.undo."""
        for module in layer.modules():
            replacement = self.replacement(module)
            if replacement is not None:
                patches.add(module, replacement)

    def replacement(self, module: nn.Module) -> Callable[..., Any] | None:
        """What takes the place of the module's forward, called with that forward first; None leaves it."""
        if has_own_forward(module):
            return None
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
        if type(module).__name__.endswith("RMSNorm"):
            weighted = isinstance(getattr(module, "weight", None), Tensor) and _epsilon(module) is not None
            run = self._norm if weighted else None
        else:
            gated = all(isinstance(part, nn.Module) for part in parts) and len(list(module.children())) == 4
            run = self._gate if gated else None
        if run is None:
            return None

        def forward(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            usual = len(args) == 1 and not kwargs and self._here(args[0])
            return run(module, plain, args[0]) if usual else plain(*args, **kwargs)

        return forward

    def rotary(self, attention: nn.Module) -> Rotary | None:
        """(names that the module's code sees, what is to stand there for its rotary embedding); None leaves it."""
        names: dict[str, Any] = getattr(type(attention).forward, "__globals__", {})
        plain = names.get(ROTARY)
        if plain is None:
            return None

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            usual = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
            dtype = self._rotated_dtype(plain, q, (cos, sin)) if usual and self._here(q) else None
            if dtype is not None:
                return self._rotated(q, k, (cos, sin), dtype)
            return plain(q, k, cos, sin, *args, **kwargs)

        return names, rotate

    def taken(self) -> dict[str, int]:
        """For how many kinds of norms, gated activations and rotary embeddings a kernel was taken so far."""
        return {
            "norms": sum(form is not None for form in self._norms.values()),
            "gates": sum(kernel is not None for kernel in self._gates.values()),
            "rotary": sum(dtype is not None for dtype in self._rotary.values()),
        }

    def _here(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.kernels.device_type and x.dtype in TOLERANCES

    def _norm(self, module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        eps = _epsilon(module)
        if eps is None:
            return plain(x)

        def normed(form: tuple[float, str]) -> Callable[[Tensor], Tensor]:
            # The kernel gives what it takes; Llama's code multiplies by the weight last, and gives the wider of both.
            wide = torch.promote_types(x.dtype, module.weight.dtype) if form[1] == "llama" else x.dtype
            return lambda y: self.kernels.rms_norm(y.to(wide), module.weight, eps, *form)

        key = (*_kind(module), x.dtype, module.weight.dtype)
        if key not in self._norms:
            # Rows of the epsilon's size, too: where it is added shows there alone.
            scales = [1.0, eps**0.5, 30.0]
            errors = {form: _difference(plain, normed(form), x, module, scales) for form in NORMS}
            self._norms[key] = _best(errors, x.dtype)
        form = self._norms[key]
        return plain(x) if form is None else normed(form)(x)

    def _gate(self, module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        products, activation = _products_dtype(x), module.act_fn
        watched = hooks_of(activation) or hooks_of_all_modules() or has_own_forward(activation)
        if products not in TOLERANCES or watched:
            return plain(x)

        def gated(kernel: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda y: module.down_proj(kernel(module.gate_proj(y), module.up_proj(y)))

        key = (*_kind(module), *_kind(activation), x.dtype, products)
        if key not in self._gates:
            kernels = [k for k in (self.kernels.silu_mul, self.kernels.gelu_mul) if _is_gate(k, activation, x)]
            errors = {kernel: _difference(plain, gated(kernel), x, module) for kernel in kernels}
            self._gates[key] = _best(errors, products)
        kernel = self._gates[key]
        return plain(x) if kernel is None else gated(kernel)(x)

    def _rotated(self, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Rotated where both are exact: under autocast, and in some models always, angles are wider than queries."""
        wide = torch.promote_types(q.dtype, angles[0].dtype)
        rotated = self.kernels.rotary(*(x.to(wide) for x in (q, k, *angles)))
        return [x.to(dtype) for x in rotated]

    def _rotated_dtype(self, plain: Callable[..., Any], q: Tensor, angles: tuple[Tensor, Tensor]) -> torch.dtype | None:
        """What the model's own code gives for such queries; None if the kernel gives something else."""
        key = (plain, q.dtype, angles[0].dtype, q.shape[-1])
        if key not in self._rotary:
            cos, sin = (angle[:1, -TRIED_ROWS:] for angle in angles)
            heads = [_random((1, 2, cos.shape[1], q.shape[-1]), q, seed=seed) for seed in range(2)]
            with torch.no_grad(), unwatched():
                dtype: torch.dtype = plain(*heads, cos, sin)[0].dtype
            error = _worst(
                lambda a, b: plain(a, b, cos, sin),
                lambda a, b: self._rotated(a.clone(), b.clone(), (cos, sin), dtype),
                heads,
            )
            self._rotary[key] = dtype if error <= TOLERANCES[q.dtype] else None
        return self._rotary[key]


def _kind(module: nn.Module) -> tuple[Hashable, ...]:
    """What modules have in common that compute the same from the same parameters and inputs."""
    made = [
        item for item in vars(module).items()
        if item[0][0] != "_" and type(item[1]) in PLAIN_TYPES and item[0] != "training"
    ]  # fmt: skip
    return type(module), type(module).forward, *made


def _products_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x comes in."""
    autocast = autocast_now(x.device.type)
    return x.dtype if autocast is None else autocast[1]


def _epsilon(module: nn.Module) -> float | None:
    """What a norm adds to the mean square; None where it does not say."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float | int) else None


def _best(errors: Mapping[Choice, float], dtype: torch.dtype) -> Choice | None:
    """The choice with the least error, if that is rounding."""
    found = min(errors, key=lambda choice: errors[choice], default=None)
    return found if found is not None and errors[found] <= TOLERANCES[dtype] else None


def _difference(
    plain: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor], like: Tensor, module: nn.Module,
    scales: Sequence[float] = (1.0,) * TRIED_ROWS,
) -> float:  # fmt: skip
    """How far apart the two are for a few random rows such as `like` has, of these sizes, and their gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    x = _random((1, len(scales), like.shape[-1]), like, seed=0)
    x *= torch.tensor(scales, dtype=like.dtype, device=like.device).unsqueeze(-1)
    # Leaves in the parameters' places: nobody's hooks are to see gradients of this.
    with swapped_parameters(module, parameters) as leaves:
        return _worst(lambda y: (plain(y),), lambda y: (fused(y),), [x], leaves)


def _is_gate(kernel: Callable[[Tensor, Tensor], Tensor], activation: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether the kernel is this activation times its other input, in fp32 and where the activation is bent.

    In a module with small weights of the gate all there is of it is its slope at zero, and in bf16 GELU's two formulas
    are one.
    """
    wide, other = (_random((TRIED_ROWS, 64), like, seed).float() for seed in range(2))
    error = _worst(lambda a, b: (activation(a) * b,), lambda a, b: (kernel(a, b),), [2 * wide, other])
    return error <= TOLERANCES[torch.float32]


def _random(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=like.dtype)


def _worst(
    plain: Callable[..., Sequence[Tensor]], fused: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> float:  # fmt: skip
    """The largest relative L2 difference of outputs and of gradients of inputs and parameters; inf, if one has none or
    comes in another dtype.

    A checkpoint around the layer neither keeps nor counts what is computed here.
    """
    results, given = [], list[Tensor]()
    for function in (plain, fused):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.enable_grad(), own_saved_tensors(), unwatched():
            outs = function(*leaves)
        # Not along the inputs: no gradient of a norm is left of such, only rounding.
        given = given or [_random(out.shape, out, seed=2 + index) for index, out in enumerate(outs)]
        with own_saved_tensors(), unwatched():
            grads = torch.autograd.grad(outs, [*leaves, *parameters], given, allow_unused=True)
        # Kernels give gradients in the memory of what they kept, which has a graph.
        results.append([None if x is None else x.detach() for x in (*outs, *grads)])
    errors = [0.0]
    for expected, found in zip(*results, strict=True):
        if expected is None or found is None or found.dtype != expected.dtype:
            errors.append(0.0 if expected is found else math.inf)
        else:
            difference = float((found.double() - expected.double()).norm())
            errors.append(difference / max(float(expected.double().norm()), 1e-30))
    return max(errors) if all(math.isfinite(error) for error in errors) else math.inf
