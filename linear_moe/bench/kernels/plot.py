"""``kernels.png``: milliseconds of forward with backward, a panel for each shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linear_moe.bench.kernels.calls import ALL_SHAPES, NAMES, OURS, PEER, TORCH
from linear_moe.bench.record import Row, pyplot

COLORS = {OURS: "tab:blue", PEER: "tab:orange"}


def draw(rows: list[Row], path: Path) -> bool:
    """Bars by family, floors as ticks, softmax attention as a line. Returns whether it was drawn."""
    rows = [row for row in rows if row["part"] == "time" and row["status"] == "ok" and "both_ms" in row]
    plt = pyplot(path) if rows else None
    if plt is None:
        return False
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    size = (4.4 * columns, 3.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shapes):
        _panel(axis, [row for row in rows if row["shape"] == name])
        axis.set_title(f"{name}: {ALL_SHAPES[name]}", fontsize="small")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _panel(axis: Any, rows: list[Row]) -> None:
    families = list(dict.fromkeys(row["family"] for row in rows if row["who"] != TORCH))
    for offset, who in ((0.2, OURS), (-0.2, PEER)):
        own = [row for row in rows if row["who"] == who]
        places = [len(families) - families.index(row["family"]) + offset for row in own]
        axis.barh(places, [row["both_ms"] for row in own], 0.38, color=COLORS[who], label=NAMES[who])
        floors = [(place, row["floor_ms"]) for place, row in zip(places, own) if "floor_ms" in row]
        if floors:
            heights, values = zip(*floors)
            axis.plot(values, heights, "|", color="black", markersize=9, label="floor")
    for row in rows:
        if row["who"] == TORCH:
            axis.axvline(row["both_ms"], color="gray", linestyle="--", label=NAMES[TORCH])
    axis.set_yticks([len(families) - place for place in range(len(families))], families)
    axis.set_xlabel("ms, forward + backward")
