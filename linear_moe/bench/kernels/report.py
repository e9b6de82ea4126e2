"""``kernels.md``: tables from the rows of ``kernels.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from linear_moe.bench.kernels.calls import ALL_SHAPES, NAMES, OURS, PEER, TORCH
from linear_moe.bench.kernels.plot import draw
from linear_moe.bench.record import Record, Row, heading, table, write_text


def markdown(record: Record) -> str:
    """All tables."""
    measured = [row for row in record.rows if row["status"] in ("ok", "wrong")]
    times = _with_memory(measured)
    speeds = sorted({f"{row['bandwidth'] / 1e12:.2f}" for row in times if "bandwidth" in row})
    floor = f"floor: every input read and every output written once, at {'/'.join(speeds) or '?'} TB/s"
    medians = "medians, milliseconds, of CUDA graph replays; of single launches where marked L"
    parts = [heading("Kernels", record.command, measured, medians, floor)]
    parts += _summary(times)
    for name in dict.fromkeys(row["shape"] for row in times):
        own = [row for row in times if row["shape"] == name]
        parts.append(f"## {name}: {ALL_SHAPES[name]}\n\n{_times(own)}")
    parts += _section("Relative errors against the definition in float64", measured, "right", _errors)
    parts += _section("Seconds of the first call, nothing compiled", measured, "cold", _first_calls)
    parts += _section("Changes of the configuration, the fastest", measured, "sweep", _sweeps)
    rest = [row for row in record.rows if row["status"] not in ("ok", "wrong")]
    if rest:
        lines = [f"* {row['part']}, {title(row)}: {row['status']}: {row['error']}" for row in rest]
        parts.append("## Without figures\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _with_memory(rows: list[Row]) -> list[Row]:
    """Rows of times, each with the peak memory of the same call."""

    def call(row: Row) -> tuple[str, ...]:
        return row["family"], row["shape"], row["who"]

    peaks = {call(row): row["peak_mib"] for row in rows if row["part"] == "memory"}
    return [{**row, "peak_mib": peaks.get(call(row))} for row in rows if row["part"] == "time"]


def title(row: Row) -> str:
    """Whose row, for people."""
    return f"{row['family']} at {row['shape']}, {row['dtype']}, {NAMES[row['who']]}"


def line(row: Row) -> str:
    """What a row says."""
    if "error" in row:
        return f"{row['status']}: {row['error']}"
    hidden = ("part", "family", "shape", "dtype", "who", "device", "versions", "errors", "best", "bandwidth")
    shown = {name: value for name, value in row.items() if name not in hidden and value not in (None, [])}
    texts = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())
    return ", ".join(texts)


def _section(name: str, rows: list[Row], part: str, body: Callable[[list[Row]], str]) -> list[str]:
    own = [row for row in rows if row["part"] == part]
    return [f"## {name}\n\n{body(own)}"] if own else []


def _summary(times: list[Row]) -> list[str]:
    """Against flash-linear-attention, over all pairs."""
    by = {(row["family"], row["shape"], row["who"]): row for row in times}
    pairs = [(row, by[f, s, PEER]) for (f, s, who), row in by.items() if who == OURS and (f, s, PEER) in by]
    lines = []
    for field, text in (("forward_ms", "forward"), ("both_ms", "forward + backward"), ("peak_mib", "memory")):
        known = [(a, b) for a, b in pairs if a.get(field) and b.get(field)]
        if not known:
            continue
        mean = math.exp(sum(math.log(b[field] / a[field]) for a, b in known) / len(known))
        worse = [f"{a['family']} at {a['shape']}" for a, b in known if a[field] > b[field]]
        unit = "of the memory" if field == "peak_mib" else "times as fast"
        figure = f"{1 / mean:.2f}" if field == "peak_mib" else f"{mean:.2f}"
        mean_of = f"in the geometric mean of {len(known)} pairs"
        lines.append(f"* {text}: {figure} {unit} {mean_of}; worse: {', '.join(worse) or 'none'}")
    return ["## Against flash-linear-attention\n\n" + "\n".join(lines)] if lines else []


def _times(rows: list[Row]) -> str:
    passes = "forward", "+ backward"
    head = [
        "",
        *passes,
        "floor",
        "/ floor",
        *(f"fla {name}" for name in passes),
        "times as fast",
        "MiB",
        "fla MiB",
    ]
    body = []
    for family in dict.fromkeys(row["family"] for row in rows):
        by = {row["who"]: row for row in rows if row["family"] == family}
        own, other = by.get(OURS, by.get(TORCH, {})), by.get(PEER, {})
        faster = _ratio(other.get("both_ms"), own.get("both_ms"))
        cells = [*_both(own), _shown(own.get("floor_ms")), _ratio(own.get("both_ms"), own.get("floor_ms"))]
        memory = [_shown(row.get("peak_mib"), "{:.0f}") for row in (own, other)]
        body.append([family, *cells, *_both(other), faster, *memory])
    notes = sorted({f"\\* {row['note']}" for row in rows if "note" in row})
    return "\n\n".join([table(head, body), *notes])


def _both(row: Row) -> list[str]:
    marks = (" L" if row.get("how") == "launches" else "") + ("\\*" if "note" in row else "")
    return [_shown(row.get(field)) + (marks if field in row else "") for field in ("forward_ms", "both_ms")]


def _shown(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else "-"


def _pivot(rows: list[Row], column: Callable[[Row], str], cell: Callable[[Row], str], first: str = "") -> str:
    columns = list(dict.fromkeys(map(column, rows)))
    cells = {(row["family"], column(row)): cell(row) for row in rows}
    families = dict.fromkeys(row["family"] for row in rows)
    body = [[family, *(cells.get((family, name), "-") for name in columns)] for family in families]
    return table([first, *columns], body)


def _errors(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        over = f" OVER: {', '.join(row['over_limit'])}" if row["over_limit"] else ""
        return f"{row['outputs']:.1e}, {row['gradients']:.1e}{over}"

    return _pivot(rows, lambda row: f"{row['shape']} {row['dtype']}", cell, "outputs, gradients")


def _first_calls(rows: list[Row]) -> str:
    return _pivot(rows, lambda row: NAMES[row["who"]], lambda row: f"{row['seconds']:.1f}")


def _sweeps(rows: list[Row]) -> str:
    head = ["", "table", "from", "to", "ms", "as shipped"]
    body = [
        [
            f"{row['family']} at {row['shape']}",
            *(change[n] for n in ("table", "from", "to")),
            *_figures(change),
        ]
        for row in rows
        for change in row["best"]
    ]
    return table(head, body)


def _figures(change: dict[str, Any]) -> Iterable[str]:
    return (f"{change[name]:.3f}" for name in ("ms", "base_ms"))


def write_tables(record: Record) -> Path:
    """``kernels.md``."""
    path = record.path.with_suffix(".md")
    write_text(path, markdown(record))
    return path


def write(record: Record) -> list[Path]:
    """Tables and plot, as far as they can be made; returns them."""
    plot = record.path.with_suffix(".png")
    return [write_tables(record), *([plot] if draw(record.rows, plot) else [])]
