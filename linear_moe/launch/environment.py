"""The variables of a run script as one frozen dataclass, read from the environment with types and defaults.

The names are those of the earlier Linear-MoE system's `run_pretrain_qwen.sh`, so that its users type what they know. A
variable that is set but empty counts as not set. `python -m linear_moe.launch --help` prints this table.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from linear_moe.field_docs import field_docs
from linear_moe.launch.errors import PreflightError
from linear_moe.model.families import FAMILIES

SMALLEST_GLOBAL_BATCH = 8
"""GLOBAL_BATCH_SIZE when it is not set and the ranks can share it."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run script can say: the field `tp` is the variable TP, and so on; `variables()` lists them."""

    # The model.
    base_model: str = "qwen2"
    """Family of the model. Each script sets its own."""
    model_size: str | None = None
    """Named size of the family. Not set: that of PRETRAIN_CHECKPOINT_PATH, else the family's default size."""
    moe: bool | None = None
    """Experts: true gives a dense size 8 of them, top-2; false leaves them out. Not set: as the size is."""
    la_module: str = "gated_deltanet"
    """Mixer of `L` layers, or several, "gla,gated_deltanet", chosen by digits of LAYER_TYPE_LIST; mamba2: its own."""
    mixer_modules: str | None = None
    """Modules of yours that register mixers, "my_package.my_mixer,another"; found through PYTHONPATH."""
    layer_type_list: str | None = None
    """One symbol per layer: L linear, N softmax. A shorter pattern repeats. Not set: L everywhere."""
    hybrid_override_pattern: str | None = None
    """The other spelling of a pattern: M mamba2, * softmax."""
    extra_vocab_size: int | None = None
    """Embedding rows above the tokenizer's base vocabulary. Not set: the size's own number."""
    moe_aux_loss_coeff: float = 1e-2
    """Weight of the load-balancing loss of the experts. 0 turns it off."""

    # Data and tokenizer.
    dataset_path: str = "mock"
    """Prefix of .bin/.idx, or a blend "0.3 prefix1 0.7 prefix2" (no weights: by size), or `mock`: no file at all."""
    tokenizer: str | None = None
    """Folder with tokenizer.json, or `null`: numbers, no text. Not set: `null` with mock data, else required."""
    vocab_size: int | None = None
    """Vocabulary with TOKENIZER=null. Not set: the size's own number."""
    pack: bool = False
    """Documents of one sequence never see each other: attention and the memory of every mixer restart at each one."""
    seq_len: int = 2048
    """Tokens of a training sequence."""

    # Batch and optimizer.
    batch_size: int = 4
    """Sequences of one micro batch, per data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences of one step, over all ranks. Not set: 8, or the next number that all ranks can share."""
    lr: float = 1e-4
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-5
    """Learning rate the cosine ends at."""
    pr: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and activations; gradients and optimizer are always fp32."""
    seed: int = 1234
    """Seed of weights, data order and dropout."""

    # How long.
    train_tokens: int = 15_000_000_000
    """Tokens to train on; 15e9 is a way to write it. TRAIN_ITERS wins."""
    train_iters: int | None = None
    """Steps to train. Not set: TRAIN_TOKENS / GLOBAL_BATCH_SIZE / SEQ_LEN, rounded up."""
    warmup_tokens: int = 10_000
    """Tokens of the learning-rate warm-up; a positive number is at least one step. WARMUP_ITERS wins."""
    warmup_iters: int | None = None
    """Steps of the warm-up. Not set: from WARMUP_TOKENS."""
    save_interval: int = 100_000
    """Steps between checkpoints; the last step always saves one. 0: nothing is ever saved."""
    eval_interval: int = 100_000
    """Steps between evaluations on the 1 % of the data that is held out."""
    eval_iters: int = 10
    """Batches of one evaluation. 0: never evaluate."""
    log_interval: int = 1
    """Steps between progress lines; metrics.jsonl has every step."""
    verbose: bool = False
    """Show everything Megatron prints, not only progress; the log of the run always has all of it."""

    # Layout.
    tp: int = 1
    """Tensor parallel size: heads and feed-forward widths are cut."""
    pp: int = 1
    """Pipeline parallel size: layers are cut into stages."""
    vpp: int = 1
    """Virtual stages per pipeline rank (interleaved schedule). 1: none."""
    cp: int = 1
    """Context parallel size: every sequence is cut."""
    ep: int = 1
    """Expert parallel size: the experts are dealt out."""
    etp: int | None = None
    """Tensor parallel size inside an expert. Not set: TP, and 1 on CPU with EP > 1."""
    sp: bool = False
    """Sequence parallel: norms and residuals are cut over TP. Always on for experts with TP > 1."""
    do: bool = True
    """Distributed optimizer: its state is cut over data-parallel ranks."""

    # Memory and kernels.
    ac: Literal["sel", "full", "none"] = "sel"
    """Activation recomputation: selective, whole layers, or none."""
    te: Literal["auto", "true", "false"] = "auto"
    """Transformer Engine. auto: when it is installed."""
    use_gemm: bool = True
    """Grouped GEMM for the experts. false: Megatron's loop over experts (slow; same checkpoint)."""
    token_dropping: bool = False
    """Drop the tokens an expert has no room for."""
    train_capacity_factor: float = 1.25
    """Room of an expert with TOKEN_DROPPING: this many times the even share."""

    # Where it runs.
    gpus_per_node: int | None = None
    """Processes per node. Not set: every CUDA device, or one process on CPU."""
    nnodes: int = 1
    """Nodes. Under `srun`, read from SLURM."""
    node_rank: int = 0
    """Number of this node, from 0. Under `srun`, read from SLURM."""
    master_addr: str | None = None
    """Address of node 0. Required with NNODES > 1; under `srun`, read from SLURM."""
    master_port: int | None = None
    """Port of node 0. Not set: any free one on a single node, else 29500."""

    # Where it goes.
    output_basepath: str = "output"
    """Folder of all runs."""
    run_name: str | None = None
    """Name of this run's folder. Starting the same name again resumes it. Not set: family-size-mixers-pattern."""
    pretrain_checkpoint_path: str | None = None
    """First weights: run, checkpoint of any layout, Hugging Face folder, or `none`. A run that resumes ignores it."""
    extra_args: str = ""
    """Anything else, passed to Megatron as typed: EXTRA_ARGS="--log-params-norm --num-workers 4"."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return (self.global_batch_size or SMALLEST_GLOBAL_BATCH) * self.seq_len

    @property
    def iterations(self) -> int:
        """Steps to train: TRAIN_ITERS, else enough steps for TRAIN_TOKENS."""
        return (
            self.train_iters
            if self.train_iters is not None
            else math.ceil(self.train_tokens / self.tokens_per_step)
        )

    @property
    def warmup_iterations(self) -> int:
        """Warm-up steps: WARMUP_ITERS, else WARMUP_TOKENS rounded up (a few tokens are one step), within the run."""
        if self.warmup_iters is not None:
            return self.warmup_iters
        return min(math.ceil(self.warmup_tokens / self.tokens_per_step), self.iterations - 1)


def variables(settings: type = RunSettings) -> dict[str, tuple[dataclasses.Field, str]]:
    """Environment variable -> (its field of ``settings``, its one-line description)."""
    docs = field_docs(settings)
    return {f.name.upper(): (f, docs[f.name]) for f in dataclasses.fields(settings)}


def read_environment(environment: Mapping[str, str], family: str) -> RunSettings:
    """RunSettings of one family from environment variables.

    Raises PreflightError for a value of the wrong type, and for BASE_MODEL naming another family than the script's.
    """
    defaults = {"base_model": family, "la_module": default_mixer(family)}
    settings = RunSettings(**defaults | given_values(environment, RunSettings))
    if settings.base_model != family:
        raise PreflightError(
            f"BASE_MODEL={settings.base_model}, but this script trains {family}.",
            "every family has its own script, and the script decides.",
            f"BASE_MODEL={family}",
        )
    return settings


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """A variable that is no setting of a run: 1 or true, 0 or false; not set: false. PreflightError for another."""
    text = environment.get(name, "").strip().lower() or "false"
    if text not in _WORDS:
        raise PreflightError(
            f"{name}={text} is not true or false.", "nothing is started by guess.", f"{name}=1"
        )
    return _WORDS[text]


_OTHER_NAMES = {
    "LA_MODULE": "MIXER MIXERS",
    "LAYER_TYPE_LIST": "LAYER_TYPE LAYER_TYPES LAYER_PATTERN",
    "DATASET_PATH": "DATA_PATH",
    "TOKENIZER": "TOKENIZER_PATH TOKENIZER_MODEL",
    "SEQ_LEN": "SEQ_LENGTH SEQUENCE_LENGTH MAX_SEQ_LEN CONTEXT_LENGTH",
    "BATCH_SIZE": "MICRO_BATCH_SIZE MBS",
    "GLOBAL_BATCH_SIZE": "GBS TRAIN_BATCH_SIZE",
    "LR": "LEARNING_RATE MAX_LR",
    "MIN_LR": "MIN_LEARNING_RATE",
    "PR": "PRECISION DTYPE",
    "TRAIN_ITERS": "ITERS ITERATIONS STEPS TRAIN_STEPS MAX_STEPS NUM_STEPS",
    "WARMUP_ITERS": "WARMUP_STEPS LR_WARMUP_ITERS",
    "SAVE_INTERVAL": "SAVE_STEPS",
    "EVAL_INTERVAL": "EVAL_STEPS",
    "EPOCHS": "NUM_EPOCHS NUM_TRAIN_EPOCHS",
    "TP": "TP_SIZE TENSOR_PARALLEL TENSOR_MODEL_PARALLEL_SIZE",
    "PP": "PP_SIZE PIPELINE_PARALLEL PIPELINE_MODEL_PARALLEL_SIZE",
    "CP": "CP_SIZE CONTEXT_PARALLEL CONTEXT_PARALLEL_SIZE",
    "EP": "EP_SIZE EXPERT_PARALLEL EXPERT_MODEL_PARALLEL_SIZE",
    "AC": "RECOMPUTE ACTIVATION_CHECKPOINTING",
    "GPUS_PER_NODE": "NUM_GPUS NGPUS NPROC_PER_NODE",
    "NNODES": "NUM_NODES",
    "OUTPUT_BASEPATH": "OUTPUT_DIR OUTPUT_PATH",
    "PRETRAIN_CHECKPOINT_PATH": "CHECKPOINT_PATH LOAD_PATH",
}
"""Variables -> what other trainers and Megatron call them; no word that systems set for themselves, as NAME or DATA."""
_OURS = {theirs: ours for ours, names in _OTHER_NAMES.items() for theirs in names.split()}
_COMMON = (
    "CHECKPOINT_PATH LOAD_PATH DATA_PATH OUTPUT_DIR OUTPUT_PATH DTYPE PRECISION NUM_GPUS NGPUS NPROC_PER_NODE "
    "NUM_NODES STEPS ITERS ITERATIONS"
)
_OF_OTHERS = {*_COMMON.split()}
"""Those of them that clusters and other programs (our own evaluation is one) set, too: seldom a mistake."""


def misspelt_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """One line for each variable that is set and is all but one of the ``known`` ones, or another's name of one.

    Names that other programs have as well share one line, without those of which the person has set ours.
    """
    long = [name for name in known if len(name) > 4]
    found: list[str] = []
    of_others: dict[str, str] = {}
    for name in environment:
        if name in known or not environment[name].strip():
            continue
        meant = _OURS.get(name.upper(), name.upper())
        near = [meant] if meant in known else difflib.get_close_matches(name, long, n=1, cutoff=0.85)
        if name in _OF_OTHERS:
            of_others |= {} if _is_chosen(environment, meant) else {name: meant}
        elif near:
            found.append(f"{name} is no variable of a run, and does nothing: {near[0]} is one.")
    if of_others:
        pairs = ", ".join(f"{theirs} ({ours} is)" for theirs, ours in of_others.items())
        found.append(f"no variable of a run, whatever else reads it: {pairs}.")
    return found


def _is_chosen(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable has another value than its default, which the scripts give to all."""
    f, _ = variables()[name]
    return environment.get(name, "").strip().lower() not in ("", "none", str(f.default).lower())


