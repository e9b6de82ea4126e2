"""Command line to model config: options of mixers, layer kinds, refusals, and what checkpoints need of the config."""

import argparse
import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from linear_moe import lsm
from linear_moe.lsm.flags import options_of
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.mixer_options import SHARED_FLAGS
from linear_moe.training import arguments
from tests.training.tiny import ARGUMENTS, EXPERTS
from tests.workers import with_model_parallel

THREE_PARTS = r"(?s)^[^\n]+\n  why: [^\n]+\n  try: [^\n]+$"

FLAGS = {
    "--layer-kinds",
    "--la-module",
    "--mixer-module",
    "--layer-type-list",
    "--family",
    "--model-size",
    "--run-dir",
    "--lsm-recompute",
    "--no-lsm-recompute",
    "--recompute-expert-inputs",
    "--expert-gradients-in-place",
    "--no-expert-gradients-in-place",
    "--output-chunk-size",
    "--sequential-experts",
    "--instruction-data",
    "--valid-instruction-data",
    "--no-instruction-packing",
    "--expand-k",
    "--expand-v",
    "--la-feature-map",
    "--la-output-norm",
    "--la-gate-fn",
    "--la-norm-eps",
    "--la-conv-size",
    "--la-norm-q",
    "--la-norm-k",
    "--la-tie-feature-map-qk",
    "--la-do-feature-map-norm",
    "--mom-num-memories",
    "--mom-topk",
    "--mom-capacity",
    "--mom-shared-memory",
    "--mom-single-projection",
    "--mom-aux-loss-coeff",
}
"""Ours, but for the options of single mixers. A flag that goes, goes with a note to the people who type it."""

WORDS = {
    "output_norm": "identity",
    "output_gate": "sigmoid",
    "feature_map": "relu",
    "slopes": "alibi",
    "qk_norm": "sum",
    "rotary": "xpos",
}
NUMBERS = {"expand_k": 0.25, "expand_v": 2.0, "conv_size": 3, "norm_eps": 1e-3, "gate_clamp_min": -0.25}
NUMBERS |= {"feature_dim": 8, "gate_rank": 5, "lower_bound": -2.0, "dt_limit_max": 0.5, "capacity": 1.5}
"""Values unlike the defaults; other numbers are doubled, flags flipped."""


def ours() -> argparse.ArgumentParser:
    return arguments.add_arguments(argparse.ArgumentParser(allow_abbrev=False))


def parse(*argv: str, num_layers: int = 2, **megatron: Any) -> argparse.Namespace:
    """Our flags, resolved, and what ``resolve`` reads of Megatron's."""
    args = ours().parse_args(argv)
    args.num_layers = num_layers
    names = (
        "recompute_granularity",
        "reset_attention_mask",
        "dataloader_inter_document_masking",
        "hybrid_context_parallel",
        "fp32_residual_connection",
        "use_mup",
        "cross_entropy_loss_fusion",
        "logits_save_dir",
        "logits_load_dir",
        "hidden_dropout",
        "add_bias_linear",
    )
    for name in (*names, "bf16", "fp16"):
        setattr(args, name, megatron.get(name))
    args.bias_dropout_fusion = True
    arguments.resolve(args)
    return args


def config_of(args: argparse.Namespace, **changes: Any) -> LinearMoEConfig:
    shape = dict(num_layers=args.num_layers, hidden_size=256, num_attention_heads=4, kv_channels=32)
    return LinearMoEConfig(**shape, layer_kinds=args.layer_kinds, mixer_options=args.mixer_options, **changes)


def own_options() -> list[tuple[str, str]]:
    return [(name, field) for name in lsm.names() for field, _, _ in options_of(lsm.get(name).Config)]


def other_value(default: Any, field: str) -> Any:
    if field in WORDS | NUMBERS:
        return (WORDS | NUMBERS)[field]
    if isinstance(default, bool):
        return not default
    return default * 2


def test_list_of_flags():
    found = {flag for action in ours()._actions for flag in action.option_strings} - {"-h", "--help"}
    assert found - FLAGS == {f"--{name}-{field}".replace("_", "-") for name, field in own_options()}
    assert found >= FLAGS


