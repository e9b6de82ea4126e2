"""The results: cells as they come, the table, the plot, and whether the claims of the papers show in them.

The mean over the seeds has an interval of 95 % by Student's t; claims are differences between two models on the same
seeds (hence the same data), with the interval of the paired difference: a claim shows if the interval lies above zero.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5 % point, by degrees of freedom."""

MOST_BANDS = 6
"""Models in a plot up to which their intervals are drawn; of more, the table has them."""
DELTA_OVER = (
    ("deltanet", "linear_attention"),
    ("gated_deltanet", "gla"),
    ("gated_deltanet", "mamba2"),
    ("gated_deltanet", "retention"),
    ("kda", "gla"),
)
"""A delta-rule mixer, and one that only decays."""

Row = dict[str, Any]


class Store:
    """``cells.jsonl``: a line for each cell, of which the last one counts, but none that was cut off earlier."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "cells.jsonl"

    def add(self, found: Iterable[dict[str, Any]]) -> None:
        """Append; a run that ends at any moment loses nothing that was added."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for cell in found:
                file.write(json.dumps(cell) + "\n")

    def cells(self, fingerprint: str) -> dict[tuple[str, str, int], dict[str, Any]]:
        """The cells of a setup by model, size and seed; a line cut off by a crash is skipped."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            if cell["setup"] != fingerprint:
                continue
            key = cell["model"], cell["size"], cell["seed"]
            if key not in found or _length(cell) >= _length(found[key]):
                found[key] = cell
        return found

    def finished(self, fingerprint: str) -> set[tuple[str, str, int]]:
        """The cells that need not be trained: neither failed nor cut off."""
        return {key for key, cell in self.cells(fingerprint).items() if cell.get("complete")}


def _length(cell: dict[str, Any]) -> tuple[bool, int]:
    """How far a cell came."""
    return bool(cell.get("complete")), cell.get("steps", 0)


def write(store: Store, setups: list[Any]) -> list[Path]:
    """Make ``recall.json``, ``recall.md`` and ``recall.png`` from the cells of these setups, the best of each row."""
    setup, tried = setups[0], [store.cells(one.fingerprint()) for one in setups]
    cells = chosen(tried)
    table, pairs = rows(cells), [str(n) for n in setup.task.pairs]
    for row in table:
        of_row = [
            {k: cell for k, cell in one.items() if k[:2] == (row["model"], row["size"])} for one in tried
        ]
        seeds = [sum(not cell.get("error") for cell in one.values()) for one in of_row]
        row["tried"] = sum(count == max(seeds) for count in seeds)
        its = next(
            one for one, of in zip(setups, of_row) if any(cell is cells.get(k) for k, cell in of.items())
        )
        row |= {"lr": its.lr, "init_std": its.init_std}
    found = claims(cells)
    store.folder.mkdir(parents=True, exist_ok=True)
    paths = [store.folder / f"recall.{ending}" for ending in ("json", "md", "png")]
    results = {"setups": [asdict(one) for one in setups], "rows": table, "claims": found}
    paths[0].write_text(json.dumps(_without_nan(results), indent=1) + "\n")
    paths[1].write_text(markdown(table, found, pairs, setup))
    plot(table, pairs, paths[2])
    return paths


def _without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: the interval of a single seed is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def chosen(
    tried: list[dict[tuple[str, str, int], dict[str, Any]]],
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Of every model and size the cells of one setup: of those with the most seeds, that of the best mean."""
    best: dict[tuple[str, str], tuple[int, float]] = {}
    found: dict[tuple[str, str], dict[tuple[str, str, int], dict[str, Any]]] = {}
    for cells in tried:
        for model, size in dict.fromkeys((model, size) for model, size, _ in cells):
            group = {key: cell for key, cell in cells.items() if key[:2] == (model, size)}
            scores = [score(cell) for cell in group.values() if not cell.get("error")]
            rank = (len(scores), statistics.fmean(scores) if scores else 0.0)
            if (model, size) not in best or rank > best[model, size]:
                best[model, size], found[model, size] = rank, group
    return {key: cell for group in found.values() for key, cell in group.items()}


