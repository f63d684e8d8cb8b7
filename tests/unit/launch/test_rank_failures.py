"""Which rank a failed run is put down to, and what a rank leaves of its traceback when it is ended as it writes."""

import json
import os
import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fourfold.launch import error_file
from fourfold.launch.error_file import ERROR_FILE, recorded
from fourfold.launch.processes import RankFailure, start_ranks

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """What `start_ranks` raises where the agent saw these ranks end, the first one first."""

    def report(**ends: tuple[int, str | None, int]) -> RankFailure:
        failures = {}
        for name, (exit_code, error, at) in ends.items():
            path = tmp_path / name
            if error is not None:
                told = {"py_callstack": f"Traceback: a line that stops at nothing\n{error}", "timestamp": str(at)}
                path.write_text(json.dumps({"message": {"message": error, "extraInfo": told}}))
            rank = int(name.removeprefix("rank"))
            failures[rank] = ProcessFailure(rank, 100 + rank, exit_code, str(path))
            failures[rank].timestamp = at

        def fail(*_: object) -> None:
            raise ChildFailedError("python", failures)

        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: fail)
        with pytest.raises(RankFailure) as failure:
            start_ranks("anything", [], num_ranks=len(ends), device_type="cpu")
        return failure.value

    return report


@pytest.mark.parametrize("killed_at", [9, 10, 11])
def test_a_killed_rank_is_named_and_not_one_that_lost_it(reported, killed_at):
    failure = reported(rank0=(1, LOST, 10), rank1=(-signal.SIGKILL, None, killed_at))
    assert str(failure).startswith("rank 1 of 2 failed: Signal 9 (SIGKILL)")


def test_a_refusal_is_named_and_not_a_rank_that_lost_it(reported):
    assert reported(rank0=(1, LOST, 10), rank1=(2, None, 11)).exit_code == 2


def test_of_two_errors_the_one_that_does_not_speak_of_others_is_named(reported):
    failure = reported(rank0=(1, LOST, 10), rank1=(1, "ArithmeticError: deliberate", 10))
    assert str(failure).startswith("rank 1 of 2 failed: Traceback")
    assert str(failure).endswith("ArithmeticError: deliberate")


def test_a_rank_that_the_agent_ended_is_never_named(reported):
    failure = reported(rank0=(-signal.SIGTERM, None, 9), rank1=(1, "ArithmeticError: deliberate", 10))
    assert str(failure).startswith("rank 1 of 2 failed: Traceback")


def test_where_all_lost_somebody_the_first_is_named(reported):
    assert str(reported(rank0=(1, LOST, 11), rank1=(1, LOST, 10))).startswith("rank 1 of 2")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    return path


def fails() -> None:
    raise ArithmeticError("deliberate failure")


def test_the_agent_reads_what_a_rank_left(file):
    with pytest.raises(ArithmeticError, match="deliberate"):
        recorded(fails)()
    left = ProcessFailure(1, 100, 1, str(file))
    assert left.message["message"] == "ArithmeticError: deliberate failure"
    assert 'raise ArithmeticError("deliberate failure")' in left.message["extraInfo"]["py_callstack"]
    assert left.timestamp > 0
    assert os.listdir(file.parent) == [file.name]


def test_a_rank_ended_as_it_writes_leaves_no_file_that_cannot_be_read(file, monkeypatch):
    """The agent's signal may come between any two of a rank's instructions, and the agent fails on half a file."""

    def ended(told: object, unfinished: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(error_file.json, "dump", ended)
    with pytest.raises(KeyboardInterrupt):
        recorded(fails)()
    assert not file.exists()
    assert ProcessFailure(1, 100, -signal.SIGTERM, str(file)).message.startswith("Signal 15 (SIGTERM)")


def test_without_an_agent_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(ERROR_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArithmeticError, match="deliberate"):
        recorded(fails)()
    assert os.listdir(tmp_path) == []
