"""Parameters and FLOPs of a model: python tools/count_parameters.py --family qwen2 --size A0.3B --la-module gla"""

import argparse
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from linear_moe.bench.plans import plan_model
from linear_moe.inference.quiet import no_messages, no_output
from linear_moe.model.pattern import pattern_of

if TYPE_CHECKING:
    from linear_moe.bench.counting import ModelCounts

FLAGS = {
    "MODEL_SIZE": "--size",
    "LA_MODULE": "--la-module",
    "LAYER_TYPE_LIST": "--layer-type-list",
    "MIXER_MODULES": "--mixer-module",
    "EXTRA_ARGS": "--extra-args",
}
"""What the variables of a run script, which messages name, are called here."""


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with no_messages():
        try:
            model = (args.family, args.size, args.la_module, args.layer_type_list, args.extra_args)
            plan = plan_model(*model, args.mixer_module)
            os.environ |= {
                "CUDA_VISIBLE_DEVICES": "",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            }  # shapes need no device
            with no_output():
                from linear_moe.bench.counting import count

                counts = count(plan)
        except ValueError as error:
            variables = "|".join(FLAGS)
            text = re.sub(rf"\b({variables})(=?)", lambda found: flag(found[1], found[2]), str(error))
            print(f"count_parameters: {text}", file=sys.stderr)
            return 2
    found = record(counts, args.seq_len)
    print(json.dumps(found, indent=2) if args.json else text_of(found))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Count the parameters and operations of a model, without a GPU."
    )
    parser.add_argument("--family", required=True, help="family of the model, e.g. qwen2 (BASE_MODEL)")
    parser.add_argument("--size", help="its size, e.g. A0.3B (MODEL_SIZE); default: the family's own")
    parser.add_argument(
        "--la-module", metavar="M", help="mixer of the L layers; without one the family as published"
    )
    parser.add_argument(
        "--layer-type-list", metavar="P", help="L mixer, N softmax; default: L everywhere, N without a mixer"
    )
    parser.add_argument(
        "--seq-len",
        type=positive,
        default=2048,
        help="tokens of a sequence, default 2048: operations per token of softmax layers grow with it, of no others",
    )
    parser.add_argument("--extra-args", default="", help='more flags, as EXTRA_ARGS: "--mom-num-memories 8"')
    parser.add_argument(
        "--mixer-module", metavar="M", help="modules of yours that register mixers (MIXER_MODULES)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens")
    return int(text)


def flag(variable: str, equals: str) -> str:
    return FLAGS[variable] + (" " if equals else "")


def record(counts: "ModelCounts", seq_len: int) -> dict[str, Any]:
    plan, parameters = counts.plan, counts.parameters
    return {
        "family": plan.family.name,
        "size": plan.size_name,
        "layers": len(plan.kinds),
        "mixers": list(dict.fromkeys(plan.kinds)),
        "pattern": pattern_of(plan.kinds),
        "total": parameters.total,
        "active": parameters.active,
        "embedding": parameters.embedding,
        "flops_per_token": counts.flops.of_step(1, seq_len),
        "flops_split": counts.training_flops(seq_len),
        "seq_len": seq_len,
    }


def text_of(found: dict[str, Any]) -> str:
    split, whole = found["flops_split"], found["flops_per_token"]
    title = f"{found['family']} {found['size']}: {found['layers']} layers of {found['pattern']}"
    lines = [f"{title} ({', '.join(found['mixers'])})", "parameters"]
    notes = {
        "total": "all",
        "active": "without the routed experts that a token does not use",
        "embedding": "tables of the vocabulary",
    }
    lines += [f"  {name:<12} {found[name]:>18,}  {notes[name]}" for name in notes]
    lines.append(f"FLOPs per token of a training step, forward and backward, at {found['seq_len']} tokens")
    lines.append(f"  {'all':<12} {whole:>18,.0f}")
    lines += [f"  {name:<12} {part:>18,.0f}  {100 * part / whole:4.1f} %" for name, part in split.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
