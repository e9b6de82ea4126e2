"""What a run folder already holds: the step to resume from, and the architecture that resuming must not change."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.instructions import kept_tokenizer
from linear_moe.launch.plan import SHARED_PREFIXES, RunPlan, mixer_prefixes
from linear_moe.model.families import (
    SIZE_FLAGS,
    ModelSize,
    flags_of,
    megatron_arguments,
    switches_of,
    unused_fields,
)

UNSET = "none of the model's: what is not set is the checkpoint's"
"""What to try where variables disagree with PRETRAIN_CHECKPOINT_PATH."""


def checkpoint_iteration(folder: Path) -> int | None:
    """Step of the last complete Megatron checkpoint in a folder; None when there is none."""
    try:
        return int((folder / "latest_checkpointed_iteration.txt").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def check_whole(folder: Path) -> None:
    """The checkpoint that a folder names as its last is there; Megatron would exit, with code 0 or a traceback."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return
    name = f"iter_{int(text):07d}" if text.isdigit() else text
    if name and (folder / name).is_dir():
        return
    steps = [path.parent.name.removeprefix("iter_") for path in folder.glob("iter_*/.metadata")]
    last, quoted = max((int(x) for x in steps if x.isdigit()), default=None), shlex.quote(str(tracker))
    raise PreflightError(
        f"{tracker} says {text!r}, and there is no such checkpoint.",
        "a save was cut off by a kill or a full disk, or files were removed or not copied.",
        f"rm {quoted}, to begin at step 0" if last is None else f"echo {last} > {quoted}",
    )


def check_no_iteration(path: Path) -> None:
    """PRETRAIN_CHECKPOINT_PATH is a run or its ``checkpoint/``, whose tracker says which step is meant."""
    step = re.fullmatch(r"iter_0*(\d+)", path.name)
    if step is None:
        return
    folder = path.parent
    raise PreflightError(
        f"PRETRAIN_CHECKPOINT_PATH={path} is one step of a run.",
        f"a run starts from the last one, {folder}/latest_checkpointed_iteration.txt says which.",
        f"PRETRAIN_CHECKPOINT_PATH={shlex.quote(str(folder))}, or a copy of it whose tracker says {step[1]}",
    )


def is_finished(plan: RunPlan) -> bool:
    """Whether the run has done all of its steps before."""
    step = checkpoint_iteration(plan.run_dir / "checkpoint")
    return step is not None and step >= plan.settings.iterations


def going_on(plan: RunPlan) -> RunPlan:
    """The plan with what its run has done: of TRAIN_TOKENS, the steps are those that are left, of their size now.

    GLOBAL_BATCH_SIZE follows the number of ranks unless it is set, so on more of them a step has more tokens.
    """
    step, s = checkpoint_iteration(plan.run_dir / "checkpoint"), plan.settings
    done = None if step is None else _tokens_of(plan.run_dir, step)
    if step is None or done is None:
        return plan
    if s.train_iters is None and abs(done - step * s.tokens_per_step) >= s.tokens_per_step:
        left = max(s.train_tokens - done, 0)
        s = replace(s, train_iters=step + math.ceil(left / s.tokens_per_step))
    return replace(plan, settings=s, steps_done=step, tokens_done=done)


def _tokens_of(run_dir: Path, step: int) -> int | None:
    """Tokens of the steps up to this one, as ``metrics.jsonl`` has them; None if it lacks one of them."""
    tokens = {}
    try:
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "tokens" in record and record["iteration"] <= step:
                tokens[record["iteration"]] = record["tokens"]
    except (OSError, ValueError):  # none, or a kill cut off its last line
        pass
    return round(sum(tokens.values())) if len(tokens) == step else None


def pretrained_folder(plan: RunPlan) -> Path | None:
    """Folder of PRETRAIN_CHECKPOINT_PATH that holds the checkpoint: itself, or `checkpoint/` of a run folder."""
    text = plan.settings.pretrain_checkpoint_path
    if text is None or text == "none":
        return None
    if plan.hugging_face is not None:
        return plan.run_dir / "pretrained" / "checkpoint"  # converted before the start
    path = Path(text).absolute()
    return (
        path / "checkpoint" if checkpoint_iteration(path) is None and (path / "checkpoint").is_dir() else path
    )


