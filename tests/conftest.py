"""Where the published runs lie, for the tests that read them."""

from pathlib import Path

import pytest

PUBLISHED_RUNS = Path(__file__).resolve().parents[2] / "shared" / "published-runs"


@pytest.fixture(scope="session")
def published_runs() -> Path:
    if not PUBLISHED_RUNS.is_dir():
        pytest.skip("the published runs are not beside this checkout")
    return PUBLISHED_RUNS
