"""Comparisons that tell, when they fail, which parameter, which rank, under which layout, and by how much.

`torch.testing.assert_close` names an element's index; here a whole parameter is one figure, the relative L2 error,
because roundings of single elements have no bound relative to themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Below this part of the largest gradient's norm a gradient is zero but for rounding.
NEGLIGIBLE = 1e-6


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Backpropagate `loss` into empty gradients and return copies of them by parameter name."""
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may have in parts; every rank of a DTensor's mesh calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, both taken to fp64; 0 where both are zero."""
    difference = float((found.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), 1e-30)


def gradient_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative L2 error of each parameter's gradient, by name.

    A gradient that is zero but for rounding (queries of a token that sees one key), below NEGLIGIBLE of the largest
    one, has no relative error: its difference counts against the largest.

    Raises:
        AssertionError: the two have not the same parameters; names those of one side alone.
    """
    if found.keys() != expected.keys():
        raise AssertionError(
            f"gradients of {sorted(expected.keys() - found.keys())} are missing, "
            f"and {sorted(found.keys() - expected.keys())} were not expected"
        )
    norms = {name: float(grad.double().norm()) for name, grad in expected.items()}
    largest = max(norms.values())
    return {
        name: float((found[name].double() - grad.double()).norm())
        / (norms[name] if norms[name] > NEGLIGIBLE * largest else largest)
        for name, grad in expected.items()
    }


def worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest of `gradient_errors`, for tables; a test calls `assert_gradients`, which names the parameter."""
    return max(gradient_errors(found, expected).values())


def assert_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, where: str = ""
) -> None:
    """Fail with every parameter whose gradient is off by more than `tolerance`, the worst first.

    Args:
        tolerance: of `gradient_errors`.
        where: what was run (the layout, the rank, the loss), for the message.
    Raises:
        AssertionError: names `where`, each parameter and its error.
    """
    errors = gradient_errors(found, expected)
    assert_errors({f"gradient of {name}": error for name, error in errors.items()}, tolerance, where)


def assert_errors(errors: Mapping[str, float], tolerance: float, where: str = "") -> None:
    """Fail with every figure above `tolerance`, or not a number, the worst first.

    Args:
        errors: by what was compared.
        where: what was run, for the message.
    Raises:
        AssertionError: names `where` and up to a dozen of the figures.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if not wrong:
        return
    # `error != error`: a NaN sorts before any number.
    worst = sorted(wrong.items(), key=lambda item: (item[1] != item[1], item[1]), reverse=True)
    told = "\n".join(f"  {name}: {error:.3g}" for name, error in worst[:12])
    raise AssertionError(f"{where}\n{len(wrong)} of {len(errors)} errors are above {tolerance:g}\n{told}".strip())


def assert_ranks(answers: Sequence[Mapping[str, float]], tolerance: float, where: str = "") -> None:
    """`assert_errors` for what each rank of a pool answered; the message names the rank, too.

    Raises:
        AssertionError: of the first rank with a figure above `tolerance`.
    """
    for rank, errors in enumerate(answers):
        assert_errors(errors, tolerance, f"{where}, rank {rank}".removeprefix(", "))


def assert_same(
    found: Iterable[tuple[str, Tensor]], expected: Iterable[tuple[str, Tensor]], where: str = "", atol: float = 0.0
) -> None:
    """Fail unless two sets of named tensors (`named_parameters()`) are equal, by default bit for bit.

    Args:
        atol: the largest difference of an element that is still equal.
    Raises:
        AssertionError: names the tensors of one side alone, or each that differs with its largest difference.
    """
    mine, truth = dict(found), dict(expected)
    if mine.keys() != truth.keys():
        raise AssertionError(f"{where}\n{sorted(mine.keys() ^ truth.keys())} are on one side alone".strip())
    kinds = {
        name: f"{name} is {tuple(mine[name].shape)} {mine[name].dtype}, not {tuple(value.shape)} {value.dtype}"
        for name, value in truth.items()
        if (mine[name].shape, mine[name].dtype) != (value.shape, value.dtype)
    }
    if kinds:
        raise AssertionError(f"{where}\n{'; '.join(kinds.values())}".strip())
    errors = {
        f"largest difference of {name}": float((mine[name].double() - value.double()).abs().max())
        for name, value in truth.items()
        if not torch.equal(mine[name], value)
    }
    assert_errors(errors, atol, where)


def state_differences(found: Any, expected: Any, name: str = "state") -> list[str]:
    """Where two state dicts differ by as much as a bit, as paths into them (`state['optimizer'][0]`).

    Args:
        found, expected: tensors, numbers, strings, and dicts and lists of them.
    """
    if isinstance(expected, Tensor):
        equal = isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
        return [] if equal else [name]
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        parts = [state_differences(found[key], value, f"{name}[{key!r}]") for key, value in expected.items()]
        return [path for part in parts for path in part]
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [path for at, (mine, other) in pairs for path in state_differences(mine, other, f"{name}[{at}]")]
    return [] if found == expected else [name]