def test_help_can_be_read():
    """With Megatron's, one of whose texts has a bare per cent sign."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    text = " ".join(arguments.add_arguments(parser).format_help().split())
    assert "--gla-gate-rank X Waist of the low-rank gate projection. [16]" in text
    assert "--moe-paged-stash-buffer-size-factor-cuda" in text


def test_every_field_but_the_shape_has_a_flag():
    for name in lsm.names():
        fields = {field.name for field in dataclasses.fields(lsm.get(name).Config)}
        assert fields - {field for mixer, field in own_options() if mixer == name} == {
            "hidden_size",
            "num_heads",
            "head_dim",
            "qkv_bias",
            "layers_of_kind",
        }


@pytest.mark.parametrize("name, field", own_options())
def test_options_of_a_mixer_reach_its_config(name, field):
    stock = mixer_config(name, config_of(parse("--layer-kinds", f"{name},softmax")))
    value = other_value(getattr(stock, field), field)
    flag = f"--{name}-{field}".replace("_", "-")
    args = parse("--layer-kinds", f"{name},softmax", f"{flag}={value}")
    assert args.mixer_options == {name: {field: value}}
    found = mixer_config(name, config_of(args))
    # some mixers make them of their options
    counted = {"num_heads": found.num_heads, "head_dim": found.head_dim}
    assert found == dataclasses.replace(stock, **counted | {field: value})


@pytest.mark.parametrize("flag, field", SHARED_FLAGS.items())
def test_flags_for_every_mixer(flag, field):
    """They set each mixer that has the field; a mixer's own flag wins."""
    have = [name for name in lsm.names() if (name, field) in own_options()]
    stock = getattr(mixer_config(have[0], config_of(parse("--la-module", have[0]))), field)
    value = other_value(stock, field)
    args = parse("--la-module", have[0], f"{flag}={value}")
    assert args.mixer_options == {name: {field: value} for name in have}
    mine = f"--{have[0]}-{field}".replace("_", "-")
    args = parse("--la-module", have[0], f"{flag}={value}", *([] if stock is None else [f"{mine}={stock}"]))
    own = value if stock is None else stock
    assert args.mixer_options == {name: {field: value} for name in have} | {have[0]: {field: own}}
    without = next((name for name in lsm.names() if name not in have), None)
    if without is not None:
        with pytest.raises(ValueError, match="no layer of this model has"):
            parse("--la-module", without, f"{flag}={value}")


def test_a_flag_alone_is_true():
    assert parse("--la-module", "linear_attention", "--la-norm-q").mixer_options["linear_attention"] == {
        "norm_q": True
    }


def test_heads_that_tensor_parallelism_cannot_divide():
    with pytest.raises(ValueError, match=r"2 heads of hgrn2.*\n  why: .*\n  try: "):
        config_of(parse("--la-module", "hgrn2"), tensor_model_parallel_size=4)


def test_experts_need_a_width():
    """Their own, where there are no feed-forward blocks."""
    args = parse("--la-module", "gla")
    with pytest.raises(
        ValueError, match=r"the 4 experts have no width\n  why: .*\n  try: --moe-ffn-hidden-size 512"
    ):
        config_of(args, ffn_hidden_size=0, num_moe_experts=4)
    assert (
        config_of(args, ffn_hidden_size=0, num_moe_experts=4, moe_ffn_hidden_size=8).moe_ffn_hidden_size == 8
    )


@pytest.mark.parametrize(("precision", "kept"), [({}, False), ({"bf16": True}, True), ({"fp16": True}, True)])
def test_a_float32_residual_stream_is_nothing_new_in_float32(precision, kept):
    args = parse("--la-module", "gla", fp32_residual_connection=True, **precision)
    assert bool(args.fp32_residual_connection) is kept


def test_shape_follows_the_model():
    config = config_of(parse("--la-module", "gla"), add_qkv_bias=True, layernorm_epsilon=1e-6)
    found = mixer_config("gla", config)
    assert (found.hidden_size, found.num_heads, found.head_dim) == (256, 4, 32)
    assert (found.qkv_bias, found.norm_eps) == (True, 1e-6)


