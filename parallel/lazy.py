"""Names that a package offers and imports only when they are asked for (PEP 562).

The planner imports this package's torch-free parts (rank arithmetic, schedules, closed forms of memory) and must not
pay for torch, so no `__init__` here may import what it exports.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def exported(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its name, as `__name__` has it.
        homes: for each exported name the module, below the package, that defines it.
    Raises:
        AttributeError: from `__getattr__`, where the package does not offer the name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"{package} has no {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    names = sorted(homes)
    return get, lambda: names, names
