"""What a finetuning run learns: its variables, its prepared samples, and their part of the command line."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from linear_moe.data.instructions.packing import Schedule, alone, pack
from linear_moe.data.instructions.prepare import Prepared
from linear_moe.data.tokenizer import TOKENIZER_FILES


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """The variables that only a finetuning script has, next to those of ``RunSettings``."""

    valid_dataset_path: str | None = None
    """JSONL files of the validation set, all of which every evaluation reads. Not set: no evaluation."""
    epochs: float = 3.0
    """Times that every sample is learned. TRAIN_ITERS and TRAIN_TOKENS win."""
    over_long: Literal["drop", "truncate"] = "drop"
    """Samples longer than SEQ_LEN: leave them out, or cut them; counted either way."""
    chat_template: str | None = None
    """File with a Jinja chat template, or `plain`. Not set: the tokenizer's; without one, `plain` for instructions."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Samples and how they are taken; before they are prepared, only the variables."""

    settings: FinetuneSettings
    """The variables."""
    train: Prepared | None = None
    """Samples to learn."""
    valid: Prepared | None = None
    """Samples to validate on."""
    packs: Schedule | None = None
    """Sequences of an epoch and their steps."""
    valid_packs: Schedule | None = None
    """Sequences of an evaluation."""
    is_packed: bool = True
    """Samples share sequences."""

    def notes(self, seq_length: int) -> list[str]:
        """What a person should know of the samples."""
        found = []
        for prepared, schedule in ((self.train, self.packs), (self.valid, self.valid_packs)):
            if prepared is not None and schedule is not None:
                found += prepared.report.notes(seq_length)
        if self.packs is not None and self.packs.num_packs < self.packs.per_step:
            found.append(
                f"all samples fit {self.packs.num_packs} sequences, fewer than GLOBAL_BATCH_SIZE="
                f"{self.packs.per_step}: the rest of every step is empty."
            )
        return found

    def epochs_text(self, iterations: int) -> str:
        """How often everything is seen in so many steps."""
        assert self.packs is not None
        each = self.packs.steps_per_epoch
        return f"{iterations / each:.3g} epoch(s) of {each}"

    def text(self) -> str:
        """The samples in a line."""
        parts = []
        for name, prepared, schedule in (
            ("", self.train, self.packs),
            ("valid ", self.valid, self.valid_packs),
        ):
            if prepared is not None and schedule is not None:
                report = prepared.report
                parts.append(
                    f"{name}{report.samples} samples in {schedule.num_packs} sequences, "
                    f"{report.learned_tokens} of {report.tokens} tokens learned"
                )
        return ", ".join(parts)


def schedule_of(
    prepared: Prepared, seq_length: int, per_step: int, seed: int, *, is_packed: bool
) -> Schedule:
    """How an epoch takes the samples."""
    packs = pack(prepared.lengths, seq_length, seed) if is_packed else alone(prepared.lengths)
    return Schedule(len(packs), per_step, seed)


def instruction_arguments(instructions: Instructions) -> list[str]:
    """Their part of the command line."""
    assert instructions.train is not None
    flags = ["--instruction-data", str(instructions.train.folder)]
    if instructions.valid is not None:
        flags += ["--valid-instruction-data", str(instructions.valid.folder)]
        flags.append("--log-validation-ppl-to-tensorboard")
    return flags if instructions.is_packed else [*flags, "--no-instruction-packing"]


def kept_tokenizer(run_dir: Path) -> Path:
    """Where a run keeps its tokenizer and the chat template that it learned."""
    return run_dir / "tokenizer"


def keep_tokenizer(run_dir: Path, source: Path, template: str | None) -> None:
    """Copy the tokenizer into the run, with ``template`` for its chat template unless that is ``None``."""
    folder = kept_tokenizer(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).exists()}
    if template is not None:
        config = json.loads(files["tokenizer_config.json"])
        config.pop("chat_template", None)
        files["tokenizer_config.json"] = (json.dumps(config, indent=1) + "\n").encode()
        files["chat_template.jinja"] = template.encode()
    for name, content in files.items():
        # Nodes share the disk, and containers on them often the number of the process.
        part = folder / f"{name}.part{secrets.token_hex(4)}"
        part.write_bytes(content)
        part.replace(folder / name)
