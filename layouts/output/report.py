"""One HTML file, offline, readable on a phone: the ranked layouts, why, and what was measured of them.

Charts are plotly's, with plotly.js inlined once (some 4.5 MB); nothing is fetched when the file opens.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.inputs.model import human_count
from fourfold.layouts.output.tables import mark, seconds_text, why_not
from fourfold.layouts.search.rank import Plan

TIME_COLOURS = {
    "compute": "#2f6f9f", "recompute": "#7fb2d3", "tensor parallel": "#e39b3b", "context parallel": "#c8742a",
    "expert parallel": "#a75a1f", "pipeline sends": "#d9b64e", "data parallel": "#8c6bb1", "bubble": "#c9ccd1",
    "optimizer": "#5a9e6f", "launch": "#b5838d", "overhead": "#8a8f98",
}  # fmt: skip
_TIME_NAMES = {
    "tp_communication": "tensor parallel", "cp_communication": "context parallel", "ep_communication":
    "expert parallel", "pp_communication": "pipeline sends", "dp_communication": "data parallel",
}  # fmt: skip
MEMORY_COLOURS = {
    "weights": "#2f6f9f", "gradients": "#7fb2d3", "optimizer": "#5a9e6f", "activations": "#e39b3b",
    "logits": "#c8742a", "workspace": "#8c6bb1", "reserve": "#c9ccd1",
}  # fmt: skip

_STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #e3e7ec; --ground: #f5f7f9; --accent: #2f6f9f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
header p { color: var(--soft); margin: 4px 0 0; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 2px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
section > p { color: var(--soft); margin: 2px 0 10px; font-size: .93rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th.l, td.l { text-align: left; }
tr.best td { background: #eef5fa; font-weight: 600; }
.pill { background: var(--accent); color: #fff; border-radius: 9px; padding: 1px 8px;
  font-size: .78rem; font-weight: 600; }
footer { color: var(--soft); font-size: .85rem; margin-top: 22px; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 16px 10px 40px; } section { padding: 14px 12px; }
  h1 { font-size: 1.35rem; } }
"""


def write_report(
    path: str | Path,
    result: Plan,
    *,
    title: str = "Layout report",
    measured: Sequence[Mapping[str, Any]] = (),
    losses: Sequence[tuple[float, float]] = (),
    facts: Mapping[str, str] | None = None,
    num_shown: int = 10,
) -> None:
    """Write the report.

    Args:
        measured: rows {layout, predicted_step_s, measured_step_s, predicted_peak_gib, measured_peak_gib}; `layout` is
            a Layout, its dict or its name.
        losses: (step, training loss) pairs.
        facts: further tiles under the title, name -> value ("held-out loss" -> "1.93").
        num_shown: how many of the ranked layouts appear.
    """
    from plotly.offline import get_plotlyjs

    ranked = result.layouts[:num_shown]
    sections = [_tiles(result, facts or {})]
    if ranked:
        sections.append(_ranked_section(result, ranked))
        sections.append(_section("Where the time goes", "Terms of one step on the slowest stage.", _time_chart(ranked)))
        capacity = "Parts of the worst rank's peak; the line is what a device has."
        sections.append(_section("Where the memory goes", capacity, _memory_chart(ranked)))
    if measured:
        sections.append(_measured_section(measured))
    if losses:
        sections.append(_section("Training loss", "Each step's mean loss over all target tokens.", _loss_chart(losses)))
    reasons = why_not(result)
    runner = ranked[0].software if ranked else result.software
    if reasons:
        sections.append(_section("What was ruled out", html.escape(reasons) + ".", ""))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main><header><h1>{html.escape(title)}</h1>"
        f"<p>{_subtitle(result)}</p></header>{''.join(sections)}"
        f"<footer>{html.escape(result.cluster.name)}: {html.escape(result.cluster.provenance)}. "
        f"Priced as {html.escape(runner.title or runner.name)}.</footer></main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _subtitle(result: Plan) -> str:
    return html.escape(
        f"{result.model.name}, {human_count(result.model.num_params)} parameters, on {result.num_devices} x "
        f"{result.cluster.device.name}; {result.num_fitting} of {result.num_candidates} layouts fit"
    )


