"""The Hugging Face folder of a model, converted first if need be; prints its path.

python eval/hugging_face_folder.py runs/mine                     runs/mine/hf/iter_0010000
python eval/hugging_face_folder.py mine-hf                       mine-hf
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    """Print it; 2 where there is none."""
    parser = argparse.ArgumentParser(description="The Hugging Face folder of a model.")
    parser.add_argument("path", help="run, its checkpoint/, one iteration in that, or a Hugging Face folder")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, if it has moved since the training")
    args = parser.parse_args()
    try:
        print(hugging_face_folder(args.path, args.tokenizer))
    except ValueError as error:
        print(f"linear_moe: {error}", file=sys.stderr)
        return 2
    return 0


def hugging_face_folder(given: str, tokenizer: str | None) -> Path:
    """``given`` itself, or what it is converted to; ``ValueError`` where neither is possible."""
    if not given or not Path(given).is_dir():
        raise ValueError(
            f"there is no folder {given!r}\n"
            f"  why: a model is scored from its run, its checkpoint or its Hugging Face folder\n"
            f"  try: sh lm_eval_linear_moe.sh runs/NAME"
        )
    from linear_moe.checkpoint.hf_config import is_hf_folder  # without torch

    path = Path(given)
    if is_hf_folder(path):
        return path
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the conversion runs on the CPU, whatever is there
    from linear_moe.inference.quiet import no_messages, no_output

    with no_messages():
        with no_output():
            from linear_moe.checkpoint.exporting import export_model
            from linear_moe.checkpoint.folders import run_and_iteration

            run, checkpoint, iteration = run_and_iteration(path)
            target = run / "hf" / checkpoint.name
            done = None if target.is_dir() else export_model(path, target, tokenizer=tokenizer)
        if done is None:
            print(f"linear_moe: {target} is there already", file=sys.stderr)
            refuse_stale(target, checkpoint)
        else:
            print(f"linear_moe: step {iteration} of {run} converted to {target}", file=sys.stderr)
            for warning in done.warnings:
                print(f"linear_moe: warning: {warning}", file=sys.stderr)
    if not (target / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{target} has no tokenizer\n"
            f"  why: questions are text, and the run's own tokenizer was not found\n"
            f"  try: TOKENIZER=<folder with tokenizer.json>, after removing {target}"
        )
    return target


def refuse_stale(target: Path, checkpoint: Path) -> None:
    """``ValueError`` when a checkpoint was written again after it was converted."""
    written = max(path.stat().st_mtime for path in checkpoint.iterdir())
    if written > (target / "config.json").stat().st_mtime:
        raise ValueError(
            f"{checkpoint} was written after {target}\n"
            f"  why: the model was trained again, and its scores would be those of the older one\n"
            f"  try: remove {target}"
        )


if __name__ == "__main__":
    sys.exit(main())