def of_finetuning(environment: Mapping[str, str], names: Collection[str]) -> list[str]:
    """One line for each variable that is set and is one of ``names``, which only finetuning reads."""
    return [
        f"{name} does nothing here: only finetuning reads it."
        for name in names
        if environment.get(name, "").strip()
    ]


def texts_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set, without spaces around them and with the home folder for the ~ of paths."""
    return {name: _at_home(text.strip()) for name, text in environment.items() if text.strip()}


def _at_home(text: str) -> str:
    # A shell leaves the ~ of a path in quotes as it is, and no file is meant to lie in a folder of that name. A text
    # may be a list of paths (a blend, several files), or options with some among them.
    return re.sub(r"(?<!\S)~/", lambda _: os.path.expanduser("~/"), text)


def default_mixer(family: str) -> str:
    """LA_MODULE when it is not set."""
    published = FAMILIES[family].mixer if family in FAMILIES else None
    return published or RunSettings.la_module


def given_values(environment: Mapping[str, str], settings: type) -> dict[str, Any]:
    """Field of ``settings`` -> its value, of the variables that are set. PreflightError for one of the wrong type."""
    values = {}
    for name, (f, doc) in variables(settings).items():
        text = environment.get(name, "").strip()
        if text:
            values[f.name] = _parse(name, text, f, doc)
    return values


_MAY_BE_ZERO = {
    "SEED",
    "NODE_RANK",
    "EVAL_ITERS",
    "SAVE_INTERVAL",
    "WARMUP_TOKENS",
    "WARMUP_ITERS",
    "EXTRA_VOCAB_SIZE",
}
_EXAMPLES = {"MOE": "true", "ETP": 1, "GPUS_PER_NODE": 1, "MASTER_PORT": 29500, "VOCAB_SIZE": 32000}
_LARGEST = {"SEED": 2**31 - 1}
"""Where numpy and Megatron, which adds the number of the stage, end."""
_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _parse(name: str, text: str, f: dataclasses.Field, doc: str) -> Any:
    value, wanted = _value(name, text, _without_none(f.type))
    if value is None:
        example = str(f.default).lower() if f.type is bool else f.default
        example = _EXAMPLES.get(name, 100) if f.default is None else example
        raise PreflightError(f"{name}={text} is not {wanted}.", doc, f"{name}={example}")
    return value


def _value(name: str, text: str, kind: Any) -> tuple[Any, str]:
    # The value, None when the text is not one, and what the text should be.
    if kind is str:
        return _at_home(text), "text"
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return text.lower() if text.lower() in choices else None, f"one of {', '.join(choices)}"
    if kind is bool:
        return _WORDS.get(text.lower()), "true or false"
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is float:
        return number if 0 <= number < math.inf else None, "a number, 0 or more"
    assert kind is int
    least = 0 if name in _MAY_BE_ZERO else 1
    largest = _LARGEST.get(name, math.inf)
    is_whole = least <= number <= largest and number < math.inf and number == int(number)
    exact = int(text) if text.isascii() and text.isdigit() else int(number) if is_whole else None
    bounds = f"{least} or more" if name not in _LARGEST else f"from {least} to {largest}"
    return exact if is_whole else None, f"a whole number, {bounds}"


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind
