"""From and to Hugging Face, in one process on CPU: what ``tools/convert.py`` runs (docs/checkpoints.md).

python tools/convert.py import --hf Qwen2-7B --save runs/qwen2-7b
python tools/convert.py import --hf Qwen2-7B --save runs/qwen2-7b-gla --la-module gla --layer-type-list LLLN
python tools/convert.py export --load runs/mine --hf mine-hf
"""

import argparse
import math
import os
import re
import shlex
import sys
import time
from typing import Any, TextIO

from linear_moe.inference.quiet import no_messages, no_output

# CPU only, wherever this runs; no chatter from C++, no question to a network.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Convert as the command line says; returns the exit code."""
    args = parse()
    os.environ.update(ENVIRONMENT)
    bar = Bar()
    with no_messages():
        try:
            with no_output():
                from linear_moe.checkpoint.exporting import export_model
                from linear_moe.checkpoint.importing import import_model

                if args.command == "import":
                    done: Any = import_model(
                        args.hf,
                        args.save,
                        la_module=args.la_module,
                        layer_type_list=args.layer_type_list,
                        kinds=args.layer_kinds.split(",") if args.layer_kinds else None,
                        extra_args=words_of(args.extra_args),
                        allow_pickle=args.allow_pickle,
                        progress=bar,
                    )
                else:
                    done = export_model(
                        args.load,
                        args.hf,
                        step=args.step,
                        tokenizer=args.tokenizer,
                        native=not args.remote_code,
                        shard_bytes=shard_bytes(args.shard_gb),
                        progress=bar,
                    )
        except ValueError as error:
            _write(sys.stderr, f"linear_moe: {with_options(str(error))}")
            return 2
        except OSError as error:
            bar.close()
            target = args.save if args.command == "import" else args.hf
            _write(
                sys.stderr,
                f"linear_moe: {error.filename or target} cannot be used: {error.strerror}\n"
                f"  why: the disk is full, or the folder is somebody else's\n"
                f"  try: make room or take other folders; the same command goes on where this one was",
            )
            return 2
        except KeyboardInterrupt:
            bar.close()
            _write(sys.stderr, "linear_moe: stopped; the same command goes on where this one was")
            return 130
        bar.close()
        for warning in done.warnings:
            _write(sys.stderr, f"linear_moe: warning: {warning}")
        tell(args, done)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="convert.py", description="From and to Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    back = commands.add_parser("import", help="Hugging Face folder -> run folder")
    back.add_argument("--hf", required=True, metavar="SRC", help="folder with config.json and safetensors")
    back.add_argument("--save", required=True, metavar="DST", help="run folder to make")
    back.add_argument("--la-module", help="mixer of the L layers; without it the model stays as it is")
    back.add_argument("--layer-type-list", help="one symbol per layer, L or N; LLLN repeats")
    back.add_argument("--layer-kinds", help="instead: mixer or softmax of every layer, comma separated")
    back.add_argument(
        "--extra-args",
        default="",
        help="options of the mixers: '--gla-gate-rank 32', or '--mixer-module yours'",
    )
    back.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin (tensors only)")
    out = commands.add_parser("export", help="run folder -> Hugging Face folder")
    out.add_argument("--load", required=True, metavar="SRC", help="run, its checkpoint/, or one iteration")
    out.add_argument("--hf", required=True, metavar="DST", help="folder to make")
    out.add_argument("--step", type=int, help="step of the checkpoint; the last one unless given")
    out.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is now, if it has moved")
    out.add_argument(
        "--shard-gb", type=float, default=5.0, help="largest file of weights, in GB [%(default)s]"
    )
    out.add_argument(
        "--remote-code", action="store_true", help="with its code even where transformers has a class"
    )
    return parser.parse_args()


def words_of(extra_args: str) -> list[str]:
    """Of ``--extra-args``, as a shell would split it; ``ValueError`` for a quote without its end."""
    try:
        return shlex.split(extra_args)
    except ValueError as error:
        raise ValueError(
            f"--extra-args {extra_args} cannot be read: {error}\n"
            f"  why: it is split into words as a shell does it\n"
            f"  try: --extra-args '--gla-gate-rank 32'"
        ) from None


def shard_bytes(shard_gb: float) -> int:
    """Bytes of the largest file of weights; ``ValueError`` for none, or without end."""
    if not 0 < shard_gb < math.inf:
        raise ValueError(
            f"--shard-gb is {shard_gb:g}\n"
            f"  why: that is the size of a file, of one tensor at least\n"
            f"  try: --shard-gb 5"
        )
    return int(shard_gb * 1e9)


def tell(args: argparse.Namespace, done: Any) -> None:
    """What was done, and for an import where each tensor came from, if layers got another mixer."""
    if args.command == "export":
        trust = "" if done.is_native else ", trust_remote_code=True"
        _write(
            sys.stdout,
            f"{done.target}: {done.architecture}, {done.num_tensors} tensors of step {done.iteration}",
        )
        _write(sys.stdout, f'  AutoModelForCausalLM.from_pretrained("{done.target}"{trust})')
        return
    from linear_moe.checkpoint.origins import origin_counts, origin_table
    from linear_moe.model.pattern import pattern_of

    is_exact = tuple(done.kinds) == tuple(done.described.kinds)
    _write(
        sys.stdout, origin_counts(done.origins) if is_exact else origin_table(done.origins, len(done.kinds))
    )
    size = done.described.size_name
    _write(sys.stdout, f"{done.target}: {done.described.family.name} {size}, layers {pattern_of(done.kinds)}")


def with_options(message: str) -> str:
    """A message that names variables of the run scripts, with the options that were typed here instead."""

    def option(found: re.Match) -> str:
        return f"--{found[1].lower().replace('_', '-')}{' ' if found[2] else ''}"

    return re.sub(r"\b(LA_MODULE|LAYER_TYPE_LIST)\b(=?)", option, message)


class Bar:
    """Bytes done, on a terminal only."""

    def __init__(self) -> None:
        self.start = self.shown = time.monotonic()
        self.stream = sys.stderr if sys.stderr.isatty() else None

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total`` bytes."""
        now = time.monotonic()
        if self.stream is None or (now - self.shown < 0.2 and done < total):
            return
        self.shown = now
        filled = int(40 * done / max(total, 1))
        speed = done / max(now - self.start, 1e-3)
        text = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s"
        self.stream.write(f"\r[{'#' * filled}{' ' * (40 - filled)}] {text}   ")
        self.stream.flush()

    def close(self) -> None:
        """The bar stays as it is."""
        if self.stream is not None:
            self.stream.write("\n")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
