"""Where the published runs lie, for the tests that read them; and no deadlines on a machine that may be busy."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

PUBLISHED_RUNS = Path(__file__).resolve().parents[2] / "shared" / "published-runs"


@pytest.fixture(scope="session")
def published_runs() -> Path:
    if not PUBLISHED_RUNS.is_dir():
        pytest.skip("the published runs are not beside this checkout")
    return PUBLISHED_RUNS
