"""``decode.md`` and ``decode.png``, from the rows of ``decode.json``."""

from __future__ import annotations

from pathlib import Path

from linear_moe.bench.configurations import SOFTMAX
from linear_moe.bench.record import Record, Row, heading, pyplot, table, write_text


def line(row: Row) -> str:
    """What a row says."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    how = "a graph" if row["graph"] else "no graph"
    return f"{row['ms_per_token']:.3f} ms per token ({how}), {held(row) / 2**20:.1f} MiB of states and keys"


def held(row: Row) -> int:
    """Bytes beside the weights that the sequences hold."""
    return row["recurrent_bytes"] + row["kv_cache_bytes"]


def label(row: Row) -> str:
    """A column of the table."""
    others = "" if row["dtype"] == "bfloat16" else f" {row['dtype']}"
    others += " without graphs" if row["no_graph"] else ""
    return f"{row['model']}, {row['family']} {row['size']}, batch {row['batch']}{others}"


def crossings(rows: list[Row]) -> dict[str, int | None]:
    """The first measured position from which a model is faster than softmax attention; None: nowhere."""
    times = {(label(row), row["position"]): row.get("ms_per_token", float("inf")) for row in rows}
    found: dict[str, int | None] = {}
    for row in rows:
        rival = label({**row, "model": SOFTMAX})
        places = sorted(place for name, place in times if name == label(row))
        if row["model"] == SOFTMAX or not any(name == rival for name, _ in times):
            continue
        slower = [p for p in places if not times[label(row), p] < times.get((rival, p), float("inf"))]
        later = [p for p in places if not slower or p > max(slower)]
        found[label(row)] = later[0] if later else None
    return found


def markdown(record: Record) -> str:
    """The table, and where the lines cross."""
    rows = record.rows
    names = list(dict.fromkeys(map(label, rows)))
    cells = {(label(row), row["position"]): _cell(row) for row in rows}
    positions = sorted({row["position"] for row in rows})
    body = [[str(p), *(cells.get((name, p), "-") for name in names)] for p in positions]
    note = "medians of blocks of steps; a cell: milliseconds per token, MiB of states and keys of all rows"
    parts = [heading("Decoding", record.command, [row for row in rows if row["status"] == "ok"], note)]
    parts.append(table(["position", *names], body))
    lines = [
        f"* {name}: {'at no measured position' if place is None else f'from {place} tokens on'}"
        for name, place in crossings(rows).items()
    ]
    if lines:
        parts.append("## Faster than softmax attention\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(row: Row) -> str:
    if row["status"] != "ok":
        return row["error"]
    return f"{row['ms_per_token']:.2f}, {held(row) / 2**20:.1f}"


def draw(rows: list[Row], path: Path) -> bool:
    """Both against the position. Returns whether it was drawn."""
    rows = [row for row in rows if row["status"] == "ok"]
    plt = pyplot(path) if rows else None
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name in dict.fromkeys(map(label, rows)):
        own = sorted((row for row in rows if label(row) == name), key=lambda row: row["position"])
        places = [row["position"] for row in own]
        style = {"color": "black", "linestyle": "--"} if own[0]["model"] == SOFTMAX else {}
        left.plot(places, [row["ms_per_token"] for row in own], marker="o", label=name, **style)
        right.plot(places, [held(row) / 2**30 for row in own], marker="o", label=name, **style)
    left.set(title="ms per token", ylim=(0, None))
    right.set(title="GiB of states and keys", yscale="log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("position")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(record: Record) -> list[Path]:
    """Both files, as far as they can be made; returns them."""
    page, plot = record.path.with_suffix(".md"), record.path.with_suffix(".png")
    write_text(page, markdown(record))
    return [page, plot] if draw(record.rows, plot) else [page]