def check_resume(plan: RunPlan) -> None:
    """The architecture is the one of the run that would be resumed, and of the checkpoint that would be loaded."""
    check_whole(plan.run_dir / "checkpoint")
    if checkpoint_iteration(plan.run_dir / "checkpoint") is not None:
        new = "another RUN_NAME for a new one"
        _same_architecture(plan, plan.run_dir, f"run {plan.run_dir} has another architecture", new)
        _same_optimizer(plan)
        _same_tokenizer(plan)
        return
    source = pretrained_folder(plan)
    if source is None or (plan.hugging_face is not None and checkpoint_iteration(source) is None):
        return
    given = f"PRETRAIN_CHECKPOINT_PATH={plan.settings.pretrain_checkpoint_path}"
    check_no_iteration(source)
    check_whole(source)
    if checkpoint_iteration(source) is None:
        only_tokenizer = (source / "tokenizer.json").exists()
        raise PreflightError(
            f"{given} holds no checkpoint.",
            "it holds a tokenizer, which has its own variable now."
            if only_tokenizer
            else f"there is no {source / 'latest_checkpointed_iteration.txt'}.",
            f"TOKENIZER={shlex.quote(str(source))} PRETRAIN_CHECKPOINT_PATH=none"
            if only_tokenizer
            else "the run folder or its checkpoint/ folder, or PRETRAIN_CHECKPOINT_PATH=none",
        )
    _same_architecture(plan, source.parent, f"{given} has another architecture", UNSET)


def read_config(run_dir: Path) -> dict[str, Any]:
    """``config.json`` of a run folder; empty when it is none."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        config = None  # saved by another tool: loading will tell
    return config if isinstance(config, dict) else {}


def _same_optimizer(plan: RunPlan) -> None:
    arguments = read_config(plan.run_dir).get("arguments")
    if arguments is None:
        return
    start = f"PRETRAIN_CHECKPOINT_PATH={shlex.quote(str(plan.run_dir))}"
    anew = f"RUN_NAME=<new> {start} to start from the weights alone"
    if ("--use-distributed-optimizer" in arguments) != plan.settings.do:
        here, there = str(plan.settings.do).lower(), str(not plan.settings.do).lower()
        raise PreflightError(
            f"DO={here}, but run {plan.run_dir} was saved with DO={there}.",
            "Megatron stores the state of the distributed optimizer in another form.",
            f"DO={there}, or {anew}",
        )
    if "--no-save-optim" in arguments and "--no-load-optim" not in plan.extra_args:
        raise PreflightError(
            f"run {plan.run_dir} was saved with --no-save-optim.",
            "there are no moments of its weights to go on with.",
            f"EXTRA_ARGS with --no-load-optim to begin them anew, or {anew}",
        )
    before, now = (flags_of(words).get("--optimizer", "adam") for words in (arguments, plan.extra_args))
    if before != now:
        raise PreflightError(
            f"run {plan.run_dir} was trained with --optimizer {before}, and this is {now}.",
            "each keeps moments of its own kind for every weight.",
            f"EXTRA_ARGS='--optimizer {before}', or {anew}",
        )


def _same_tokenizer(plan: RunPlan) -> None:
    if has_another_tokenizer(plan, plan.run_dir):
        kept = kept_tokenizer(plan.run_dir)
        raise PreflightError(
            f"run {plan.run_dir} was trained with another tokenizer than TOKENIZER={plan.settings.tokenizer}.",
            f"the tokens that it knows are those of {kept}, and mean other text in this one.",
            f"TOKENIZER={shlex.quote(str(kept))}, or another RUN_NAME for a new run",
        )


def has_another_tokenizer(plan: RunPlan, run_dir: Path) -> bool:
    """Whether a run keeps a tokenizer whose tokens are not those of the plan's."""
    try:
        kept = describe_tokenizer(str(kept_tokenizer(run_dir)))
    except TokenizerError:
        return False  # none, or of an earlier version: its data were checked against it then
    return plan.tokenizer is not None and kept.fingerprint != plan.tokenizer.fingerprint


def _same_architecture(plan: RunPlan, run_dir: Path, what: str, instead: str) -> None:
    saved, wanted = _saved_architecture(plan, run_dir), architecture(plan)
    refuse_differences(saved, wanted, what, instead + _replaced_softmax(saved, wanted, run_dir))


