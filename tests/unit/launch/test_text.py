"""The training text: real, split by file, and a function of seed, step and row alone."""

from zlib import crc32

import pytest
import torch

from fourfold.launch.training import data
from fourfold.launch.training.data import byte_frequency_loss, held_out_rows, read_standard_library, training_rows

TEXT = torch.arange(1000, dtype=torch.int64).remainder(256).to(torch.uint8)


def test_the_standard_library_is_text_and_is_split():
    train, held_out = read_standard_library()
    assert len(train) > 1_000_000
    assert 0.02 < len(held_out) / len(train) < 0.3
    assert b"def " in bytes(train[:100_000].tolist())


def test_what_is_not_the_standard_library_is_left_out(tmp_path, monkeypatch):
    """In the order of the whole paths, part by part: `a/b.py` comes before `a.py`."""
    names = ["a.py", "a/b.py", "a/test/no.py", "a/notes.txt", "site-packages/no.py", "z.py", "tests.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(data, "_HELD_OUT_EVERY", 2)  # of four files some go to each part
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, held_out = read_standard_library()
    parts = [bytes(part.tolist()).decode() for part in (train, held_out)]
    kept = ["a/b.py", "a.py", "tests.py", "z.py"]
    assert sorted(parts) == sorted(
        "".join(name for name in kept if (crc32(name.encode()) % 2 == 0) == held) for held in (False, True)
    )


def test_ranks_read_disjoint_rows_of_one_batch():
    whole = training_rows(TEXT, seq_len=8, global_batch=6, step=3, seed=1, rows=slice(0, 6))
    parts = [training_rows(TEXT, seq_len=8, global_batch=6, step=3, seed=1, rows=slice(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (6, 8)
    assert ((whole[:, 1:] - whole[:, :-1]) % 256 == 1).all()  # consecutive bytes


def test_steps_and_seeds_differ():
    first = training_rows(TEXT, seq_len=8, global_batch=6, step=0, seed=1, rows=slice(0, 6))
    for step, seed in ((1, 1), (0, 2)):
        assert not torch.equal(
            first, training_rows(TEXT, seq_len=8, global_batch=6, step=step, seed=seed, rows=slice(0, 6))
        )


def test_held_out_rows_span_the_text():
    rows = held_out_rows(TEXT, seq_len=8, num_rows=3, rows=slice(0, 3))
    assert rows[:, 0].tolist() == [0, 496 % 256, 992 % 256]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="seq_len=2000 is longer than the text of 1000 bytes"):
        training_rows(TEXT, seq_len=2000, global_batch=1, step=0, seed=0, rows=slice(0, 1))


def test_byte_frequencies_know_no_more_than_the_entropy():
    uniform = torch.arange(256, dtype=torch.uint8)
    assert byte_frequency_loss(uniform, uniform) == pytest.approx(5.545177, abs=1e-6)  # ln 256
    constant = torch.zeros(10_000, dtype=torch.uint8)
    assert byte_frequency_loss(constant, constant) == pytest.approx(0.025, abs=1e-3)  # ln(10256/10001)
