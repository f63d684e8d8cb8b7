"""Schedules as literal tables, their delays, memory and time, and the programs that must be refused."""

import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.parallel.pipeline.partition import owners
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.schedule import FLUSHED, NAMES, PipelineSchedule, async_speedup

LOCKSTEP = """
stage 0 | F0  F1  F2  F3  F4  B0* F5  B1* .   B2* .   B3* .   B4* .   B5*
stage 1 | .   F0  F1  F2  B0* F3  B1* F4  B2* F5  B3* .   B4* .   B5*
stage 2 | .   .   F0  B0* F1  B1* F2  B2* F3  B3* F4  B4* F5  B5*
"""
PIPEDREAM = """
stage 0 | F0  F1  F2  .   .   B0* F3  B1* F4  B2* F5  B3* .   B4* .   B5*
stage 1 | .   F0  F1  .   B0* F2  B1* F3  B2* F4  B3* F5  B4* .   B5*
stage 2 | .   .   F0  B0* F1  B1* F2  B2* F3  B3* F4  B4* F5  B5*
"""
ZERO_BUBBLE = """
stage 0 | F0  F1  F2  .   .   I0  W0  I1  W1  I2  W2*
stage 1 | .   F0  F1  .   I0  F2  I1  W0  I2  W1  W2*
stage 2 | .   .   F0  I0  F1  I1  F2  I2  W0  W1  W2*
"""
STREAMS = st.tuples(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 7), st.integers(1, 20))


def make(name: str, num_stages: int, every: int) -> PipelineSchedule:
    every = {"lockstep": 1, "1f1b-async": 1, "2bw": every + num_stages}.get(name, every)
    return PipelineSchedule(name=name, num_stages=num_stages, update_every=every)


@pytest.mark.parametrize(("name", "drawn"), [("lockstep", LOCKSTEP), ("1f1b-async", PIPEDREAM)])
def test_the_asynchronous_schedules_as_drawn(name, drawn):
    assert PipelineSchedule.named(name, 3).program(6).drawn() == drawn.strip()


def test_zero_bubble_as_drawn():
    assert PipelineSchedule.named("zb-h1", 3).program(3).drawn() == ZERO_BUBBLE.strip()


def test_delays_are_those_of_the_papers():
    for num_stages in range(1, 7):
        stages = range(num_stages)
        behind = [num_stages - 1 - stage for stage in stages]
        assert PipelineSchedule.named("lockstep", num_stages).delays() == [2 * b for b in behind]
        assert PipelineSchedule.named("1f1b-async", num_stages).delays() == behind
        assert PipelineSchedule.named("2bw", num_stages).delays() == [1] * num_stages
        assert PipelineSchedule(name="paci", num_stages=num_stages, update_every=4).delays() == [b / 4 for b in behind]
        for name in FLUSHED:
            assert PipelineSchedule.named(name, num_stages).delays() == [0] * num_stages


@settings(deadline=None)  # the machine may be busy
@given(STREAMS)
def test_every_schedule_validates_prints_and_parses_back(stream):
    name, num_stages, every, count = stream
    schedule = make(name, num_stages, every)
    program = schedule.program(count)
    program.validate()
    for text in (str(program), program.drawn()):
        assert Program.parse(text, double_buffered=schedule.double_buffered) == program
    # the rule's own account of versions agrees with a count over the written-out program
    for stage in range(num_stages):
        rule = schedule.versions(stage)
        assert [next(rule) for _ in range(count)] == list(program.versions(stage))


@settings(deadline=None)  # the machine may be busy
@given(STREAMS)
def test_no_gradient_is_older_than_the_stated_delay(stream):
    name, num_stages, every, count = stream
    schedule = make(name, num_stages, every)
    for stage, delay in enumerate(schedule.delays()):
        ages = [own - seen for seen, own in schedule.program(count).versions(stage)]
        assert min(ages) >= 0
        assert max(ages) < delay + 1


def test_an_endless_stream_is_read_only_as_far_as_needed():
    pulled = []
    stream = (pulled.append(i) or i for i in range(10**9))
    actions = PipelineSchedule.named("lockstep", 4).actions(0, stream)
    kinds = [next(actions).kind for _ in range(8)]
    assert kinds == ["F"] * 7 + ["B"]
    assert len(pulled) == 7


