"""A run as it will be: settings, architecture and layout resolved together, before anything is checked or started.

world = nodes x processes per node = TP x PP x CP x DP        experts: world = ETP x EP x PP x expert DP
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from linear_moe.checkpoint.hf_config import is_hf_folder
from linear_moe.data.tokenizer import TokenizerError, TokenizerInfo, describe_tokenizer
from linear_moe.launch.environment import SMALLEST_GLOBAL_BATCH, RunSettings
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.instructions import Instructions
from linear_moe.launch.size_flags import changed_size
from linear_moe.model.families import FAMILIES, Family, ModelSize, padded_vocab_size
from linear_moe.model.pattern import layer_kinds, pattern_of

NULL_TOKENIZER = "null"
MOCK_DATA = "mock"
SHARED_PREFIXES = ("--la-", "--expand-", "--mom-")
"""How flags begin that set an option of every mixer, or of every mixture, that has it."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything the checks, the header and the command line need to know of a run."""

    settings: RunSettings
    """The variables."""
    family: Family
    """Family of the model."""
    size_name: str
    """Its MODEL_SIZE."""
    size: ModelSize
    """The size, with the changes EXTRA_ARGS makes."""
    kinds: tuple[str, ...]
    """Mixer of each layer."""
    extra_args: tuple[str, ...]
    """EXTRA_ARGS, split, without the flags that changed the size."""
    tokenizer: TokenizerInfo | None
    """The tokenizer; None: TOKENIZER=null."""
    cuda_devices: int
    """CUDA devices of this node; 0: the run is on CPU."""
    instructions: Instructions | None = None
    """What a finetuning run learns; None: it pretrains."""
    from_checkpoint: tuple[str, ...] = ()
    """Variables that PRETRAIN_CHECKPOINT_PATH decided."""
    steps_done: int = 0
    """Steps of a run that goes on, of which it is known how many tokens they had."""
    tokens_done: int = 0
    """Tokens of these."""

    @property
    def hugging_face(self) -> Path | None:
        """PRETRAIN_CHECKPOINT_PATH, if it is a Hugging Face folder."""
        return hugging_face_folder(self.settings.pretrain_checkpoint_path)

    @property
    def on_cpu(self) -> bool:
        """Whether the run has no CUDA device."""
        return self.cuda_devices == 0

    @property
    def processes_per_node(self) -> int:
        """Processes torchrun starts on each node."""
        return self.settings.gpus_per_node or max(self.cuda_devices, 1)

    @property
    def world(self) -> int:
        """All processes."""
        return self.settings.nnodes * self.processes_per_node

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model's sequence and layers: TP x PP x CP."""
        return self.settings.tp * self.settings.pp * self.settings.cp

    @property
    def dp(self) -> int:
        """Data parallel size."""
        return self.world // self.model_parallel

    @property
    def etp(self) -> int:
        """Tensor parallel size inside an expert."""
        if self.settings.etp is not None:
            return self.settings.etp
        # gloo cannot gather tensors of different sizes, which Megatron's dispatcher needs for ETP > 1 with EP > 1.
        return 1 if self.on_cpu and self.settings.ep > 1 else self.settings.tp

    @property
    def sequence_parallel(self) -> bool:
        """SP, or experts under TP, which Megatron trains with sequence parallel only."""
        return self.settings.tp > 1 and (self.settings.sp or self.size.is_moe)

    @property
    def micro_batches(self) -> int:
        """Micro batches of one step on one rank."""
        return self.global_batch_size // (self.settings.batch_size * self.dp)

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step; always set, `plan_run` decides what the person does not."""
        assert self.settings.global_batch_size is not None
        return self.settings.global_batch_size

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        if self.tokenizer is not None:
            return self.tokenizer.vocab_size
        return self.settings.vocab_size or self.size.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocabulary and EXTRA_VOCAB_SIZE, rounded up alike for every TP."""
        extra = self.settings.extra_vocab_size
        extra = self.size.extra_vocab_size if extra is None else extra
        base = self.tokenizer.base_vocab_size if self.tokenizer is not None else self.vocab_size
        return padded_vocab_size(max(base + extra, self.vocab_size), self.settings.tp)

    @property
    def prefixes(self) -> list[str]:
        """Data prefixes, without blend weights; none for mock data."""
        if self.settings.dataset_path == MOCK_DATA or self.instructions is not None:
            return []
        return _split_blend(self.settings.dataset_path)[1]

    @property
    def blend_weights(self) -> list[float]:
        """Weights of the data prefixes; none where DATASET_PATH gives none."""
        return _split_blend(self.settings.dataset_path)[0] if self.prefixes else []

    @property
    def run_dir(self) -> Path:
        """Folder of the run, absolute."""
        return (Path(self.settings.output_basepath) / self.run_name).absolute()

    @property
    def run_name(self) -> str:
        """RUN_NAME, or a name that says what the model is; not how long it trains, so that a longer run resumes."""
        if self.settings.run_name:
            return self.settings.run_name
        mixers = "+".join(kind for kind in dict.fromkeys(self.kinds) if kind != "softmax") or "softmax"
        changed = self.family.sizes[self.size_name].is_moe != self.size.is_moe
        size = self.size_name + (("-moe" if self.size.is_moe else "-dense") if changed else "")
        name = f"{self.family.name}-{size}-{mixers}-{pattern_of(self.kinds)}"
        return name if self.instructions is None else f"finetune-{name}"

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        steps_left = max(self.settings.iterations - self.steps_done, 0)
        return self.tokens_done + steps_left * self.settings.tokens_per_step

    def tokens_text(self) -> str:
        """Tokens of the whole run, for people: `15.0B`."""
        tokens = float(self.tokens)
        for unit in ("", "k", "M", "B"):
            if tokens < 1000:
                return f"{tokens:.1f}{unit}" if unit else f"{tokens:.0f}"
            tokens /= 1000
        return f"{tokens:.1f}T"


