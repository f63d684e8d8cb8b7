"""The study's findings, asked of the model: nothing of them is put in, so each is a prediction that can fail."""

from collections.abc import Iterator

from fourfold.layouts.cost.price import PricedLayout, price
from fourfold.layouts.evidence.study import shipped_study, study_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

A100 = study_cluster()
STUDY = shipped_study().software("flash_attention2 + rms kernel")
SIZES = {"13b": 64, "30b": 128, "65b": 128}


def _best(size: str, gpus: int, *, global_batch: int = 2048, seq_len: int = 2048, **fix: object) -> PricedLayout | None:
    """The best 1F1B layout of the study's space (ZeRO 1, no interleaving, no cp) in its software, that fits."""
    model = load_model(f"llama-{size}-128k-vocabulary")
    held = {"cp": 1, "vp": 1, "zero_stage": 1, "cp_heads": 1, "offload": False, "checkpoint_every": 1, **fix}
    request = SearchRequest(num_devices=gpus, global_batch=global_batch, seq_len=seq_len, space="full", fix=held)
    result = rank_layouts(model, A100, request, software=STUDY, top=1)
    return result.layouts[0] if result.layouts else None


def _mfu(layout: Layout, size: str) -> float:
    return price(load_model(f"llama-{size}-128k-vocabulary"), A100, [layout], software=STUDY)[0].mfu


def findings() -> Iterator[tuple[str, str, float, bool]]:
    """(finding, case, figure, whether the model agrees)."""
    for size, gpus in SIZES.items():
        best = _best(size, gpus)
        assert best is not None
        yield (
            "micro-batch 1 is best",
            f"{size} on {gpus}: {best.layout}",
            best.layout.micro_batch,
            (best.layout.micro_batch == 1),
        )
        kept, recomputed = _best(size, gpus, checkpointing="none"), _best(size, gpus, checkpointing="full")
        if kept and recomputed:
            ratio = kept.mfu / recomputed.mfu
            yield "no checkpointing where it fits", f"{size}: MFU ratio of the bests", ratio, ratio > 1
    for size, gpus in (("30b", 128), ("65b", 128)):
        for many in (4, 8) if load_model(f"llama-{size}-128k-vocabulary").num_heads % 8 == 0 else (4,):
            shape = {"micro_batch": 1, "zero_stage": 1, "global_batch": 2048, "seq_len": 2048}
            pipelined = Layout(pp=many, tp=2, dp=gpus // many // 2, **shape)  # type: ignore[arg-type]
            cut = Layout(pp=2, tp=many, dp=gpus // many // 2, **shape)  # type: ignore[arg-type]
            ratio = _mfu(pipelined, size) / _mfu(cut, size)
            yield "pipeline before tensor parallelism", f"{size}: tp2 pp{many} over tp{many} pp2", ratio, ratio > 1
    measured = {1: 0.003, 2: 0.016, 4: 0.077, 8: 0.126}
    for tp, gain in measured.items():
        shape = {"micro_batch": 1, "zero_stage": 1, "global_batch": 2048, "seq_len": 2048, "pp": 4, "tp": tp}
        off = Layout(dp=128 // 4 // tp, **shape)  # type: ignore[arg-type]
        on = Layout(dp=128 // 4 // tp, sequence_parallel=tp > 1, **shape)  # type: ignore[arg-type]
        points = _mfu(on, "65b") - _mfu(off, "65b")
        case = f"65b tp{tp} pp4: MFU points gained (the study, mean of its settings: {gain:.3f})"
        yield "sequence parallelism pays, more at larger tp", case, points, points >= 0
    few = _mfu(Layout(dp=16, pp=4, micro_batch=1, zero_stage=1, global_batch=2048, seq_len=2048), "30b")
    many_gpus = _mfu(Layout(dp=64, pp=4, micro_batch=1, zero_stage=1, global_batch=2048, seq_len=2048), "30b")
    case = "30b pp4, 64 to 256 GPUs at one batch: MFU ratio (the study: 0.755)"
    yield "more GPUs at one batch lose efficiency", case, many_gpus / few, many_gpus < few