def rows(cells: dict[tuple[str, str, int], dict[str, Any]]) -> list[Row]:
    """One row for each model and size, seeds pooled, best first within a size."""
    table = []
    for model, size in dict.fromkeys((model, size) for model, size, _ in cells):
        group = [cell for (m, s, _), cell in cells.items() if (m, s) == (model, size)]
        good = [cell for cell in group if not cell.get("error")]
        row: Row = {"model": model, "size": size, "seeds": len(good), "accuracy": {}}
        row["failed"] = next((cell["error"] for cell in group if cell.get("error")), None)
        if good:
            facts = good[0]["facts"]
            row |= {name: facts[name] for name in ("state_size", "parameters", "options")}
            row["steps"] = [cell["steps"] for cell in good]
            row["is_short_of_time"] = any(cell["short_of_time"] for cell in good)
            row["seconds"] = good[0]["seconds"]
            for n in good[0]["accuracy"]:
                row["accuracy"][n] = interval([cell["accuracy"][n] for cell in good])
            row["mean"] = interval([score(cell) for cell in good])
        table.append(row)
    return sorted(table, key=lambda row: (_order(row["size"]), -row.get("mean", [-1])[0]))


def _order(size: str) -> float:
    """Sizes by number, the default last."""
    return math.inf if size == "default" else int(size)


def score(cell: dict[str, Any]) -> float:
    """Accuracy averaged over the numbers of pairs, each counting the same."""
    return statistics.fmean(cell["accuracy"].values())


