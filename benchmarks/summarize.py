"""Medians of finished runs, from their ``metrics.jsonl``: a table on standard output and a JSON file."""

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch

WARM_UP = 5


def summary(run: Path) -> dict:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    warm = steps[WARM_UP:]
    return {
        "run": run.name,
        "steps": len(steps),
        "first_loss": steps[0]["lm_loss"],
        "last_loss": steps[-1]["lm_loss"],
        "tokens_per_second_per_gpu": statistics.median(step["tokens_per_second_per_gpu"] for step in warm),
        "tflops_per_gpu": statistics.median(step["tflops_per_gpu"] for step in warm),
        "mfu": statistics.median(step["mfu"] for step in warm) if warm[0]["mfu"] is not None else None,
        "peak_memory_gib": max(step["peak_memory_gib"] for step in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that holds the runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    rows = [summary(path.parent) for path in sorted(args.folder.glob("*/metrics.jsonl"))]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "command": "bash benchmarks/first_run.sh",
        "medians_over_steps": f"{WARM_UP + 1} to the last",
        "runs": rows,
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{device}, medians after {WARM_UP} steps")
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:5.1f} % MFU  "
        print(
            f"{row['run']:<44} {row['tokens_per_second_per_gpu']:9.0f} tokens/s  {row['tflops_per_gpu']:6.1f} TF  "
            f"{mfu}{row['peak_memory_gib']:5.1f} GiB  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        )


if __name__ == "__main__":
    main()