def hugging_face_folder(path: str | None) -> Path | None:
    """The folder that PRETRAIN_CHECKPOINT_PATH names, if it is one of Hugging Face."""
    if path is None or path == "none" or not is_hf_folder(Path(path)):
        return None
    return Path(path).absolute()


def plan_run(
    settings: RunSettings,
    cuda_devices: int,
    families: Mapping[str, Family] = FAMILIES,
    from_checkpoint: tuple[str, ...] = (),
) -> RunPlan:
    """Resolve family, size, mixers and tokenizer.

    Raises ValueError for a name that does not exist, and for a pattern that does not fit the layers.
    """
    if settings.base_model not in families:
        raise PreflightError(
            f"unknown family {settings.base_model!r}.",
            f"families are {', '.join(families)}.",
            f"--family {next(iter(families))}",
        )
    family = families[settings.base_model]
    size_name, size = _named_size(settings, family)
    size, extra_args = changed_size(size, settings.extra_args)
    if "LAYER_TYPE_LIST" in from_checkpoint and len(settings.layer_type_list or "") != size.num_layers:
        raise _other_layers(settings, size.num_layers, by_size="MODEL_SIZE" not in from_checkpoint)
    kinds = layer_kinds(
        settings.layer_type_list,
        settings.la_module,
        size.num_layers,
        settings.hybrid_override_pattern,
        known=registered_mixers(settings.mixer_modules),
    )
    plan = RunPlan(
        settings=settings,
        family=family,
        size_name=size_name,
        size=size,
        kinds=kinds,
        extra_args=extra_args,
        tokenizer=_tokenizer(settings),
        cuda_devices=cuda_devices,
        from_checkpoint=from_checkpoint,
    )
    return replace(plan, settings=_with_global_batch(plan))


def _named_size(settings: RunSettings, family: Family) -> tuple[str, ModelSize]:
    size_name = settings.model_size or family.default_size
    size_name = family.old_sizes.get(size_name, size_name)
    if size_name not in family.sizes:
        raise PreflightError(
            f"unknown MODEL_SIZE={size_name} of {family.name}.",
            f"the sizes are {', '.join(family.sizes)}.",
            f"MODEL_SIZE={_nearest(size_name, family)}",
        )
    size = family.sizes[size_name]
    if settings.moe and not (size.is_moe or size.has_feed_forward):
        raise PreflightError(
            f"MOE=true, but {family.name} {size_name} has no feed-forward blocks.",
            "experts are as wide as the blocks that they stand for.",
            f"EXTRA_ARGS='--num-experts 8 --moe-ffn-hidden-size {2 * size.hidden_size}', or MOE= (empty)",
        )
    return size_name, size.with_moe(settings.moe)


def _other_layers(settings: RunSettings, layers: int, *, by_size: bool) -> PreflightError:
    """The pattern is the checkpoint's: what the person has set is the size, or EXTRA_ARGS."""
    wrong = f"MODEL_SIZE={settings.model_size}" if by_size else f"EXTRA_ARGS={settings.extra_args}"
    start, there = settings.pretrain_checkpoint_path, len(settings.layer_type_list or "")
    return PreflightError(
        f"{wrong} makes {layers} layers, and PRETRAIN_CHECKPOINT_PATH={start} has {there}.",
        "the run starts from those layers and their weights.",
        "MODEL_SIZE= (empty): it is the checkpoint's then"
        if by_size
        else f"EXTRA_ARGS with --num-layers {there}",
    )


