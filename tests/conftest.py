"""Where the published runs lie, for the tests that read them; and no deadlines on a machine that may be busy."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.order import spread

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

PUBLISHED_RUNS = Path(__file__).resolve().parents[2] / "shared" / "published-runs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = spread(items, lambda item: item.nodeid.split("::")[0], lambda module: "/ranks/launch/" in module)


def pytest_collection_finish() -> None:
    """What stays for the whole session (torch, transformers, the tests) is none of the garbage collector's business."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def published_runs() -> Path:
    if not PUBLISHED_RUNS.is_dir():
        pytest.skip("the published runs are not beside this checkout")
    return PUBLISHED_RUNS


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left() -> Iterator[None]:
    """A process group that a test leaves behind changes what later tests of this process see."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("a test of this module left torch.distributed running")
