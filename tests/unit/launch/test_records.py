"""What a run leaves is read again whatever a machine that went down has made of it."""

import json
from functools import partial
from pathlib import Path

import pytest

from fourfold.launch.training.loop import StepRecord
from fourfold.launch.training.records import Log, Metrics


def row(step: int) -> StepRecord:
    return StepRecord(step, 5.0 - step, 1.0, 1e-3, 0.1)


@pytest.mark.parametrize("end", [b"", b"2,", b"2,3.0,1.0,0.00", b"\0\0\0\0", b"\xff\xfe,1", b"what\n7,1,2,3,4,5,6,7\n"])
def test_metrics_go_on_below_the_whole_rows(tmp_path, end):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, resume=False)
    metrics.add(row(0))
    metrics.add(row(1))
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    again = Metrics(path, resume=True)
    again.add(row(2))
    again.add(row(3))
    lines = path.read_text().splitlines()
    assert path.read_bytes().startswith(whole)
    assert [line.split(",")[0] for line in lines] == ["step", "0", "1", "2", "3"]
    assert {line.count(",") for line in lines} == {4}


def test_a_log_goes_on_below_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path).add("start", ranks=2)
    path.write_bytes(path.read_bytes() + b'{"event": "st')
    Log(path).add("step", loss=float("nan"))
    first, half, last = path.read_text().splitlines()
    assert json.loads(first)["ranks"] == 2
    assert half == '{"event": "st'
    assert json.loads(last)["loss"] is None


@pytest.mark.parametrize("kind", ["metrics", "log"])
def test_a_full_disk_is_one_line(monkeypatch, kind):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    if kind == "log":
        write = partial(Log(full).add, "start")
    else:
        monkeypatch.setattr(Path, "with_name", lambda self, name: self)
        write = partial(Metrics(full, resume=False).add, row(0))
    with pytest.raises(
        ValueError, match=r"/dev/full could not be written: No space left on device: make room"
    ) as error:
        write()
    assert "\n" not in str(error.value)