def test_patterns_become_kinds():
    args = parse("--la-module", "gla,gated_deltanet", "--layer-type-list", "12N", num_layers=6)
    assert args.layer_kinds == ["gla", "gated_deltanet", "softmax"] * 2
    assert parse("--la-module", "gla").layer_kinds == ["gla", "gla"]
    assert parse("--layer-kinds", "softmax,gla").layer_kinds == ["softmax", "gla"]


@pytest.mark.parametrize(
    "argv, num_layers, what",
    [
        (["--layer-kinds", "gla,gated_deltanets"], 2, "gated_deltanet"),
        (["--layer-kinds", "gla"], 2, "1 layers, the model has 2"),
        (["--layer-kinds", "gla,gla,gla"], 2, "3 layers, the model has 2"),
        (["--la-module", "glaa"], 2, "gla"),
        (["--la-module", "gla", "--layer-type-list", "LLL"], 2, "LLL"),
        (["--la-module", "gla", "--layer-type-list", "LX"], 2, "'X'"),
        (["--la-module", "gla", "--expand-k", "wide"], 2, "--expand-k"),
        (["--la-module", "gla", "--la-conv-size", "2.5"], 2, "--la-conv-size"),
    ],
)
def test_bad_arguments(argv, num_layers, what):
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        parse(*argv, num_layers=num_layers)
    assert what in str(refused.value)


@pytest.mark.parametrize("flag", ["reset_attention_mask", "hybrid_context_parallel"])
def test_flags_of_megatron_that_cannot_work(flag):
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        parse("--la-module", "gla", **{flag: True})
    assert f"--{flag}".replace("_", "-") in str(refused.value)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"gla": {"expand_q": 1.0}}, "expand_q"),
        ({"gla": {"expand_k": 0.3}}, "--gla-expand-k"),
        ({"gla": {"gate_rank": "16"}}, "--gla-gate-rank"),
    ],
)
def test_bad_options_of_mixers(options, what):
    args = parse("--la-module", "gla")
    args.mixer_options = options
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        config_of(args)
    assert what in str(refused.value)


@pytest.mark.parametrize(
    "argv, granularity, on",
    [
        ([], None, False),
        ([], "selective", True),
        ([], "full", False),
        (["--no-lsm-recompute"], "selective", False),
        (["--lsm-recompute"], None, True),
    ],
)
def test_recompute_goes_with_selective(argv, granularity, on):
    assert parse("--la-module", "gla", *argv, recompute_granularity=granularity).lsm_recompute is on


def test_resolved_arguments_are_plain():
    """Megatron pickles them into checkpoints and reads them back without code."""
    args = parse("--la-module", "gla", "--gla-gate-rank", "4", "--la-gate-fn", "sigmoid")
    plain = {name: value for name, value in vars(args).items() if name in ("layer_kinds", "mixer_options")}
    assert json.loads(json.dumps(plain)) == plain
    assert not [name for name in vars(args) if ":" in name]


def test_config_can_be_copied():
    """Megatron copies it for every expert."""
    args = parse("--la-module", "gla", "--gla-gate-rank", "4")
    config = config_of(args)
    copied = copy.deepcopy(config)
    assert copied.layer_kinds == ["gla", "gla"] and copied.mixer_options == {"gla": {"gate_rank": 4}}
    copied.mixer_options["gla"]["gate_rank"] = 8
    assert mixer_config("gla", config).gate_rank == 4


def test_a_mixer_that_takes_no_packed_documents(monkeypatch):
    monkeypatch.setattr(lsm.get("gla"), "unsupported", {"packed": "it looks at the future"})
    parse("--la-module", "gla")
    parse("--layer-kinds", "deltanet,softmax", dataloader_inter_document_masking=True)
    with pytest.raises(ValueError, match=r"^mixer gla .*\(packed\)\n  why: it looks at the future\n"):
        parse("--layer-kinds", "gla,softmax", dataloader_inter_document_masking=True)


def test_layers_of_any_kinds_have_their_own_checkpoint_keys():
    assert config_of(parse("--layer-kinds", "gla,softmax")).hetereogenous_dist_checkpoint


