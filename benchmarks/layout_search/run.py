"""How right and how fast the planner is: accuracy on held-out sweeps, search speed, the study's findings.

    PYTHONPATH=src python -m benchmarks.layout_search.run [--runs FOLDER] [--quick]

The peers' figures are those of the study in README.md (their tools were calibrated on the same three sweeps and scored
on held-back rows); ours here are of each published sweep predicted by constants fitted on the others.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from benchmarks.layout_search.findings import findings
from benchmarks.layout_search.software import held_out, shipped
from benchmarks.rows import measurement, write_rows

from fourfold.layouts.cost.price import PricedLayout
from fourfold.layouts.evidence.calibration import cross_validate
from fourfold.layouts.evidence.fit import load_prior_fit
from fourfold.layouts.evidence.runs import Run, read_runs
from fourfold.layouts.evidence.study import STUDY
from fourfold.layouts.evidence.validation import Scores, price_runs, score
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

HERE = Path(__file__).parent
FILES = ("hagemann2023_main_sweep.csv", "llm_foundry_a100_80gb.csv", "megatron_core_h100_weak_scaling.csv")
METRICS = ("mape", "spearman", "oom_accuracy", "top1", "num_oom_picks")
SEARCHES = (
    ("llama-3.1-8b", 64, 512, 8192), ("llama-3.1-70b", 1024, 1024, 8192),
    ("llama-65b-128k-vocabulary", 1024, 2048, 2048), ("llama-3.1-405b", 16384, 2048, 8192),
)  # fmt: skip


def accuracy(folder: Path) -> list[dict[str, object]]:
    runs: list[Run] = []
    for name in FILES:
        runs += read_runs(folder / name)[1]
    rows: list[dict[str, object]] = []
    together: dict[str, list[tuple[Run, PricedLayout]]] = {"flash2": [], "flash1": []}
    for fold in cross_validate(runs, load_prior_fit()):
        for kernel in ("flash2", "flash1", "triton"):
            pairs = [(r, p) for r, p in zip(fold.runs, fold.prices, strict=True) if r.software.attention == kernel]
            if not pairs:
                continue
            if kernel in together and len(pairs) > 20:
                together[kernel] += pairs
            rows += _rows(f"held out: {fold.name}, {kernel}", score(*map(list, zip(*pairs, strict=True))))
    for kernel, pairs in together.items():
        rows += _rows(f"held out: all sweeps, {kernel}", score(*map(list, zip(*pairs, strict=True))))
    # What the sheet costs whose pipelines behave as if a step held an eighth of its batch: see README.md.
    kept = [(r, p) for r, p in together["flash2"] if not (r.model.name == "LLAMA-13B" and r.layout.pp == 2)]
    rows += _rows("held out: all sweeps, flash2, less 13B 2k pp2", score(*map(list, zip(*kept, strict=True))))
    prices = price_runs(runs)
    for name in sorted({run.sweep for run in runs if run.oom is not None and run.software.name == STUDY.name}):
        pairs = [
            (r, p) for r, p in zip(runs, prices, strict=True) if r.sweep == name and r.software.attention == "flash2"
        ]
        rows += _rows(f"shipped constants: {name}, flash2", score(*map(list, zip(*pairs, strict=True))))
    return rows + bubbles(runs)


def bubbles(runs: list[Run]) -> list[dict[str, object]]:
    """How many times the predicted bubble each sheet's step times ask for: 1 where a step holds the stated batch.

    Least squares of measured / predicted on the shares of the bubble and of the rest, by the shipped constants.
    """
    prices = price_runs(runs)
    rows = []
    for name in sorted({run.sweep for run in runs if run.software.name == STUDY.name}):
        for kernel in ("flash2", "flash1"):
            pairs = [
                (run.step_s / priced.step_s, priced.time_parts_s["bubble"] / priced.step_s)
                for run, priced in zip(runs, prices, strict=True)
                if run.sweep == name and run.software.attention == kernel and run.step_s
            ]
            ratio, share = np.array(pairs).T
            design = np.stack([share, 1 - share], axis=1)
            (times, _), *_ = np.linalg.lstsq(design, ratio, rcond=None)
            print(f"{name}, {kernel}: {times:.2f} times the predicted bubble")
            rows.append(
                measurement(
                    benchmark="layout_search", provider="fourfold", case=f"{name}, {kernel} ({len(pairs)} runs)",
                    metric="bubble asked for", unit="times the predicted", samples=[times], kind="modelled",
                )
            )  # fmt: skip
    return rows


def _rows(case: str, scores: Scores) -> list[dict[str, object]]:
    print(f"{case}: " + ", ".join(f"{m} {getattr(scores, m)}" for m in METRICS if getattr(scores, m) is not None))
    return [
        measurement(
            benchmark="layout_search", provider="fourfold", case=f"{case} ({scores.num_runs} runs)", metric=metric,
            unit="share" if metric != "num_oom_picks" else "sweeps", samples=[getattr(scores, metric)], kind="modelled",
        )
        for metric in METRICS
        if getattr(scores, metric) is not None
    ]  # fmt: skip


def speed(repeats: int) -> list[dict[str, object]]:
    rows = []
    for name, gpus, batch, seq_len in SEARCHES:
        model, cluster = load_model(name), load_cluster("H100-80GB")
        seconds, count = [], 0
        for _ in range(repeats):
            start = time.process_time()
            request = SearchRequest(num_devices=gpus, global_batch=batch, seq_len=seq_len, space="full")
            result = rank_layouts(model, cluster, request, top=10)
            seconds.append(time.process_time() - start)
            count = result.num_candidates
        case = f"model={name} gpus={gpus} layouts={count}"
        print(f"{case}: {min(seconds):.2f} s of one core, best {result.layouts[0].layout}")
        rows.append(
            measurement(
                benchmark="layout_search", provider="fourfold", case=case, metric="search", unit="s CPU",
                samples=seconds, kind="cpu",
            )
        )  # fmt: skip
    return rows


def agreement() -> list[dict[str, object]]:
    rows = []
    for finding, case, figure, agrees in findings():
        print(f"{'agrees' if agrees else 'DISAGREES'}: {finding} ({case}): {figure:.3f}")
        rows.append(
            measurement(
                benchmark="layout_search", provider="fourfold", case=f"{finding}; {case}",
                metric="agrees" if agrees else "disagrees", unit="", samples=[figure], kind="modelled",
            )
        )  # fmt: skip
    return rows


def software(folder: Path) -> list[dict[str, object]]:
    """Software that is inferred, held-out groups of it, and how honest the doubt is."""
    rows = []
    for case, metric, figure in (*shipped(folder), *held_out(folder)):
        print(f"{case}: {metric} {figure:.3f}")
        rows.append(
            measurement(
                benchmark="layout_search", provider="fourfold", case=case, metric=metric, unit="share",
                samples=[figure], kind="modelled",
            )
        )  # fmt: skip
    for peer, figures in PEERS.items():
        print(f"{peer}, as published: {figures}")
    return rows


PEERS = {
    "SimuMax 1.2, calibrated": "MAPE 8.0%, Spearman .63, OOM accuracy .88, top-1 .38, out of memory 4 of 7 picks",
    "calculon, calibrated": "MAPE 19.9%, Spearman .78, OOM accuracy .90, top-1 .72, out of memory 1 of 7 picks",
    "llm-analysis, calibrated": "MAPE 14.9%, Spearman .60, OOM accuracy .88, top-1 .72, out of memory 2 of 7 picks",
}
"""On 381 FlashAttention-2 rows in 7 sweeps of the study that are not here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=HERE.parents[2] / "shared" / "published-runs")
    parser.add_argument("--software", action="store_true", help="only software, its held-out groups and the doubt")
    parser.add_argument("--quick", action="store_true", help="leave out the cross-validation (minutes)")
    arguments = parser.parse_args()
    if arguments.software:
        software(arguments.runs)
        return
    rows = agreement() + speed(repeats=1 if arguments.quick else 3)
    if not arguments.quick:
        if not arguments.runs.is_dir():
            raise SystemExit(f"{arguments.runs}: no published runs there; give their folder with --runs")
        rows += software(arguments.runs)
        rows += accuracy(arguments.runs)
        write_rows(HERE / "results.csv", rows)


if __name__ == "__main__":
    main()
