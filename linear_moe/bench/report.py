"""Results of measured steps: a JSON file that grows, tables made from it, and a plot where matplotlib is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from linear_moe.bench.configurations import SOFTMAX, Configuration
from linear_moe.bench.record import Record, Row, heading, pyplot, table, write_text

MEASURED = ("ok", "stopped")


class Results(Record):
    """Rows of ``results.json``, one for each configuration."""

    def __init__(self, folder: Path, command: str, again: bool) -> None:
        super().__init__(folder / "results.json", command, again)
        self.folder = folder

    def has(self, configuration: Configuration) -> bool:
        """Whether it was measured."""
        return any(row["status"] == "ok" for row in self.of([configuration]))

    def of(self, configurations: Sequence[Configuration]) -> list[Row]:
        """Their rows."""
        keys = [asdict(configuration) for configuration in configurations]
        return [row for row in self.rows if row["configuration"] in keys]

    def add(self, configuration: Configuration, found: Row) -> None:
        """Keep a row in the place of an older one of the same configuration, unless only the older one has figures."""
        old = next(iter(self.of([configuration])), None)
        if old is not None and old["status"] in MEASURED and found["status"] not in MEASURED:
            return
        key = asdict(configuration)
        about = {"label": configuration.label, "seq_len": configuration.seq_len, "configuration": key}
        self.put({**about, **found}, ("configuration",))


def line(row: Row) -> str:
    """One row for people."""
    if row["status"] not in MEASURED:
        return f"{row['status']}: {row['error']}"
    mfu = "" if row["mfu"] is None else f", {100 * row['mfu']:.1f} % MFU"
    text = f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s, {row['tflops_per_gpu']:.3g} TFLOP/s{mfu}"
    return f"{text}, {row['peak_memory_gib']:.1f} GiB ({row['steps']} steps)" + _full(row)


def _full(row: Row) -> str:
    """What a device that is all but full costs; older rows do not say."""
    retries = row.get("allocator_retries", 0)
    return f", the allocator emptied its cache {retries} times in them" if retries else ""


def write(results: Results) -> list[Path]:
    """``results.md`` and, if matplotlib is there, ``results.png``; returns what was written."""
    path = results.folder / "results.md"
    write_text(path, markdown(results))
    plot = results.folder / "results.png"
    return [path, plot] if _draw(results.rows, plot) else [path]


def markdown(results: Results) -> str:
    """All tables."""
    measured = [row for row in results.rows if row["status"] in MEASURED]
    parts = [_heading(results, measured)]
    if measured:
        parts += [
            "## Tokens/s per GPU\n\n"
            + _pivot(measured, lambda row: f"{row['tokens_per_second_per_gpu']:,.0f}"),
            "## TFLOP/s per GPU and MFU\n\n" + _pivot(measured, _speed),
            "## Peak memory, GiB\n\n" + _pivot(measured, lambda row: f"{row['peak_memory_gib']:.1f}"),
            "## Times as fast as softmax attention everywhere\n\n" + _pivot(measured, _against(measured)),
            "## From the shortest sequence to the longest\n\n" + _flatness(measured),
            "## From launch to the end of step 1, seconds\n\n" + _pivot(measured, _start),
        ]
    parts += [_profile(row) for row in measured if "profile" in row]
    full = [f"* {row['label']} at {row['seq_len']}{_full(row)}" for row in measured if _full(row)]
    if full:
        parts.append("## Where memory was all but full\n\n" + "\n".join(full))
    failed = [row for row in results.rows if row["status"] != "ok"]
    if failed:
        lines = [f"* {row['label']} at {row['seq_len']}: {row['status']}: {row['error']}" for row in failed]
        parts.append("## Without figures, or with fewer steps\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _heading(results: Results, measured: list[Row]) -> str:
    note = "medians over the steps after warm-up; operations are those of the mixers' definitions (`training/flops.py`)"
    return heading("Training steps", results.command, measured, note)


def _pivot(rows: list[Row], cell: Callable[[Row], str]) -> str:
    """A row for each model, a column for each length."""
    lengths = sorted({row["seq_len"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["seq_len"]): cell(row) for row in rows}
    body = [[label, *(cells.get((label, n), "-") for n in lengths)] for label in labels]
    return table(["model", *map(str, lengths)], body)


def _speed(row: Row) -> str:
    mfu = "" if row["mfu"] is None else f" ({100 * row['mfu']:.1f} %)"
    return f"{row['tflops_per_gpu']:.3g}{mfu}"


def _start(row: Row) -> str:
    return f"{row['first_step_seconds']:.0f}" if "first_step_seconds" in row else "-"


def _against(rows: list[Row]) -> Callable[[Row], str]:
    speed = "tokens_per_second_per_gpu"
    base = {row["seq_len"]: row[speed] for row in rows if row["label"] == SOFTMAX}
    return lambda row: f"{row[speed] / base[row['seq_len']]:.2f}" if row["seq_len"] in base else "-"


def _flatness(rows: list[Row]) -> str:
    body = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seq_len"])
        if len(own) < 2:
            continue
        ends = f"{own[0]['seq_len']} - {own[-1]['seq_len']}"
        changes = [_range(own, name) for name in ("tokens_per_second_per_gpu", "peak_memory_gib")]
        body.append([label, ends, *changes])
    return table(["model", "lengths", "tokens/s", "memory"], body)


def _range(rows: list[Row], name: str) -> str:
    """Smallest and largest value, relative to that of the first row."""
    changes = [100 * (row[name] / rows[0][name] - 1) for row in rows]
    return f"{min(changes):+.1f} % .. {max(changes):+.1f} %"


def _profile(row: Row) -> str:
    kinds, step = row["profile"]["kinds"], row["seconds"]
    busy = sum(kind["seconds"] for kind in kinds.values())
    body = [
        [
            name,
            f"{1e3 * kind['seconds']:.1f}",
            f"{100 * kind['seconds'] / step:.1f}",
            f"{kind['launches']:.0f}",
        ]
        for name, kind in kinds.items()
    ]
    idle = max(0.0, step - busy)  # less where streams run side by side
    body.append(["nothing runs", f"{1e3 * idle:.1f}", f"{100 * idle / step:.1f}", ""])
    longest = [
        [
            f"`{kernel['name'][:80]}`",
            f"{1e3 * kernel['seconds']:.1f}",
            f"{kernel['launches']:.0f}",
            kernel["kind"],
        ]
        for kernel in row["profile"]["kernels"][:12]
    ]
    title = f"## Where the time goes: {row['label']} at {row['seq_len']}, {1e3 * step:.1f} ms a step\n\n"
    tables = [table(["kind of kernel", "ms", "% of the step", "launches"], body)]
    tables.append(table(["kernel", "ms", "launches", "kind"], longest))
    if (pauses := row["profile"].get("pauses")) is not None:
        tables += _pauses(pauses)
    return title + "\n\n".join(tables)


def _pauses(pauses: Row) -> list[str]:
    """When nothing ran, by length and by place."""
    lengths = [
        [name, f"{1e3 * p['seconds']:.1f}", f"{p['times']:.0f}"] for name, p in pauses["lengths"].items()
    ]
    places = [
        [f"`{p['after'][:60]}`", f"`{p['before'][:60]}`", f"{1e3 * p['seconds']:.2f}", f"{p['times']:.1f}"]
        for p in pauses["places"][:12]
    ]
    return [
        table(["nothing runs for", "ms", "times"], lengths),
        table(["nothing runs after", "and before", "ms", "times"], places),
    ]


def _draw(rows: list[Row], path: Path) -> bool:
    rows = [row for row in rows if row["status"] in MEASURED]
    plt = pyplot(path) if rows else None
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    panels = {"tokens_per_second_per_gpu": "tokens/s per GPU", "peak_memory_gib": "peak memory, GiB"}
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for label in dict.fromkeys(row["label"] for row in rows):
            points = sorted((row["seq_len"], row[name]) for row in rows if row["label"] == label)
            style = {"color": "black", "linestyle": "--"} if label == SOFTMAX else {}
            axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of a sequence")
        axis.set_title(title)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
