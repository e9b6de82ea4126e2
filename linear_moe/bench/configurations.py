"""What to measure: models x sequence lengths, each as the variables of a run script."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from linear_moe.launch.environment import read_environment, variables
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan, plan_run
from linear_moe.launch.preflight import preflight

SOFTMAX = "softmax"
WATCH = "LINEAR_MOE_WATCH"
"""Variable that tells a run how it is watched."""
TRACE = "trace.json.gz"
"""File of a profile's events, for Perfetto or chrome://tracing."""
PROFILED_STEPS = 4
TRACED_STEPS = 1
"""Behind those: with operators and shapes of the host, which slow it down."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What to write about a run, besides its ``metrics.jsonl``."""

    folder: str
    """Where ``start.json``, ``profile.json`` and the trace go."""
    profile_after: int | None = None
    """Profile the steps behind this one, and trace one more. None: no profile."""

    @property
    def trace_after(self) -> int:
        """Last step that is profiled, or 0."""
        return 0 if self.profile_after is None else self.profile_after + PROFILED_STEPS

    @property
    def trace_until(self) -> int:
        """Last step that is traced, or 0."""
        return self.trace_after and self.trace_after + TRACED_STEPS

    def environment(self) -> dict[str, str]:
        """What the run is told."""
        return {WATCH: json.dumps(asdict(self))}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run."""

    model: str
    """As it was asked for: ``gla``, ``gla:LLLN``, ``softmax``."""
    change: str = ""
    """The variables in which it differs from the others, "AC=none"."""
    seq_len: int
    """Tokens of a sequence."""
    family: str
    """Family of the model."""
    variables: dict[str, str]
    """Variables of the run script, but for data and output."""
    warm_up: int
    """Steps before those that count."""
    steps: int
    """Steps that count."""
    is_profiled: bool
    """Whether more steps are profiled, behind those."""

    def watch(self, folder: Path) -> Watch:
        """What its run writes."""
        return Watch(
            folder=str(folder), profile_after=self.warm_up + self.steps if self.is_profiled else None
        )

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.label} at {self.seq_len} tokens"

    @property
    def label(self) -> str:
        """Model and change: a row of the tables."""
        return f"{self.model} {self.change}".strip()

    @property
    def slug(self) -> str:
        """For file names."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", f"{self.label}_{self.seq_len}")


def models_of(words: Sequence[str]) -> list[str]:
    """Models as they are typed: words, or a list with commas. With digits in a pattern, commas part its mixers."""
    found = []
    for word in words:
        is_one = re.fullmatch(r"[^:]+:\w*\d\w*", word)
        found += [word] if is_one else [name for name in word.split(",") if name] or [word]
    return found


def refuse_less(flag: str, number: int, least: int, counted: str, example: int) -> None:
    """PreflightError for a number that counts nothing."""
    if number < least:
        raise PreflightError(
            f"{flag} {number} is less than {least}.", f"it counts {counted}.", f"{flag} {example}"
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the command line asks for; see ``step.parser``."""

    family: str
    size: str
    models: list[str]
    seq_lens: list[int]
    tokens: int
    micro_tokens: int | None
    steps: int
    warm_up: int
    settings: dict[str, str]
    changes: list[str]
    is_profiled: bool

    @classmethod
    def of(cls, given: argparse.Namespace) -> Sweep:
        """From the command line; PreflightError for a word that is no variable and a number that counts nothing."""
        for name, numbers, least, example in (
            ("--seq-lens", given.seq_lens, 1, 2048),
            ("--tokens", [given.tokens], 1, 65536),
            ("--micro-tokens", [1 if given.micro_tokens is None else given.micro_tokens], 1, 65536),
            ("--steps", [given.steps], 1, 20),
            ("--warm-up", [given.warm_up], 0, 5),
        ):
            counted = "steps" if name in ("--steps", "--warm-up") else "tokens"
            refuse_less(name, min(numbers), least, counted, example)
        return cls(
            family=given.family,
            size=given.size,
            models=models_of(given.models),
            seq_lens=given.seq_lens,
            tokens=given.tokens,
            micro_tokens=given.micro_tokens,
            steps=given.steps,
            warm_up=given.warm_up,
            settings=assignments(given.set, "--set"),
            changes=given.vary,
            is_profiled=given.profile,
        )


def sweep(asked: Sweep) -> list[Configuration]:
    """All configurations, the shortest sequences first; changed ones right behind the first length.

    Raises:
        PreflightError: a step cannot be cut into sequences, or a word is no variable.
    """
    found = []
    for seq_len in asked.seq_lens:
        for change in ["", *(asked.changes if seq_len == asked.seq_lens[0] else [])]:
            found += [_configuration(asked, model, seq_len, change) for model in asked.models]
    return found


def _configuration(asked: Sweep, model: str, seq_len: int, change: str) -> Configuration:
    mixers, _, pattern = model.partition(":")
    if mixers == SOFTMAX:
        architecture = {"LAYER_TYPE_LIST": "N"}
    else:
        architecture = {"LA_MODULE": mixers} | ({"LAYER_TYPE_LIST": pattern} if pattern else {})
    return Configuration(
        model=model,
        change=change,
        seq_len=seq_len,
        family=asked.family,
        variables={
            "MODEL_SIZE": asked.size,
            **architecture,
            "GPUS_PER_NODE": "1",
            "SEQ_LEN": str(seq_len),
            **_batches(asked, seq_len),
            **{"SAVE_INTERVAL": "0", "EVAL_ITERS": "0", "WARMUP_ITERS": "1"},
            **asked.settings,
            **assignments(shlex.split(change), "--vary"),
        },
        warm_up=asked.warm_up,
        steps=asked.steps,
        is_profiled=asked.is_profiled,
    )


def _batches(asked: Sweep, seq_len: int) -> dict[str, str]:
    if asked.tokens % seq_len:
        raise PreflightError(
            f"--tokens {asked.tokens} is no multiple of {seq_len} (--seq-lens).",
            "a step takes the same number of tokens at every sequence length.",
            f"--tokens {max(1, round(asked.tokens / seq_len)) * seq_len}",
        )
    sequences = asked.tokens // seq_len
    micro = min(sequences, max(1, (asked.micro_tokens or asked.tokens) // seq_len))
    if sequences % micro:
        raise PreflightError(
            f"--micro-tokens {asked.micro_tokens} does not divide a step of {asked.tokens} tokens.",
            f"at SEQ_LEN={seq_len} that is {sequences} sequences in micro batches of {micro}.",
            f"--micro-tokens {asked.tokens // 2}",
        )
    return {"BATCH_SIZE": str(micro), "GLOBAL_BATCH_SIZE": str(sequences)}


def assignments(words: list[str], flag: str) -> dict[str, str]:
    """``VARIABLE=VALUE`` words; PreflightError for others."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in variables():
            raise PreflightError(
                f"{flag} {word} sets no variable of a run script.",
                "python -m linear_moe.launch --help lists the variables.",
                f"{flag} AC=none",
            )
        found[name] = value
    return found


def plan_of(configuration: Configuration, cuda_devices: int, **more: str) -> RunPlan:
    """The run as the launcher plans it, checked; ``more`` are variables of data and output."""
    more_steps = (PROFILED_STEPS + TRACED_STEPS) * configuration.is_profiled
    iterations = configuration.warm_up + configuration.steps + more_steps
    known = {"TRAIN_ITERS": str(iterations), **configuration.variables, **more}
    plan = plan_run(read_environment(known, configuration.family), cuda_devices)
    preflight(plan)
    return plan
