"""A run's folder: ``config.json`` holds all that rebuilds the model from the path alone.

runs/NAME/config.json  metrics.jsonl  checkpoint/  tensorboard/  log/
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from linear_moe.model.families import POSITION_FLAGS, SIZE_FLAGS, SWITCHES

FORMAT = 1
"""Version of ``config.json``."""

ARCHITECTURE = (
    *(
        "family",
        "model_size",
        "num_layers",
        "layer_kinds",
        "mixer_options",
        "moe_layer_freq",
        "normalization",
    ),
    *(name for name in SIZE_FLAGS if name not in ("num_layers", "max_position_embeddings")),
    *SWITCHES,
    *POSITION_FLAGS,
    "padded_vocab_size",
)
"""Arguments that say what the model computes: `linear_moe.launch.resume` refuses another value of any of them."""

MEGATRON_NAMES = {"norm_epsilon": "layernorm_epsilon"}
"""Where Megatron calls an argument otherwise than its flag, which is the name in ``config.json``."""

TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_size")
"""Arguments that say what the model's tokens mean."""


def write_config(run_dir: Path, args: argparse.Namespace, argv: list[str]) -> None:
    """Write ``config.json``: the architecture in words, and the arguments that built it."""
    config = {
        "format": FORMAT,
        "architecture": {name: getattr(args, MEGATRON_NAMES.get(name, name), None) for name in ARCHITECTURE},
        "tokenizer": _tokenizer(args),
        "seq_length": args.seq_length,
        "params_dtype": str(args.params_dtype).removeprefix("torch."),
        "arguments": argv,
        "versions": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    part = run_dir / "config.json.part"
    part.write_text(json.dumps(config, indent=2) + "\n")
    part.replace(run_dir / "config.json")


def _tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = {name: getattr(args, name, None) for name in TOKENIZER}
    path = tokenizer["tokenizer_model"]
    if path is not None and Path(path).exists():
        tokenizer["tokenizer_model"] = str(Path(path).absolute())  # the run may be read from another folder
    return tokenizer


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read ``config.json``; ``ValueError`` when ``run_dir`` is no run."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is not a run: it has no config.json\n"
            f"  why: the model is rebuilt from that file alone\n"
            f"  try: the folder that holds checkpoint/ and metrics.jsonl"
        )
    try:
        config = json.loads(path.read_text())
        found = config["format"]
        for name in ("architecture", "tokenizer", "params_dtype", "arguments") if found == FORMAT else ():
            config[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {error}\n"
            f"  why: the file was cut short or edited\n"
            f"  try: a copy of it, or start the run again for one step: it writes the file anew"
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found}, this version reads {FORMAT}\n"
            f"  why: it was written by another version of linear_moe\n"
            f"  try: that version ({config.get('versions')})"
        )
    return config
