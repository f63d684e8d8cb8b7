"""docs/integrations.md sets Accelerate's words beside ours: they are the fields of its ParallelismConfig."""

import re
from dataclasses import fields
from pathlib import Path

from accelerate import ParallelismConfig

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"cp_size", "sp_size", "tp_size", "dp_shard_size", "dp_replicate_size"}


def test_the_table_has_every_size_that_accelerate_knows():
    text = (ROOT / "docs" / "integrations.md").read_text()
    table = text.partition("| Accelerate's ParallelismConfig | here |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == SIZES
    assert {field.name for field in fields(ParallelismConfig) if field.name.endswith("_size")} == SIZES
