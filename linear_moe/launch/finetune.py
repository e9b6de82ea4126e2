"""A finetuning run as it will be: the model of its checkpoint, samples prepared, steps counted.

What the person leaves out comes from the run whose weights are the start: size, mixers, options, tokenizer, rows of the
embedding. Everything that is cheap to check is checked before a sample is tokenized.
"""

import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from linear_moe.data.instructions.packing import Schedule
from linear_moe.data.instructions.prepare import Prepared, open_prepared, prepare
from linear_moe.data.instructions.template import read_template
from linear_moe.launch.check_layout import check_schedule
from linear_moe.launch.environment import RunSettings, given_values, read_environment, texts_of
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.instructions import FinetuneSettings, Instructions, schedule_of
from linear_moe.launch.plan import NULL_TOKENIZER, RunPlan, plan_run
from linear_moe.launch.preflight import preflight
from linear_moe.launch.resume import check_no_iteration, checkpoint_iteration, read_config
from linear_moe.launch.starting_model import starting_model, with_start
from linear_moe.model.families import flags_of

DEFAULTS = {"LR": "1e-5", "MIN_LR": "1e-6", "PACK": "true"}
"""Where finetuning differs from pretraining."""

_WARMUP = 0.03
"""Share of the steps, unless the person says how many."""

_SAME = ("--instruction-data", "--no-instruction-packing", "--seed", "--global-batch-size", "--seq-length")
"""What decides which sample a step takes: it may not change when a run goes on."""


def plan_finetune(
    environment: Mapping[str, str], family: str, cuda_devices: int, announce: Callable[[str], None]
) -> RunPlan:
    """Resolve and check everything, and prepare the samples; ``announce`` is told before that takes a while.

    Raises ValueError for a mistake in the variables or in the samples.
    """
    settings = FinetuneSettings(**given_values(environment, FinetuneSettings))
    given: Mapping[str, str] = texts_of(environment)
    _check_data(given)
    given = with_start(given, announce)
    _check_given(given, settings)
    model = starting_model(given, family)
    given = {**DEFAULTS, **given, **model.variables}
    template = None if settings.chat_template is None else read_template(settings.chat_template)
    if given.get("TOKENIZER", NULL_TOKENIZER) == NULL_TOKENIZER:
        raise _no_tokenizer(given)
    # Steps follow from the samples; until these are known, one step passes every check of a schedule.
    first = {**given, "TRAIN_ITERS": "1", "WARMUP_ITERS": "0"}
    plan = plan_run(read_environment(first, family), cuda_devices, model.families, model.names)
    plan = replace(plan, instructions=Instructions(settings=settings, is_packed=plan.settings.pack))
    preflight(plan)
    plan = _with_samples(plan, template, announce)
    plan = _with_saved_samples(replace(plan, settings=_with_steps(plan, given)))
    check_schedule(plan)
    _check_same_order(plan)
    return plan


def _check_data(given: Mapping[str, str]) -> None:
    if given.get("DATASET_PATH", "mock") == "mock":
        raise PreflightError(
            "DATASET_PATH is not set.",
            "finetuning learns from JSONL, one conversation a line.",
            "DATASET_PATH=<file>.jsonl (docs/finetune.md shows the formats)",
        )


def _check_given(given: Mapping[str, str], settings: FinetuneSettings) -> None:
    if "PRETRAIN_CHECKPOINT_PATH" not in given:
        raise PreflightError(
            "PRETRAIN_CHECKPOINT_PATH is not set.",
            "finetuning starts from the weights of a trained model.",
            "PRETRAIN_CHECKPOINT_PATH=<run folder>, or none to start from random weights",
        )
    check_no_iteration(Path(given["PRETRAIN_CHECKPOINT_PATH"]))
    if settings.epochs == 0:
        raise PreflightError("EPOCHS=0 trains nothing.", "it counts passes over the samples.", "EPOCHS=1")


def _no_tokenizer(given: Mapping[str, str]) -> PreflightError:
    return PreflightError(
        "TOKENIZER is not set." if "TOKENIZER" not in given else f"TOKENIZER={NULL_TOKENIZER} reads no text.",
        f"conversations are text, and PRETRAIN_CHECKPOINT_PATH={given['PRETRAIN_CHECKPOINT_PATH']} names no tokenizer.",
        "TOKENIZER=<folder with tokenizer.json>",
    )


def _files(text: str) -> list[str]:
    # Several files are separated by spaces, which may also be part of one file's name. Path.exists would raise where
    # many names are too long for one.
    return [text] if os.path.exists(text) else text.split()


