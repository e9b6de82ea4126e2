"""The loss of a run as a picture: python tools/plot_loss.py runs/demo --data runs/demo-data/python_text_document"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from linear_moe.data.indexed import unigram_entropy


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the loss of a run from its metrics.jsonl.")
    parser.add_argument("run", help="run folder, or a metrics.jsonl")
    parser.add_argument(
        "--data", help="prefix of the token files: draws the entropy of their token frequencies"
    )
    parser.add_argument("--output", help="picture to write; loss.png in the run folder unless given")
    args = parser.parse_args()
    metrics = Path(args.run) / "metrics.jsonl" if Path(args.run).is_dir() else Path(args.run)
    output = Path(args.output) if args.output else metrics.parent / "loss.png"
    missing = [
        path
        for path in (metrics, *(Path(f"{args.data}{end}") for end in (".bin", ".idx") if args.data))
        if not path.is_file()
    ]
    if missing:
        print(
            f"linear_moe: there is no {missing[0]}\n"
            f"  why: the curve is read from a run's metrics.jsonl, the entropy from a .bin/.idx pair\n"
            f"  try: the folder of a run, and the DATASET_PATH it was trained with for --data",
            file=sys.stderr,
        )
        return 2
    try:
        draw(metrics, read_records(metrics), args.data, output)
    except ValueError as error:
        print(f"linear_moe: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"linear_moe: {output} cannot be written\n"
            f"  why: {error.strerror}\n"
            f"  try: --output loss.png, or another name in a folder of yours",
            file=sys.stderr,
        )
        return 2
    print(output)
    return 0


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """All lines but one that is being written, or that a run which was killed has left unfinished."""
    *lines, _ = metrics.read_text().split("\n")
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{metrics} cannot be read: {error}\n"
            f"  why: every line of it is one JSON object\n"
            f"  try: the file as the run wrote it"
        ) from None
    if not any("lm_loss" in record for record in records):
        raise ValueError(
            f"{metrics} has no step\n"
            f"  why: a run writes a line after each step, and none has been finished\n"
            f"  try: again later; RUN/log says what the run does"
        )
    return records


def draw(metrics: Path, records: list[dict[str, Any]], data: str | None, output: Path) -> None:
    """The loss of every step, its average, evaluations, and the entropy of single tokens of ``data``."""
    steps = [record for record in records if "lm_loss" in record]
    tokens, total = [], 0
    for step in steps:
        total += step["tokens"]
        tokens.append(total / 1e6)
    loss = [step["lm_loss"] for step in steps]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(tokens, loss, color="#b8c4d9", linewidth=0.8, label="each step")
    axes.plot(tokens, _smooth(loss), color="#1f4e9c", linewidth=1.8, label="average")
    seen = {step["iteration"]: millions for step, millions in zip(steps, tokens)}
    held_out = [
        (seen[r["iteration"]], r["validation_loss"])
        for r in records
        if "validation_loss" in r and r["iteration"] in seen
    ]
    if held_out:
        axes.plot(*zip(*held_out), "o", color="#b07030", markersize=4, label="validation")
    if data:
        entropy = unigram_entropy(data)
        axes.axhline(entropy, color="#b03030", linestyle="--", linewidth=1)
        axes.text(
            tokens[-1],
            entropy,
            f"token frequencies alone: {entropy:.2f}",
            color="#b03030",
            ha="right",
            va="bottom",
        )
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", ylim=(0, None), xlim=(0, None))
    axes.set_title(
        f"{metrics.parent.name}: {loss[0]:.2f} to {_smooth(loss)[-1]:.2f} in {len(steps)} steps", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150)


def _smooth(values: list[float]) -> list[float]:
    """Exponential average over about 20 steps, without the bias of its start."""
    keep, average, weight, out = 0.95, 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight)
    return out


if __name__ == "__main__":
    sys.exit(main())
