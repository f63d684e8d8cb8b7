"""docs/integrations.md sets Accelerate's words beside ours: they are the fields of its ParallelismConfig."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate import ParallelismConfig

from fourfold.parallel.decoder import from_parallelism_config

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"cp_size", "sp_size", "tp_size", "dp_shard_size", "dp_replicate_size"}


def test_the_table_has_every_size_that_accelerate_knows():
    text = (ROOT / "docs" / "integrations.md").read_text()
    table = text.partition("| Accelerate's ParallelismConfig | here |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == SIZES
    assert {field.name for field in fields(ParallelismConfig) if field.name.endswith("_size")} == SIZES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_replicate_size": 2, "dp_shard_size": 3}, "use dp_shard_size=6 and dp_replicate_size=1"),
        ({"sp_size": 4}, "sp_size=4.*use cp_size=4.*heads_degree=4"),
        ({"tp_size": 5}, "tp=5 needs 5 ranks, but the world has 1"),
    ],
)
def test_what_parallelize_has_not_is_refused_in_accelerates_words(sizes, message):
    with pytest.raises(ValueError, match=message):
        from_parallelism_config(ParallelismConfig(**sizes))