def built(rank: int, world: int, argv: list[str]) -> SimpleNamespace:
    """Through Megatron's own parser and config: the config, and the checkpoint keys of each pipeline stage."""
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training.pretrain import prepare_arguments

    args = prepare_arguments(argv)
    with with_model_parallel(pp=world):
        config = arguments.model_config(args)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = LinearMoEBuilder(config).build_model(groups)
        keys = [tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "key")]
        transformer = config.transformer
        return SimpleNamespace(
            stage=mpu.get_pipeline_model_parallel_rank(),
            keys=keys,
            type=type(transformer).__name__,
            kinds=transformer.layer_kinds,
            options=transformer.mixer_options,
            recompute=transformer.lsm_recompute,
            sequential=transformer.sequential_experts,
        )


def is_per_token(rank: int, world: int, argv: list[str]) -> bool:
    from linear_moe.training.pretrain import prepare_arguments

    return bool(prepare_arguments(argv).calculate_per_token_loss)


@pytest.mark.parametrize(
    ("world", "flags", "expected"),
    [
        (1, [], False),
        (2, ["--context-parallel-size", "2"], True),
        (1, ["--dataloader-inter-document-masking"], True),
    ],
)
def test_losses_are_divided_by_all_tokens_where_ranks_have_different_numbers(gloo, world, flags, expected):
    assert gloo(world, is_per_token, [*ARGUMENTS, "--la-module", "gla", *flags]) == [expected] * world


def test_every_layer_has_its_own_checkpoint_keys(gloo):
    """Of mixed layers under pipeline parallelism: named by their place in the model, none stacked."""
    kinds = ["gla", "softmax", "gated_deltanet", "linear_attention"]
    flags = ["--layer-kinds", ",".join(kinds), "--pipeline-model-parallel-size", "2", "--gla-gate-rank", "4"]
    stages = gloo(2, built, [*ARGUMENTS, *EXPERTS, *flags, "--lsm-recompute", "--sequential-experts"])
    for stage in stages:
        assert (stage.type, stage.kinds) == ("LinearMoEConfig", kinds)
        assert stage.options["gla"] == {"gate_rank": 4}
        assert stage.recompute and stage.sequential
        layers = {key.split(".")[2] for key in stage.keys if key.startswith("decoder.layers.")}
        assert layers == ({"0", "1"} if stage.stage == 0 else {"2", "3"})
    keys = [key for stage in stages for key in stage.keys]
    for key in (
        "decoder.layers.0.self_attention.low_rank.a.down",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.2.self_attention.A_log",
        "decoder.layers.3.self_attention.in_proj.weight",
    ):
        assert key in keys


def test_a_residual_addition_that_is_nothing_else_is_not_compiled() -> None:
    kinds = ("--la-module", "gla")
    assert not parse(*kinds).bias_dropout_fusion
    assert not parse(*kinds, fp32_residual_connection=True).bias_dropout_fusion, "all of it is float32"
    for more in (
        {"hidden_dropout": 0.1},
        {"add_bias_linear": True},
        {"fp32_residual_connection": True, "bf16": True},
    ):
        assert parse(*kinds, **more).bias_dropout_fusion


def test_logits_are_made_in_chunks_where_nobody_else_changes_them() -> None:
    kinds = ("--la-module", "gla")
    assert parse(*kinds).output_chunk_size == parse(*kinds, bf16=True).output_chunk_size == 4096
    assert parse(*kinds, fp16=True).output_chunk_size == parse(*kinds, use_mup=True).output_chunk_size == 0
    assert parse(*kinds, "--output-chunk-size", "8", fp16=True).output_chunk_size == 8
    assert parse(*kinds, "--output-chunk-size", "0").output_chunk_size == 0
    with pytest.raises(ValueError, match=THREE_PARTS) as told:
        parse(*kinds, "--output-chunk-size", "8", cross_entropy_loss_fusion=True)
    assert "does not go with --cross-entropy-loss-fusion" in str(told.value)
    with pytest.raises(ValueError, match=THREE_PARTS):
        parse(*kinds, "--output-chunk-size", "-1")
