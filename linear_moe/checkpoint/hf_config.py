"""From config.json of Hugging Face to our families. Imports neither torch nor Megatron.

A family's published field is one of ours under another name (``FIELDS``); the rest are switches that must have the
value our layers have, and anything else is refused by name. ``native.py`` is the other way.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linear_moe.checkpoint import mamba2, qwen3_next
from linear_moe.checkpoint.rope import rope_of
from linear_moe.model.families import FAMILIES, FRACTIONS, Family, ModelSize, size_of
from linear_moe.model.pattern import SOFTMAX

OURS = "linear_moe"
"""``model_type`` of folders with our code."""

RUN_FILE = "linear_moe_run.json"
"""File of such a folder: the architecture and arguments of the run, from which it is imported."""

SOURCE_FILE = "hugging_face/source.json"
"""File of an imported run: the folder that it was made of, and that folder's :func:`weight_files`."""

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
"""Architecture by ``model_type``."""

FAMILY_OF = {
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3_next": "qwen3_next",
    "llama": "llama3",
    "mixtral": "mixtral",
    "deepseek_v2": "deepseek_v2",
    "mamba2": "mamba2",
}
"""Our family by ``model_type``."""

_COMMON = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_embeddings",
}
_DENSE = _COMMON | {"intermediate_size": "ffn_hidden_size"}
_QWEN_MOE = _DENSE | {
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
}
FIELDS = {
    "qwen2": _DENSE,
    "qwen2_moe": _QWEN_MOE,
    "qwen3_next": _QWEN_MOE | {"head_dim": "kv_channels"},
    "llama": _DENSE | {"head_dim": "kv_channels"},
    "mixtral": _DENSE | {"num_local_experts": "num_experts", "num_experts_per_tok": "moe_router_topk"},
    "deepseek_v2": _DENSE
    | {
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",
        "v_head_dim": "v_head_dim",
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "first_k_dense_replace": "first_dense_layers",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
    },
    "mamba2": {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "layer_norm_epsilon": "norm_epsilon",
        "vocab_size": "vocab_size",
        "tie_word_embeddings": "tie_embeddings",
    },
}
"""Field of config.json -> field of :class:`ModelSize`, by ``model_type``."""

SWITCHES: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2": {"use_sliding_window": (False,)},
    "qwen2_moe": {"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
    | {"qkv_bias": (True,)},
    "qwen3_next": {"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    "llama": {"attention_bias": (False,), "mlp_bias": (False,)},
    "mixtral": {},
    "deepseek_v2": {"attention_bias": (False,), "mlp_bias": (False,), "moe_layer_freq": (1,)}
    | {"norm_topk_prob": (False,), "scoring_func": ("softmax",)}
    | {"topk_method": ("greedy", "group_limited_greedy")},
    "mamba2": {"use_bias": (False,), "rms_norm": (True,)},
}
"""Fields that may have these values only; the first is what export writes. An absent one is the first."""

LATENT_NORM_EPSILON = 1e-6
"""Of the norms of compressed queries, keys and values in DeepSeek-V2's class, which reads it from no config."""

ALSO_SWITCHES: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
"""The same of all types."""


@dataclass(frozen=True)
class Described:
    """A Hugging Face model in our words."""

    model_type: str
    """Of config.json."""
    family: Family
    """With this model's switches."""
    size: ModelSize
    """Its sizes; ``vocab_size`` counts all rows of its embedding."""
    dtype: str
    """bfloat16, float16 or float32: of the weights, as the config says."""
    kinds: tuple[str, ...]
    """Mixer of every layer: softmax, but for Qwen3-Next, Mamba2 and models that we exported."""
    arguments: tuple[str, ...] | None = None
    """Of a model that we exported: the command line of its training, as far as it shapes the model."""
    mixer_arguments: tuple[str, ...] = ()
    """Options of its mixers, as flags."""
    warnings: tuple[str, ...] = ()
    """What the person should know of its config."""

    @property
    def size_name(self) -> str:
        """The named size of the family that has these shapes, or ``custom``."""
        free: dict[str, Any] = {
            "source": "",
            "vocab_size": 0,
            "extra_vocab_size": 0,
            "max_position_embeddings": 0,
        }
        same = replace(self.size, **free)
        found = [name for name, size in self.family.sizes.items() if replace(size, **free) == same]
        return found[0] if found else "custom"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. ``ValueError`` when it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a Hugging Face model: it has no config.json\n"
            f"  why: the architecture is read from that file\n"
            f"  try: the folder that save_pretrained() or the hub made"
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}\n  why: it was cut short or edited\n  try: a fresh copy of it"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds a {type(config).__name__}\n"
            f"  why: a config is one JSON object\n"
            f"  try: the file that save_pretrained() or the hub made"
        )
    return config


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model, and not a run of ours."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def weight_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of weights in a model folder: where they differ, it is another model."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def describe_folder(folder: Path) -> Described:
    """A model folder as a family and a size; ``ValueError`` when it cannot be imported."""
    config = read_config(folder)
    if "architecture" in config and "model_type" not in config:
        raise ValueError(
            f"{folder} is a run of linear_moe\n"
            f"  why: import makes a run of a folder of Hugging Face's\n"
            f"  try: the run as it is; or python tools/convert.py export --load {shlex.quote(str(folder))} "
            f"--hf <folder>, and that folder"
        )
    return _exported_by_us(folder, config) if config.get("model_type") == OURS else describe(config)