def test_memory_in_flight():
    def peaks(name: str, every: int = 1) -> list[int]:
        schedule = PipelineSchedule(name=name, num_stages=4, update_every=every)
        return [schedule.in_flight(stage) for stage in range(4)]

    assert peaks("lockstep") == [7, 5, 3, 1]
    assert peaks("1f1b-async") == peaks("1f1b", 8) == [4, 3, 2, 1]
    assert peaks("gpipe", 8) == [8] * 4
    assert peaks("zb-h1", 8) == [4] * 4
    lockstep = PipelineSchedule.named("lockstep", 4)
    assert [lockstep.weight_versions(stage, stash=True) for stage in range(4)] == [7, 5, 3, 1]
    assert [lockstep.weight_versions(stage) for stage in range(4)] == [1] * 4
    assert PipelineSchedule.named("2bw", 4).weight_versions(0) == 2


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 6), st.integers(1, 12))
def test_makespans_are_those_of_theory(num_stages, count):
    def makespan(name: str, **times: float) -> float:
        schedule = PipelineSchedule(name=name, num_stages=num_stages, update_every=count)
        return schedule.program(count).simulate(**times).makespan

    # forward 1, backward 2, weight half 1
    assert makespan("1f1b", backward_s=2.0) == makespan("gpipe", backward_s=2.0) == 3 * (count + num_stages - 1)
    if count >= num_stages:
        assert makespan("zb-h1") == 3 * count + num_stages - 1
    for name in ("lockstep", "1f1b-async"):
        schedule = PipelineSchedule.named(name, num_stages)
        long, longer = (schedule.program(n).simulate(backward_s=2.0).makespan for n in (40, 41))
        assert longer - long == 3  # no bubble: one more micro-batch costs one forward and one backward


def test_speedup_over_a_flushed_pipeline():
    for num_stages, count in ((2, 1), (4, 2), (4, 8)):
        flushed = PipelineSchedule(name="1f1b", num_stages=num_stages, update_every=count)
        long, short = (flushed.program(n * count).simulate(backward_s=2.0).makespan for n in (5, 4))
        assert (long - short) / (3 * count) == async_speedup(num_stages, count)


def test_slow_links_and_uneven_stages_are_simulated():
    program = PipelineSchedule.named("1f1b", 2).program(2)
    assert program.simulate(forward_s=[1, 2], backward_s=[2, 4], link_s=0.5).makespan == 1 + 0.5 + 2 * 6 + 0.5 + 2
    assert PipelineSchedule.named("1f1b", 1).bubble(4) == 0
    assert PipelineSchedule.named("1f1b:4", 4).bubble(4) == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("stage 0 | B0* F0", "0B0 comes before its forward"),
        ("stage 0 | F0 F1 B0*", "micro-batch 1 has a forward, but no whole backward"),
        ("stage 0 | F0 B0", "no update uses the gradient of micro-batch 0"),
        ("stage 0 | F0 F0 B0*", "0F0 runs twice"),
        ("stage 0 | F0 W0* I0", "0W0 comes before its input gradient"),
        ("stage 0 | F0 F1 B1* B0*", "in the order of the forwards"),
        ("stage 0 | F0 B0*\nstage 1 | F0 F1 B0 B1*", "1F1 has no partner at the other end of its link"),
        ("stage 0 | F1 F0 B1 B0*\nstage 1 | F0 F1 B0 B1*", "the order along a link must agree"),
        ("stage 0 | F0 B0 F1 B1*\nstage 1 | F0 F1 B0 B1*", "wait for one another for ever at 0B0, 1F1"),
        ("stage 0 | F0 X0*", "is no action"),
        ("nothing", "one line"),
    ],
)
def test_programs_that_cannot_run_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Program.parse(table).validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fast", "num_stages": 2}, "'fast' is not known"),
        ({"name": "1f1b", "num_stages": 0}, "num_stages=0"),
        ({"name": "lockstep", "num_stages": 2, "update_every": 2}, "use 'paci'"),
        ({"name": "2bw", "num_stages": 4, "update_every": 3}, "needs update_every >= 4"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PipelineSchedule(**arguments)


def test_a_program_refuses_a_stream_of_another_length():
    program = PipelineSchedule.named("1f1b", 2).program(3)
    for count in (2, 4):
        with pytest.raises(ValueError, match="the program is for"):
            list(program.actions(0, iter(range(count))))


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 4))
def test_the_largest_share_is_nearly_as_small_as_any(sizes, num_owners):
    found = owners(sizes, num_owners)
    shares = [sum(size for size, owner in zip(sizes, found, strict=True) if owner == who) for who in range(num_owners)]
    assert len(found) == len(sizes)
    assert sum(shares) == sum(sizes)
    best = min(
        max(sum(size for size, owner in zip(sizes, tried, strict=True) if owner == who) for who in range(num_owners))
        for tried in product(range(num_owners), repeat=len(sizes))
    )
    assert 3 * max(shares) <= 4 * best  # Graham's bound


def test_owners_are_the_same_on_every_rank():
    assert owners([3, 8, 3, 1, 8], 3) == [2, 0, 2, 2, 1]
    assert owners([2], 3) == [0]
    assert owners([], 2) == []


def test_schedules_do_not_import_torch():
    code = (
        "import sys; from fourfold.parallel.pipeline import PipelineSchedule, Mitigation, balanced_ranges; "
        "PipelineSchedule.named('lockstep', 4).delays(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"], check=True)