def _tiles(result: Plan, facts: Mapping[str, str]) -> str:
    tiles: dict[str, str] = {}
    if result.layouts:
        best = result.layouts[0]
        tiles |= {
            "fastest layout": str(best.layout), "step": seconds_text(best.step_s), "MFU": f"{best.mfu:.1%}",
            "tokens/s": f"{human_count(best.tokens_per_s)}",
            "peak a device": f"{best.peak_bytes / GIB:.3g} of {best.capacity_bytes / GIB:.3g} GiB",
            "probability of fitting": f"{best.fit_probability:.2f}",
        }  # fmt: skip
        if result.safe is not None and result.safe.layout != best.layout:
            tiles["safe pick"] = f"{result.safe.layout} ({seconds_text(result.safe.step_s)})"
    tiles |= facts
    cells = (f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in tiles.items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{text}</p>{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int], best: int | None = 0) -> str:
    def line(cells: Sequence[str], tag: str, row: int | None) -> str:
        inside = "".join(f"<{tag}{' class=l' if i in left else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr{' class=best' if row is not None and row == best else ''}>{inside}</tr>"

    body = "".join(line(row, "td", index) for index, row in enumerate(rows))
    return f'<div class="scroll"><table><thead>{line(header, "th", None)}</thead><tbody>{body}</tbody></table></div>'


def _ranked_section(result: Plan, ranked: Sequence[PricedLayout]) -> str:
    rows = []
    for rank, priced in enumerate(ranked, start=1):
        label = mark(result, priced)
        pill = f' <span class="pill">{html.escape(label)}</span>' if label else ""
        rows.append(
            [
                f"#{rank}",
                html.escape(str(priced.layout)) + pill,
                seconds_text(priced.step_s),
                f"{priced.mfu:.1%}",
                f"{priced.tokens_per_s / priced.layout.world_size:.0f}",
                f"{priced.peak_bytes / GIB:.3g}",
                f"{priced.margin_bytes / GIB:+.3g}",
                f"{priced.fit_probability:.2f}",
            ]
        )
    header = ["", "layout", "step", "MFU", "tokens/s/device", "peak GiB", "margin GiB", "P(fits)"]
    return _section("Ranked layouts", "Fastest first, of those that fit.", _table(header, rows, left=(0, 1)))


def _measured_section(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in measured:
        step = _ratio(row.get("predicted_step_s"), row.get("measured_step_s"))
        memory = _ratio(row.get("predicted_peak_gib"), row.get("measured_peak_gib"))
        rows.append(
            [
                html.escape(_layout_name(row["layout"])),
                _seconds(row.get("predicted_step_s")),
                _seconds(row.get("measured_step_s")),
                step,
                _gib(row.get("predicted_peak_gib")),
                _gib(row.get("measured_peak_gib")),
                memory,
            ]
        )
    header = ["layout", "predicted step", "measured step", "off by", "predicted GiB", "measured GiB", "off by"]
    return _section(
        "Predicted against measured",
        "Each layout ran on this machine; off by = predicted / measured - 1.",
        _table(header, rows, left=(0,), best=None) + _measured_chart(measured),
    )


def _layout_name(layout: Any) -> str:
    if isinstance(layout, Mapping):
        from fourfold.layouts.inputs.layout import Layout

        return str(Layout(**layout))
    return str(layout)


def _ratio(predicted: Any, measured: Any) -> str:
    return f"{predicted / measured - 1:+.1%}" if predicted and measured else "-"


def _seconds(value: Any) -> str:
    return seconds_text(float(value)) if value else "-"


def _gib(value: Any) -> str:
    return f"{float(value):.3g}" if value else "-"


def _figure(traces: list[Any], height: int, **layout: Any) -> str:
    import plotly.graph_objects as go

    figure = go.Figure(traces)
    figure.update_layout(
        height=height, margin={"l": 10, "r": 10, "t": 10, "b": 10}, template="plotly_white", dragmode=False,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1d2733"},
        legend={"orientation": "h", "yanchor": "top", "y": -0.14, "x": 0, "traceorder": "normal"}, **layout,
    )  # fmt: skip
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
    )
    return text


def _bars(
    ranked: Sequence[PricedLayout], parts: Mapping[str, Sequence[float]], colours: Mapping[str, str], unit: str
) -> list[Any]:
    import plotly.graph_objects as go

    labels = [f"#{rank}" for rank in range(1, len(ranked) + 1)]
    names = [str(priced.layout) for priced in ranked]
    return [
        go.Bar(
            y=labels, x=list(values), name=name, orientation="h", marker_color=colours[name], customdata=names,
            hovertemplate="%{customdata}<br>" + name + ": %{x:.3g} " + unit + "<extra></extra>",
        )
        for name, values in parts.items()
        if any(values)
    ]  # fmt: skip


def _time_chart(ranked: Sequence[PricedLayout]) -> str:
    milliseconds = ranked[0].step_s < 1
    scale, unit = (1e3, "ms") if milliseconds else (1.0, "s")
    names = list(ranked[0].time_parts_s)
    parts = {_TIME_NAMES.get(name, name): [p.time_parts_s[name] * scale for p in ranked] for name in names}
    traces = _bars(ranked, parts, TIME_COLOURS, unit)
    return _figure(
        traces, 110 + 34 * len(ranked), barmode="stack", yaxis={"autorange": "reversed"},
        xaxis={"title": f"{unit} a step"},
    )  # fmt: skip


def _memory_chart(ranked: Sequence[PricedLayout]) -> str:
    parts = {n: [p.memory_parts_bytes[n] / GIB for p in ranked] for n in ranked[0].memory_parts_bytes}
    parts["reserve"] = [p.reserve_bytes / GIB for p in ranked]
    capacity = ranked[0].capacity_bytes / GIB
    largest = max((p.peak_bytes + p.reserve_bytes) / GIB for p in ranked)
    shapes = []
    if capacity < 3 * largest:  # a line far to the right would squeeze the bars
        line = {"color": "#b3362b", "width": 2, "dash": "dot"}
        shapes = [{"type": "line", "x0": capacity, "x1": capacity, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
    traces = _bars(ranked, parts, MEMORY_COLOURS, "GiB")
    return _figure(
        traces, 110 + 34 * len(ranked), barmode="stack", yaxis={"autorange": "reversed"},
        xaxis={"title": f"GiB a device (of {capacity:.3g})"}, shapes=shapes,
    )  # fmt: skip


def _measured_chart(measured: Sequence[Mapping[str, Any]]) -> str:
    import plotly.graph_objects as go

    rows = [row for row in measured if row.get("predicted_step_s") and row.get("measured_step_s")]
    words = [_layout_name(row["layout"]).split() for row in rows]
    labels = ["<br>".join(" ".join(name[at : at + 3]) for at in range(0, len(name), 3)) for name in words]
    height = 110 + sum(44 + 17 * label.count("<br>") for label in labels)
    pairs = (("predicted_step_s", "predicted", "#7fb2d3"), ("measured_step_s", "measured", "#2f6f9f"))
    traces = [
        go.Bar(y=labels, x=[row[key] for row in rows], name=name, marker_color=colour, orientation="h")
        for key, name, colour in pairs
    ]
    return _figure(traces, height, barmode="group", xaxis={"title": "s a step"}, yaxis={"autorange": "reversed"})


def _loss_chart(losses: Sequence[tuple[float, float]]) -> str:
    import plotly.graph_objects as go

    steps, values = zip(*losses, strict=True)
    trace = go.Scatter(x=list(steps), y=list(values), mode="lines", line={"color": "#2f6f9f", "width": 2}, name="loss")
    return _figure([trace], 320, xaxis={"title": "step"}, yaxis={"title": "loss (nats a token)"}, showlegend=False)