def _replaced_softmax(saved: Mapping[str, Any], wanted: Mapping[str, Any], run_dir: Path) -> str:
    """What else to try where mixers stand for softmax layers, and all else is the same: an import can do that.

    Not with output gates, which no other mixer continues.
    """
    pairs = zip(saved.get("layer_kinds", []), wanted["layer_kinds"], strict=False)
    replaced = {was for was, is_now in pairs if was != is_now}
    has_gates = wanted.get("attention_output_gate", False)
    if _different(saved, wanted) != ["layer_kinds"] or replaced != {"softmax"} or has_gates:
        return ""
    folder = shlex.quote(f"{run_dir}-hf")
    return (
        f"; or, to replace its softmax layers and keep the rest, "
        f"python tools/convert.py export --load {shlex.quote(str(run_dir))} --hf {folder}, "
        f"and then RUN_NAME=<new> PRETRAIN_CHECKPOINT_PATH={folder}"
    )


def refuse_differences(saved: dict[str, Any], wanted: dict[str, Any], what: str, instead: str) -> None:
    """PreflightError with every name that both have with another value, and with options that only one has."""
    names = _different(saved, wanted)
    differences = [f"{name}: {_text(saved.get(name))} -> {_text(wanted.get(name))}" for name in names]
    if differences:
        raise PreflightError(
            f"{what} than this one:\n    " + "\n    ".join(differences),
            "the embedding has rows for the tokens of TOKENIZER (VOCAB_SIZE without one) and EXTRA_VOCAB_SIZE more."
            if names == ["padded_vocab_size"]
            else "a checkpoint fits the model that saved it; layout, batch, data and learning rate may change.",
            f"the variables of that run, or {instead}",
        )


def _different(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = [name for name in wanted if name in saved] + [name for name in saved if name.startswith("--")]
    names += [name for name in wanted if name.startswith("--") and name not in saved]
    return [name for name in dict.fromkeys(names) if saved.get(name) != wanted.get(name)]


def _saved_architecture(plan: RunPlan, run_dir: Path) -> dict[str, Any]:
    config = read_config(run_dir)
    saved = dict(config.get("architecture", {}))
    if saved.get("moe_layer_freq") == 1:
        saved["moe_layer_freq"] = [1] * len(saved.get("layer_kinds", []))
    # null is a value of a size, "no experts"; of anything else it is what an earlier version did not know.
    known = {
        name: value
        for name, value in saved.items()
        if value is not None or (name in SIZE_FLAGS and name != "norm_epsilon")
    }
    return known | mixer_options(config.get("arguments", []), plan.settings.mixer_modules)


def architecture(plan: RunPlan) -> dict[str, Any]:
    """Everything that fixes the shapes and the meaning of a checkpoint, under its names in config.json."""
    arguments = [*megatron_arguments(plan.family, plan.size), *plan.extra_args]
    model = {"layer_kinds": list(plan.kinds), "padded_vocab_size": plan.padded_vocab_size}
    options = mixer_options(list(plan.extra_args), plan.settings.mixer_modules)
    return architecture_of(plan.family.name, plan.size, arguments) | model | options


def architecture_of(family: str, size: ModelSize, arguments: Sequence[str]) -> dict[str, Any]:
    """The part of it that a size and a command line say."""
    skipped = {"max_position_embeddings", *unused_fields(size)}
    sizes = {name: getattr(size, name) for name in SIZE_FLAGS if name not in skipped}
    if size.is_moe:
        sizes["moe_layer_freq"] = list(map(int, size.moe_layers()))
    return {"family": family} | sizes | switches_of(arguments)


def mixer_options(arguments: list[str], modules: str | None) -> dict[str, Any]:
    """Flags of a command line that change a mixer: `--gla-gate-rank 32`, `--mom-topk 1`; one alone is true."""
    prefixes = (*SHARED_PREFIXES, *mixer_prefixes(modules))
    return {
        flag: "true" if value == "on" else value
        for flag, value in flags_of(arguments).items()
        if flag.startswith(prefixes) and flag != "--la-module"
    }


_TOLD_WHEN_CHANGED = (
    *("--lr", "--min-lr", "--lr-warmup-iters", "--weight-decay", "--bf16", "--fp16"),
    *("--global-batch-size", "--seq-length", "--seed"),
    *("--data-path", "--mock-data", "--instruction-data"),
)


def changes_since(plan: RunPlan, arguments: Sequence[str]) -> list[str]:
    """What a run that goes on does otherwise than before, of what may change and matters: `--lr: 0.0001 -> 0.001`."""
    saved = read_config(plan.run_dir).get("arguments")
    if saved is None or checkpoint_iteration(plan.run_dir / "checkpoint") is None:
        return []
    before, now = flags_of(saved), flags_of(arguments)
    return [
        f"{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in _TOLD_WHEN_CHANGED
        if before.get(name) != now.get(name)
    ]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