def _exported_by_us(folder: Path, config: Mapping[str, Any]) -> Described:
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        architecture, arguments = run["architecture"], run["arguments"]
        family, kinds = FAMILIES[architecture["family"]], tuple(architecture["layer_kinds"])
        size = size_of(arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no {RUN_FILE} that can be read: {type(error).__name__}: {error}\n"
            f"  why: export writes the arguments of the model there, and import builds it from them\n"
            f"  try: copy that file from the exported folder, if save_pretrained() wrote this one"
        ) from None
    if size is None or type(config.get("vocab_size")) is not int:
        lacks = "config.json lacks vocab_size" if size is not None else f"{RUN_FILE} lacks sizes of the model"
        raise ValueError(
            f"{folder / lacks}\n"
            f"  why: import builds the model from the arguments there, and its embedding from that number\n"
            f"  try: export the run again"
        )
    size = replace(size, vocab_size=config["vocab_size"])
    return Described(OURS, family, size, _dtype(config), kinds, tuple(arguments))


def describe(config: Mapping[str, Any]) -> Described:
    """A config of one of transformers' classes as a family and a size.

    Raises:
        ValueError: an architecture that we do not have, a switch that our layers do not know, or a value that is none.
    """
    try:
        return _describe(config)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config.json cannot be understood: {type(error).__name__}: {error}\n"
            f"  why: a field of it is missing, or holds a value of another kind\n"
            f"  try: the config.json that belongs to the weights"
        ) from error


def _describe(config: Mapping[str, Any]) -> Described:
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(
            f"config.json describes a model of type {kind!r} ({', '.join(config.get('architectures') or ['?'])})\n"
            f"  why: the types that can be imported are {', '.join([*CLASSES, OURS])}\n"
            f"  try: a model of one of them"
        )
    _refuse_other_switches(kind, config)
    size = _size(kind, config)
    family = FAMILIES[FAMILY_OF[kind]]
    if kind in ("qwen2_moe", "qwen3_next"):
        # softmax over all and then over the chosen ones is softmax over the chosen ones
        renormalised = config.get("norm_topk_prob", kind == "qwen3_next")
        family = replace(family, softmax_before_topk=not renormalised)
    if kind == "qwen3_next":
        kinds, options = qwen3_next.layers_of(config)
        return Described(kind, family, size, _dtype(config), kinds, mixer_arguments=options)
    if kind == "mamba2":
        kinds, options = mamba2.layers_of(config)
        warnings = mamba2.warnings_of(config)
        return Described(kind, family, size, _dtype(config), kinds, None, options, warnings)
    return Described(kind, family, size, _dtype(config), (SOFTMAX,) * size.num_layers)


def _refuse_other_switches(kind: str, config: Mapping[str, Any]) -> None:
    for name, values in (SWITCHES[kind] | ALSO_SWITCHES).items():
        value = config.get(name, values[0])
        if value is not None and value not in values:
            raise ValueError(
                f"config.json has {name} = {value!r}\n"
                f"  why: our layers compute {' or '.join(map(repr, values))} only\n"
                f"  try: a model without it"
            )
    window = config.get("sliding_window")
    is_used = kind in ("mixtral",) or config.get("use_sliding_window", False)
    if is_used and window is not None and window < config["max_position_embeddings"]:
        raise ValueError(
            f"config.json has a sliding window of {window} tokens\n"
            f"  why: softmax layers here see all earlier tokens\n"
            f"  try: set sliding_window to null if sequences stay below {window}"
        )