def _with_global_batch(plan: RunPlan) -> RunSettings:
    if plan.settings.global_batch_size is not None:
        return plan.settings
    each = plan.settings.batch_size * max(plan.dp, 1)
    # The interleaved schedule takes micro batches in groups of PP.
    each *= plan.settings.pp if plan.settings.vpp > 1 else 1
    return replace(plan.settings, global_batch_size=-(-SMALLEST_GLOBAL_BATCH // each) * each)


def mixer_prefixes(modules: str | None = None) -> dict[str, str]:
    """How the flags of each registered mixer begin, and its name."""
    return {f"--{name.replace('_', '-')}-": name for name in registered_mixers(modules)}


def registered_mixers(modules: str | None = None) -> tuple[str, ...]:
    """`linear_moe.lsm.names()`, read from the sources: importing the mixers would import torch.

    `modules` are MIXER_MODULES. Raises PreflightError when one is not there.
    """
    paths = [*(Path(__file__).parent.parent / "lsm").glob("*.py")]
    paths += [_module_source(name.strip()) for name in (modules or "").split(",") if name.strip()]
    decorator = re.compile(r'^@(?:\w+\.)*register\("(\w+)"\)', re.MULTILINE)
    # linear_moe.lsm.mom makes a mixture of memories of every mixer but those that say one of these.
    without_mixture = re.compile(r"^ +(?:token_shift = True|first_value = )|\bgrouped=True", re.MULTILINE)
    found = set()
    for source in (path.read_text() for path in paths):
        names = decorator.findall(source)
        found.update(names if without_mixture.search(source) else [*names, *(f"mom_{n}" for n in names)])
    return tuple(sorted(found))


def _module_source(module: str) -> Path:
    # The file alone, where Python would find it: importing it, or its package, would import torch.
    if "/" in module or module.endswith(".py"):
        path = Path(module).absolute()
        raise PreflightError(
            f"MIXER_MODULES={module} is the path of a file.",
            "Python imports modules by name, from the folders of PYTHONPATH.",
            f"PYTHONPATH={shlex.quote(str(path.parent))} MIXER_MODULES={shlex.quote(path.stem)}",
        )
    *packages, name = module.split(".")
    for folder in sys.path:
        place = Path(folder, *packages)
        for path in (place / f"{name}.py", place / name / "__init__.py"):
            if path.is_file():
                return path
    raise PreflightError(
        f"MIXER_MODULES={module} is not there.",
        f"there is no {'/'.join([*packages, name])}.py in the folders that Python imports from.",
        f"PYTHONPATH=<the folder that holds {(packages or [f'{name}.py'])[0]}>",
    )


def _nearest(size_name: str, family: Family) -> str:
    import difflib

    same = [name for name in family.sizes if name.lower() == size_name.lower()]
    near = same or difflib.get_close_matches(size_name, family.sizes, n=1, cutoff=0.3)
    return near[0] if near else family.default_size


def _tokenizer(settings: RunSettings) -> TokenizerInfo | None:
    path = settings.tokenizer
    if path is None and settings.dataset_path == MOCK_DATA:
        path = NULL_TOKENIZER
    if path == NULL_TOKENIZER:
        return None
    if path is None:
        raise PreflightError(
            f"TOKENIZER is not set, and DATASET_PATH={settings.dataset_path} holds tokens of some tokenizer.",
            "the vocabulary of the model and the end of a document come from the tokenizer.",
            f"TOKENIZER={_recorded_tokenizer(settings)}",
        )
    try:
        return describe_tokenizer(path)
    except TokenizerError as error:
        raise PreflightError(
            f"TOKENIZER={path} cannot be used: {error}.",
            "a tokenizer is a local folder with tokenizer.json and tokenizer_config.json, and names an eos_token.",
            "TOKENIZER=<such a folder>, python tools/train_tokenizer.py to make one, or TOKENIZER=null for no text",
        ) from None


def _recorded_tokenizer(settings: RunSettings) -> str:
    from linear_moe.data.indexed import CorruptDataError, read_manifest

    try:
        manifest = read_manifest(_split_blend(settings.dataset_path)[1][0])
    except (CorruptDataError, IndexError):
        manifest = None
    if manifest is None:
        return "<folder with tokenizer.json>, or TOKENIZER=null"
    return shlex.quote(manifest.tokenizer)


def _split_blend(dataset_path: str) -> tuple[list[float], list[str]]:
    # Not Path.exists, which raises for a long blend: as a file's name it would be too long.
    if os.path.exists(f"{dataset_path}.idx"):
        return [], [dataset_path]  # one prefix, which may have spaces
    words = dataset_path.split()
    weights = []
    for word in words[0::2]:
        try:
            weights.append(float(word))
        except ValueError:
            return [], words
    if len(words) % 2:
        return [], words
    return weights, words[1::2]
