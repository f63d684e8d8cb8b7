"""In which order modules of tests run."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

Item = TypeVar("Item")

OTHERS_BETWEEN = 3


def spread(items: Iterable[Item], module_of: Callable[[Item], str], waits: Callable[[str], bool]) -> Sequence[Item]:
    """The items with the modules that mostly wait apart from each other, each after three that compute.

    Two workers that start processes at the same time, and wait for them, leave cores idle. Modules stay whole, and keep
    their order among those that wait and among the others; of those that wait, what is left over comes last.
    """
    modules = [(name, list(group)) for name, group in groupby(items, key=module_of)]
    waiting = [group for name, group in modules if waits(name)]
    others = [group for name, group in modules if not waits(name)]
    found: list[Item] = []
    for number, group in enumerate(others, start=1):
        found += group
        if number % OTHERS_BETWEEN == 0 and waiting:
            found += waiting.pop(0)
    return found + [item for group in waiting for item in group]
