"""What a training took beside its plan: the lines of `launch`, from records made up here."""

import json
import math

import pytest

from fourfold.launch.verdict import checked_prediction, read_phases, verdict
from fourfold.layouts.search.explain import TERMS

GIB = 1 << 30
TERMS_S = dict.fromkeys(TERMS, 0.0) | {"compute": 0.6, "tp_communication": 0.2, "optimizer": 0.1, "overhead": 0.1}
SAID = {"step_s": 1.0, "peak_gib": 2.0, "terms_s": TERMS_S, "cluster": "2 x cpu", "fit_probability": 0.9}


def result(step_s: float, reserved: float = 0.0) -> dict[str, object]:
    return {"steps_s": [9.0, step_s, step_s, step_s], "peak_bytes": 2.2 * GIB, "reserved_bytes": reserved * GIB}


def log(path, steps: list[dict[str, float | None]], *, before: str = "") -> None:
    lines = [json.dumps({"event": "step", **step}) for step in steps]
    path.write_text(before + '{"event": "start"}\n' + "\n".join(lines) + '\n{"event": "end"}\n{"half a li')


def phases(data=0.01, forward_backward=0.9, clip=0.02, update=0.08) -> dict[str, float | None]:
    return {"data_s": data, "forward_backward_s": forward_backward, "clip_s": clip, "update_s": update}


def test_both_peaks_are_told_beside_the_plan():
    prediction = checked_prediction(SAID, "layout.toml")
    assert verdict(prediction, result(1.1, reserved=2.5), {}) == [
        "a step took 1.1 s (planned 1 s, +10%); tensors held 2.2 GiB at most (planned 2, +10%), for which the "
        "allocator took 2.5 GiB from the device"
    ]
    assert verdict({}, result(1.1), {}) == ["a step took 1.1 s; tensors held 2.2 GiB at most"]


@pytest.mark.parametrize(
    ("step_s", "taken", "told"),
    [
        (1.14, phases(forward_backward=1.04), None),
        (
            1.4, phases(forward_backward=1.3),
            "40% slower than planned on 2 x cpu: forward and backward 1.3 s instead of 900 ms (compute 600 ms, "
            "tensor-parallel communication 200 ms, overhead and stragglers 100 ms)",
        ),
        (
            1.4, phases(data=0.4),
            "40% slower than planned on 2 x cpu: data and its batch 400 ms instead of next to nothing",
        ),
        (
            2.0, phases(data=0.3, clip=0.3, update=0.5),
            "100% slower than planned on 2 x cpu: clipping and update 800 ms instead of 100 ms (optimizer 100 ms); "
            "data and its batch 300 ms instead of next to nothing",
        ),
    ],
    ids=["as planned", "forward and backward", "data", "two phases"],
)  # fmt: skip
def test_a_slow_step_is_told_by_the_phases_that_took_longer(tmp_path, step_s, taken, told):
    log(tmp_path / "log.jsonl", [phases(9.0, 9.0, 9.0, 9.0), taken, taken, taken], before='{"event": "step"}\n')
    lines = verdict(checked_prediction(SAID, "layout.toml"), result(step_s), read_phases(tmp_path))
    assert lines[1:] == ([told] if told else [])


def test_without_phases_or_terms_a_slow_step_is_told_without_its_cause(tmp_path):
    assert read_phases(tmp_path) == {}
    log(tmp_path / "log.jsonl", [{}, {"data_s": None}])  # as a pipeline that never drains writes it
    assert read_phases(tmp_path) == {}
    prediction = checked_prediction(SAID, "layout.toml")
    assert verdict(prediction, result(2.0), {})[1].endswith("in which phase it is, this run cannot tell")
    older = {name: value for name, value in SAID.items() if name != "terms_s"}
    taken = {"data and its batch": 1.0, "forward and backward": 1.0, "clipping and update": 0.1}
    assert "cannot tell" in verdict(checked_prediction(older, ""), result(2.0), taken)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_s": math.nan}, "step_s=nan"),
        ({"step_s": 0}, "step_s=0"),
        ({"peak_gib": "much"}, "peak_gib='much'"),
        ({"terms_s": {"compute": -1}}, "compute=-1"),
        ({"terms_s": {"thinking": 1.0}}, "terms_s: it is a table of compute"),
        ({"terms_s": 3}, "terms_s: it is a table of compute"),
    ],
    ids=str,
)
def test_a_damaged_prediction_is_refused_before_anything_runs(change, message):
    with pytest.raises(ValueError, match=message):
        checked_prediction({**SAID, **change}, "layout.toml")
    assert checked_prediction({}, "layout.toml") == {"cluster": ""}