def interval(values: list[float]) -> list[float]:
    """Mean and half of its 95 % interval; NaN for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, math.nan]
    t = T_95.get(len(values) - 1, 1.96)
    return [mean, t * statistics.stdev(values) / math.sqrt(len(values))]


def claims(cells: dict[tuple[str, str, int], dict[str, Any]]) -> list[Row]:
    """Every claim whose sides were trained to their ends: the paired difference of mean accuracies, and the verdict."""
    models = {model for model, _, _ in cells}
    sizes = sorted({size for _, size, _ in cells if size != "default"}, key=int)
    wanted = []
    for model in sorted(models):
        of_model = [size for size in sizes if any((model, size, seed) in cells for _, _, seed in cells)]
        if len(of_model) > 1:
            wanted.append(("memory size matters", (model, of_model[-1]), (model, of_model[0])))
    for size in (*sizes, "default"):
        wanted += [("delta rule over decay", (a, size), (b, size)) for a, b in DELTA_OVER]
        for model in sorted(models):
            if model.startswith("mom_"):
                wanted.append(("MoM over its mixer", (model, size), (model.removeprefix("mom_"), size)))
            if "+" in model:
                wanted.append(("hybrid over pure", (model, size), (model.split("+")[0], size)))
    found = []
    for claim, better, worse in wanted:
        seeds = [s for m, z, s in cells if (m, z) == better and (*worse, s) in cells]
        pairs = [(cells[(*better, s)], cells[(*worse, s)]) for s in seeds]
        pairs = [pair for pair in pairs if not any(x.get("error") or x.get("short_of_time") for x in pair)]
        if pairs:
            mean, half = interval([score(a) - score(b) for a, b in pairs])
            found.append(
                {
                    "claim": claim,
                    "better": list(better),
                    "worse": list(worse),
                    "difference": [mean, half],
                    "verdict": verdict(mean, half),
                }
            )
    return found


def verdict(mean: float, half: float) -> str:
    """What an interval of a difference says about the claim that it is positive."""
    if math.isnan(half):
        return "one seed"
    if mean - half > 0:
        return "shown"
    return "the opposite" if mean + half < 0 else "not shown"


def markdown(table: list[Row], found: list[Row], pairs: list[str], setup: Any) -> str:
    """The table and the claims."""
    lines = [
        "# Multi-query associative recall",
        "",
        f"Accuracy in % by number of key-value pairs, mean and 95 % interval over seeds. {setup.num_layers} layers, "
        f"width {setup.hidden_size}, {setup.task.length} tokens, {setup.task.num_keys} keys and values, "
        f"{setup.steps} steps of {setup.per_pairs * len(setup.task.pairs)} sequences. "
        "lr, std: learning rate and standard deviation of the initial weights; of those tried with all seeds (in "
        "brackets how many) the ones with the best mean. "
        "State: elements of recurrent memory per layer. Fewer steps than planned: every number of pairs was solved, "
        "or, marked *, time was up. A hybrid ends in softmax attention, whose cache grows with the sequence.",
    ]
    for size in dict.fromkeys(row["size"] for row in table):
        title = "Default size" if size == "default" else f"Equal state, {size} elements wanted"
        lines += ["", f"## {title}", ""]
        lines += [f"| model | state | parameters | lr, std | steps | {' | '.join(pairs)} | mean |"]
        lines += ["|---" * (6 + len(pairs)) + "|"]
        lines += [_line(row, pairs) for row in table if row["size"] == size]
    lines += ["", "## What the papers claim", ""]
    lines += [
        "Difference of the mean accuracy, in points, paired by seed; shown: its 95 % interval is above 0.",
        "",
    ]
    lines += ["| claim | model | against | difference | verdict |", "|---|---|---|---|---|"]
    for row in found:
        better, worse = (f"{model} ({size})" for model, size in (row["better"], row["worse"]))
        difference = percent(row["difference"])
        lines.append(f"| {row['claim']} | {better} | {worse} | {difference} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def _line(row: Row, pairs: list[str]) -> str:
    if not row["seeds"]:
        return f"| {row['model']} | failed: {row['failed']} |" + " |" * (4 + len(pairs))
    steps = f"{min(row['steps'])}-{max(row['steps'])}" if len(set(row["steps"])) > 1 else str(row["steps"][0])
    scores = " | ".join(percent(row["accuracy"][n]) for n in pairs)
    state = row["state_size"] if row["state_size"] is not None else "KV cache"
    mark = "*" if row["is_short_of_time"] else ""
    start = f"{row['lr']:g}, {row['init_std']:g} ({row['tried']})"
    facts = f"{row['model']} | {state} | {row['parameters']} | {start} | {steps}{mark}"
    return f"| {facts} | {scores} | {percent(row['mean'])} |"


def percent(value: list[float]) -> str:
    """A share and its interval in percent."""
    mean, half = value
    return f"{100 * mean:.1f}" if math.isnan(half) else f"{100 * mean:.1f} +- {100 * half:.1f}"


def plot(table: list[Row], pairs: list[str], path: Path) -> None:
    """Accuracy against the number of pairs, a panel for each kind of size, and against the size of the memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [row for row in table if row["seeds"]]
    counts = {size: sum(row["size"] == size for row in good) for size in {row["size"] for row in good}}
    equal = max((size for size in counts if size != "default"), key=lambda size: counts[size], default=None)
    models = sorted({row["model"] for row in good})
    colors = {model: plt.get_cmap("tab20")(i % 20) for i, model in enumerate(models)}
    marks = {model: "os^D"[i // 20 % 4] for i, model in enumerate(models)}
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5))
    for axis, size, title in (
        (axes[0], equal, f"equal state: about {equal} elements per layer"),
        (axes[1], "default", "default size"),
    ):
        x = [int(n) for n in pairs]
        for row in good:
            if row["size"] == size or row["model"] == "softmax":
                means, halves = zip(*(row["accuracy"][n] for n in pairs))
                style = "--" if "softmax" in row["model"] else "-"
                axis.plot(
                    x,
                    means,
                    style,
                    marker=marks[row["model"]],
                    ms=3,
                    color=colors[row["model"]],
                    label=row["model"],
                )
                if len(models) > MOST_BANDS:
                    continue
                low = [max(0.0, m - h) for m, h in zip(means, halves)]
                high = [min(1.0, m + h) for m, h in zip(means, halves)]
                axis.fill_between(x, low, high, color=colors[row["model"]], alpha=0.07, linewidth=0)
        axis.set(xscale="log", title=title, xlabel="key-value pairs", ylabel="accuracy", ylim=(-0.02, 1.02))
        axis.set_xticks(x, pairs)
        axis.minorticks_off()
    for model in models:
        points = sorted(
            (row["state_size"], *row["mean"]) for row in good if row["model"] == model and row["state_size"]
        )
        if points:
            sizes, means, halves = zip(*points)
            has_bar = len(points) > 1 or len(models) <= MOST_BANDS
            errors = [half if has_bar and not math.isnan(half) else 0.0 for half in halves]
            axes[2].errorbar(
                sizes,
                means,
                errors,
                marker=marks[model],
                ms=4,
                capsize=2,
                lw=1,
                color=colors[model],
                label=model,
            )
    title = "accuracy against size of the memory"
    axes[2].set(title=title, xlabel="elements per layer", ylabel="mean accuracy", ylim=(-0.02, 1.02))
    axes[2].set_xscale("log", base=2)
    axes[2].xaxis.set_major_formatter("{x:.0f}")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