def _size(kind: str, config: Mapping[str, Any]) -> ModelSize:
    absent = [n for n in FIELDS[kind] if n not in config and n not in _OPTIONAL]
    if absent:
        raise ValueError(
            f"config.json lacks {', '.join(absent)}\n"
            f"  why: a model of type {kind} is described by them\n"
            f"  try: the config.json that belongs to the weights"
        )
    _check_values(kind, config)
    values: dict[str, Any] = {ours: config.get(theirs) for theirs, ours in FIELDS[kind].items()}
    values = {name: value for name, value in values.items() if value is not None}
    if kind == "mamba2":
        values |= mamba2.size_of(config)
    heads = values["num_attention_heads"]
    values.setdefault("num_query_groups", heads)
    values.setdefault("kv_channels", config.get("head_dim") or values["hidden_size"] // heads)
    if kind == "mixtral":
        values["moe_ffn_hidden_size"] = values["ffn_hidden_size"]
    if kind == "deepseek_v2":
        values |= _deepseek_values(config, values)
    if kind == "qwen3_next":
        values["attention_output_gate"] = True
    base, scaling = rope_of(kind, FAMILIES[FAMILY_OF[kind]].rotary_percent, config)
    rope: dict[str, Any] = {"rotary_base": base, "rope_scaling": scaling}
    return ModelSize(**values, **rope, extra_vocab_size=0, source="config.json of Hugging Face")


def _check_values(kind: str, config: Mapping[str, Any]) -> None:
    """One error for every field that holds no number where one is, or a number that fits no model."""
    names, wrong = {ours: theirs for theirs, ours in FIELDS[kind].items()}, []
    for ours, theirs in names.items():
        value = config.get(theirs)
        if ours == "tie_embeddings":
            fits = isinstance(value, bool)
        elif ours in FRACTIONS:
            fits = isinstance(value, int | float) and value > 0
        else:
            fits = type(value) is int and value >= (0 if ours == "first_dense_layers" else 1)
        if not fits and not (value is None and theirs in _OPTIONAL):
            wrong.append(f"{theirs} = {value!r}")
    for part, whole in (("num_query_groups", "num_attention_heads"), ("moe_router_topk", "num_experts")):
        few, many = (config.get(names.get(name, "")) for name in (part, whole))
        if not wrong and few and many and (many % few if part == "num_query_groups" else few > many):
            wrong.append(f"{names[part]} = {few} of {names[whole]} = {many}")
    if wrong:
        raise ValueError(
            f"config.json has {', '.join(wrong)}\n"
            f"  why: sizes are whole numbers, keys serve the same number of queries, and a token visits experts that "
            f"there are\n"
            f"  try: the config.json that belongs to the weights"
        )


_OPTIONAL = ("tie_word_embeddings", "head_dim", "num_key_value_heads", "q_lora_rank", "routed_scaling_factor")


def _deepseek_values(config: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    if values["norm_epsilon"] != LATENT_NORM_EPSILON:
        raise ValueError(
            f"config.json has rms_norm_eps = {values['norm_epsilon']}\n"
            f"  why: whatever that says, the class of deepseek_v2 adds {LATENT_NORM_EPSILON} in norms of compressed "
            f"queries, keys and values, and our layers add one number in all of their norms\n"
            f"  try: a model with rms_norm_eps = {LATENT_NORM_EPSILON}"
        )
    found: dict[str, Any] = {"kv_channels": values["hidden_size"] // values["num_attention_heads"]}
    found["num_query_groups"] = values["num_attention_heads"]
    if config.get("topk_method") == "group_limited_greedy":
        found["moe_router_num_groups"] = config["n_group"]
        found["moe_router_group_topk"] = config["topk_group"]
    if values.get("moe_router_topk_scaling_factor") == 1:
        values.pop("moe_router_topk_scaling_factor")
    if config.get("n_shared_experts"):
        width = config["n_shared_experts"] * config["moe_intermediate_size"]
        found["moe_shared_expert_intermediate_size"] = width
    return found


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f"config.json names dtype {name}\n"
            f"  why: weights are float32, float16 or bfloat16 here\n"
            f"  try: the original, unquantised model"
        )
    return name