def _with_samples(plan: RunPlan, template: str | None, announce: Callable[[str], None]) -> RunPlan:
    assert plan.instructions is not None and plan.tokenizer is not None
    s, tokenizer, options = plan.settings, plan.tokenizer, plan.instructions.settings

    def prepared(text: str, variable: str) -> Prepared:
        return prepare(
            _files(text),
            tokenizer.path,
            plan.run_dir.parent / "data_cache",
            fingerprint=tokenizer.fingerprint,
            seq_length=s.seq_len,
            over_long=options.over_long,
            template=template,
            variable=variable,
            announce=announce,
        )

    def packs(samples: Prepared) -> Schedule:
        return schedule_of(samples, s.seq_len, plan.global_batch_size, s.seed, is_packed=s.pack)

    # The smaller one first: a mistake in it is told before the larger one is read.
    path = options.valid_dataset_path
    valid = None if path is None else prepared(path, "VALID_DATASET_PATH")
    train = prepared(s.dataset_path, "DATASET_PATH")
    instructions = replace(
        plan.instructions,
        train=train,
        valid=valid,
        packs=packs(train),
        valid_packs=None if valid is None else packs(valid),
    )
    for samples in filter(None, (train, valid)):
        _check_rows(plan, samples)
    return replace(plan, instructions=instructions)


def _check_rows(plan: RunPlan, samples: Prepared) -> None:
    largest = samples.report.largest_token
    if largest >= plan.padded_vocab_size:
        raise PreflightError(
            f"{', '.join(samples.report.source)} has token {largest}, and the embedding {plan.padded_vocab_size} rows.",
            "the tokenizer has tokens that the model does not.",
            "TOKENIZER=<the tokenizer of the model>",
        )


def _with_steps(plan: RunPlan, given: Mapping[str, str]) -> RunSettings:
    """Steps, warm-up, evaluations and checkpoints, now that an epoch is known."""
    instructions = plan.instructions
    assert instructions is not None and instructions.packs is not None
    epoch = instructions.packs.steps_per_epoch
    wanted = given_values(given, RunSettings)
    # With a margin for numbers like 0.1, of which 30 are 3.
    steps = math.ceil(instructions.settings.epochs * epoch - 1e-6)
    if "train_tokens" in wanted:
        steps = math.ceil(wanted["train_tokens"] / plan.settings.tokens_per_step)
    steps = wanted.get("train_iters", steps)
    changes: dict[str, Any] = {"train_iters": steps, "warmup_iters": wanted.get("warmup_iters")}
    if changes["warmup_iters"] is None and "warmup_tokens" not in wanted:
        changes["warmup_iters"] = min(math.ceil(_WARMUP * steps), steps - 1)
    for name in ("eval_interval", "save_interval"):
        changes[name] = wanted.get(name, epoch)
    whole = 0 if instructions.valid_packs is None else instructions.valid_packs.steps_per_epoch
    changes["eval_iters"] = 0 if whole == 0 else wanted.get("eval_iters", whole)
    return replace(plan.settings, **changes)


def _with_saved_samples(plan: RunPlan) -> RunPlan:
    """A run that goes on keeps its folder of samples where files that differ from before gave the same ones.

    The tokenizer that a run keeps has the chat template in it that was given to the run besides.
    """
    assert plan.instructions is not None and plan.instructions.train is not None
    saved, now = read_config(plan.run_dir).get("arguments", []), plan.instructions.train
    name = _order(saved).get("--instruction-data", now.folder.name)
    if name == now.folder.name:
        return plan
    try:
        before = open_prepared(now.folder.with_name(name))
    except ValueError:
        return plan  # removed: they cannot be compared
    if not before.holds(now):
        return plan
    return replace(plan, instructions=replace(plan.instructions, train=before))


def _check_same_order(plan: RunPlan) -> None:
    """A run that goes on takes the samples that it has not taken yet."""
    from linear_moe.launch.megatron_args import training_arguments

    if checkpoint_iteration(plan.run_dir / "checkpoint") is None:
        return
    saved = read_config(plan.run_dir).get("arguments")
    if saved is None:
        return
    before, now = _order(saved), _order(training_arguments(plan))
    changed = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in _SAME
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise PreflightError(
            f"run {plan.run_dir} would go on with other samples:\n    " + "\n    ".join(changed),
            "which sample a step takes follows from these; some would be repeated and others lost.",
            f"the variables of that run, or RUN_NAME=<new> "
            f"PRETRAIN_CHECKPOINT_PATH={shlex.quote(str(plan.run_dir))} to start from its weights",
        )


def _order(arguments: list[str]) -> dict[str, str]:
    """The flags of `_SAME`; of the folder its name alone, as a run may have moved."""
    found = {name: text for name, text in flags_of(arguments).items() if name in _SAME}
    if "--instruction-data" in found:
        found["--instruction-data"] = Path(found["--instruction-data"]).name
    return found
