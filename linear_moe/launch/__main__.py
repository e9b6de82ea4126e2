"""`python -m linear_moe.launch --family qwen2`: what a run script ends in.

Reads the environment, checks everything, prints what is about to happen, and starts torchrun. Exit codes: 2 for a
mistake in the variables, with one message; otherwise torchrun's. LINEAR_MOE_DRY_RUN=1 starts nothing: the command is
on standard output, alone, and what is about to happen on standard error.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TextIO

from linear_moe.launch.check_network import check_network
from linear_moe.launch.cluster import RETIRED, cuda_device_count, retired_variables, with_cluster
from linear_moe.launch.environment import (
    RunSettings,
    default_mixer,
    is_true,
    misspelt_variables,
    of_finetuning,
    read_environment,
    texts_of,
    variables,
)
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.finetune import DEFAULTS, plan_finetune
from linear_moe.launch.header import default_variables, header
from linear_moe.launch.hugging_face import convert
from linear_moe.launch.instructions import FinetuneSettings, keep_tokenizer
from linear_moe.launch.lock import hold_run
from linear_moe.launch.megatron_args import shell_text, torchrun_command
from linear_moe.launch.plan import RunPlan, plan_run
from linear_moe.launch.preflight import check_kernels, preflight
from linear_moe.launch.relay import cause, is_our_line, last_lines, mistake, run_logged
from linear_moe.launch.resume import checkpoint_iteration, going_on
from linear_moe.launch.starting_model import starting_model, with_start
from linear_moe.model.families import FAMILIES

_MISTAKE = 2
_FULL = 1 << 20
"""Free bytes of a disk that holds no more."""


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Launch a run as the environment describes it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m linear_moe.launch",
        description="Start a run described by environment variables.",
        epilog=_variables_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--family", required=True, help=f"family of the model: {', '.join(FAMILIES)}")
    parser.add_argument("--finetune", action="store_true", help="learn the answers of JSONL conversations")
    task, others = parser.parse_known_args(arguments)
    try:
        _refuse(others)
        is_dry = is_true(environment, "LINEAR_MOE_DRY_RUN")
        check_kernels(environment)
        variables_given, devices = with_cluster(environment), cuda_device_count()
        if task.finetune:
            plan = plan_finetune(variables_given, task.family, devices, _announce)
        else:
            plan = going_on(_plan_pretraining(variables_given, task.family, devices))
            preflight(plan)
    except ValueError as error:
        if "\n  why: " not in str(error):
            raise  # not a mistake in the variables: a defect
        _announce(str(error))
        return _MISTAKE
    except OSError as error:
        _announce(
            f"{error.filename or 'a file'} cannot be used: {error.strerror}.\n"
            f"  why: a path among the variables leads there.\n"
            f"  try: another path, or ask its owner for permission (ls -ld shows who that is)"
        )
        return _MISTAKE
    own = variables(FinetuneSettings)
    known = {*variables(RunSettings), *own, *RETIRED}
    idle = [] if task.finetune else of_finetuning(environment, own)
    for line in retired_variables(environment) + misspelt_variables(variables_given, known) + idle:
        _announce(line)
    if is_dry:
        _write(sys.stderr, header(plan))
        _write(sys.stdout, shell_text(torchrun_command(plan)))
        return 0
    return _start(plan, environment)


def _refuse(words: list[str]) -> None:
    """PreflightError for what stands behind the name of a run script and would do nothing there."""
    if words:
        text = shlex.join(words)
        is_variable = "=" in words[0] and not words[0].startswith("-")
        raise PreflightError(
            f"{words[0]} stands behind the command, where it says nothing.",
            "a run is described by variables, which stand before it.",
            f"{text} sh <this script>" if is_variable else f"EXTRA_ARGS={shlex.quote(text)} sh <this script>",
        )


def _plan_pretraining(environment: Mapping[str, str], family: str, devices: int) -> RunPlan:
    """What the person leaves out of the model is that of the checkpoint."""
    given: Mapping[str, str] = texts_of(environment)
    if given.get("PRETRAIN_CHECKPOINT_PATH", "none") == "none":
        return plan_run(read_environment(given, family), devices)
    given = with_start(given, _announce)
    if "LAYER_TYPE_LIST" in given:
        given = {"LA_MODULE": default_mixer(family), **given}
    model = starting_model(given, family, "pretrain")
    settings = read_environment({**given, **model.variables}, family)
    return plan_run(settings, devices, model.families, model.names)


def _start(plan: RunPlan, environment: Mapping[str, str]) -> int:
    command, head = torchrun_command(plan), header(plan)
    try:
        check_network(plan)
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with hold_run(plan, _announce):
            log = _prepare(plan, f"{head}\n\n{shell_text(command)}\n\n")
            return _MISTAKE if log is None else _run(plan, command, log, head, environment)
    except PreflightError as error:
        _announce(str(error))
    except OSError as error:
        _announce(
            f"{error.filename or plan.run_dir} cannot be written: {error.strerror}.\n"
            f"  why: the run lives in {plan.run_dir}.\n"
            f"  try: OUTPUT_BASEPATH=<a folder of yours, on a disk with room>"
        )
    return _MISTAKE


def _prepare(plan: RunPlan, first_lines: str) -> Path | None:
    """What the run needs in its folder; its log, or None where a Hugging Face folder could not be converted."""
    if plan.tokenizer is not None:
        train = plan.instructions.train if plan.instructions is not None else None
        template = train.report.template if train is not None else None
        keep_tokenizer(plan.run_dir, Path(plan.tokenizer.path), template)
    if not convert(plan, _announce):
        return None
    (plan.run_dir / "log").mkdir(exist_ok=True)
    node = f"-node{plan.settings.node_rank}" if plan.settings.nnodes > 1 else ""
    log = plan.run_dir / "log" / f"{time.strftime('%Y%m%d-%H%M%S')}{node}.log"
    log.write_text(first_lines)
    return log


def _run(plan: RunPlan, command: list[str], log: Path, head: str, environment: Mapping[str, str]) -> int:
    verbose = plan.settings.verbose
    _write(
        sys.stdout, f"{head}\nlog         {log}{'' if verbose else ' (VERBOSE=true shows all of it here)'}\n"
    )
    show = (lambda line: True) if verbose else is_our_line
    received: list[signal.Signals] = []
    code = run_logged(command, log, _child_environment(plan, environment), show, received)
    if code:
        _report_failure(plan, log, code, received)
    return code


def _report_failure(plan: RunPlan, log: Path, code: int, received: list[signal.Signals]) -> None:
    """Why the run has ended, as far as its log says; one that was stopped has done nothing wrong."""
    stopped = [s for s in received if code == 128 + s or s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    if stopped:
        step = checkpoint_iteration(plan.run_dir / "checkpoint")
        kept = (
            "no checkpoint yet"
            if step is None
            else f"step {step} is kept, and the same command goes on from there"
        )
        _announce(f"stopped by {stopped[0].name}: {kept}.")
    elif shutil.disk_usage(plan.run_dir).free < _FULL:
        step = checkpoint_iteration(plan.run_dir / "checkpoint")
        _announce(
            f"the disk of {plan.run_dir} is full.\n"
            f"  why: checkpoints, metrics and the log are written there; "
            f"{'none of the first is whole' if step is None else f'the last whole step is {step}'}.\n"
            f"  try: make room, and the same command goes on"
        )
    elif (told := mistake(log)) is not None:
        _announce(told)
    elif not plan.settings.verbose:
        _write(sys.stderr, last_lines(log, 60))
        if (first := cause(log)) is not None:
            _announce(first)
    _announce(f"the run ended with exit code {code}; all of its output is in {log}")


def _child_environment(plan: RunPlan, environment: Mapping[str, str]) -> dict[str, str]:
    defaults = {
        **default_variables(plan),
        "PYTHONUNBUFFERED": "1",  # the progress line, when it happens
        "HF_HUB_OFFLINE": "1",  # a tokenizer is a local folder here, never a download
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **environment}


def _variables_help() -> str:
    lines = []
    changed = ", ".join(f"{name}={value}" for name, value in DEFAULTS.items())
    finetune = f"only with --finetune, whose other defaults are {changed}, and an epoch for both intervals:"
    for title, settings in (("variables:", RunSettings), (finetune, FinetuneSettings)):
        lines.append(title)
        for name, (f, doc) in variables(settings).items():
            choices = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()
            shown = str(f.default).lower() if f.type is bool else f.default
            default = "" if shown in (None, "") else f" [{shown}]"
            lines.append(f"  {name:<25} {doc}{' One of ' * bool(choices)}{', '.join(choices)}{default}")
    return "\n".join(lines)


def _announce(line: str) -> None:
    _write(sys.stderr, f"linear_moe: {line}")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
