"""Our command-line arguments next to Megatron's, and the model config that both make.

The architecture is said once: ``--layer-kinds`` names the mixer of every layer. Options of mixers come from the fields
of their ``Config``: ``--<mixer>-<field>`` for one mixer (``--gla-gate-rank 32``), or an old ``--la-*`` flag for every
mixer that has such a field. Mixers of other packages come in by ``--mixer-module``; what they register is known before
the other flags are declared, so such a mixer has all that the package's own have.
"""

from __future__ import annotations

import argparse
import re

from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args

from linear_moe import lsm
from linear_moe.lsm.registry import import_mixers
from linear_moe.model.builder import LinearMoEModelConfig
from linear_moe.model.config import LatentMoEConfig, LinearMoEConfig
from linear_moe.model.mixer_options import add_mixer_options, check_supported, take_mixer_options
from linear_moe.model.pattern import SOFTMAX, layer_kinds
from linear_moe.training import engine, finetune

OUTPUT_CHUNK = 4096
"""Tokens whose logits exist at once: 1.2 GB of a vocabulary of 152k in bf16, and enough for its products."""


def import_mixer_modules(argv: list[str]) -> None:
    """Import what ``--mixer-module`` names in a command line; before :func:`add_arguments`, which lists all mixers."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_mixer_module(parser)
    import_mixers(parser.parse_known_args(argv)[0].mixer_module)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider``: add ours and the defaults of what this machine lacks."""
    group = parser.add_argument_group("linear_moe")
    _add_mixer_module(group)
    group.add_argument(
        "--layer-kinds", default=None, help="mixer of every layer, comma separated; softmax is one"
    )
    group.add_argument("--la-module", default=None, help="mixer of the L layers, or several, comma separated")
    group.add_argument("--layer-type-list", default=None, help="one symbol per layer: L linear, N softmax")
    group.add_argument("--family", default="qwen2", help="model family, for the record")
    group.add_argument("--model-size", default=None, help="named size, for the record")
    group.add_argument("--run-dir", default=None, help="folder of metrics.jsonl and config.json")
    group.add_argument(
        "--lsm-recompute",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="recompute mixers in the backward pass; on with selective recomputation",
    )
    group.add_argument(
        "--recompute-expert-inputs",
        action="store_true",
        help="gather the tokens of experts again in the backward pass; 2 * top k * hidden bytes less a token and layer",
    )
    group.add_argument(
        "--expert-gradients-in-place",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="add weight gradients of experts to the float32 sums in the grouped GEMM, without rounding them to bf16; "
        "the default where a fused kernel does so faster than torch's product and an addition, on Hopper; not with "
        "Transformer Engine or Apex installed, whose optimizers have hooks of their own",
    )
    group.add_argument(
        "--output-chunk-size",
        type=int,
        default=None,
        help="tokens whose logits exist at once, with their gradient in place; 0: a whole micro-batch's, in float32, "
        f"which is the default in fp16; else {OUTPUT_CHUNK}",
    )
    group.add_argument("--sequential-experts", action="store_true", help="Megatron's loop over experts")
    finetune.add_arguments(group)
    add_mixer_options(parser.add_argument_group("mixer options"))
    # Megatron's look at every gradient waits for the device, and its repeated steps for all ranks, in every step; here
    # the gradient norm, which the host reads anyway, tells (linear_moe.training.metrics).
    parser.set_defaults(check_for_nan_in_loss_and_grad=False, rerun_mode="disabled")
    parser.set_defaults(**engine.defaults_without_te())
    for action in parser._actions:  # a help text of Megatron 0.19.2 says "10%", at which --help would stop
        action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def _add_mixer_module(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--mixer-module", default="", help="modules that register more mixers, comma separated"
    )


def resolve(args: argparse.Namespace) -> None:
    """Turn our arguments into what the config takes: plain lists and dicts, kept in checkpoints."""
    if args.layer_kinds is None:
        kinds = layer_kinds(args.layer_type_list, args.la_module, args.num_layers, known=lsm.names())
        args.layer_kinds = list(kinds)
    elif isinstance(args.layer_kinds, str):
        args.layer_kinds = args.layer_kinds.split(",")
    if len(args.layer_kinds) != args.num_layers:
        raise ValueError(
            f"--layer-kinds names {len(args.layer_kinds)} layers, the model has {args.num_layers}\n"
            f"  why: every layer needs its kind\n"
            f"  try: --layer-type-list with one symbol per layer"
        )
    # Megatron refuses the flag where everything is float32, and a family has it in any precision.
    args.fp32_residual_connection = args.fp32_residual_connection and (args.bf16 or args.fp16)
    if not (args.hidden_dropout or args.add_bias_linear or args.fp32_residual_connection):
        # One addition, to the same bits: torch.compile's takes the host 0.25 ms, twice a layer. With a bias, dropout or
        # another dtype it is one kernel in place of several.
        args.bias_dropout_fusion = False
    args.mixer_options = take_mixer_options(args, args.layer_kinds)
    for kind in sorted({*args.layer_kinds} - {SOFTMAX}):
        check_supported(lsm.get(kind), {"packed": args.dataloader_inter_document_masking})
    if args.lsm_recompute is None:
        args.lsm_recompute = args.recompute_granularity == "selective"
    if args.reset_attention_mask:
        raise ValueError(
            "--reset-attention-mask hides documents from softmax attention only\n"
            "  why: the memory of a mixer would still leak from one document to the next\n"
            "  try: --dataloader-inter-document-masking (PACK=true)"
        )
    _resolve_output_chunks(args)
    if args.hybrid_context_parallel:
        raise ValueError(
            "--hybrid-context-parallel is not supported\n"
            "  why: it changes the context-parallel group per micro-batch, and LASP-2 needs a fixed one\n"
            "  try: leave it out, and set --context-parallel-size"
        )


def _resolve_output_chunks(args: argparse.Namespace) -> None:
    """Chunks wherever nobody else has a hand in the output layer.

    Not in float16: gradients of logits are made before the loss scale is known, and most would be too small for it.
    """
    flags = ("--use-mup", "--cross-entropy-loss-fusion", "--logits-save-dir", "--logits-load-dir")
    others = [flag for flag in flags if getattr(args, flag.strip("-").replace("-", "_"))]
    if args.output_chunk_size is None:
        args.output_chunk_size = 0 if args.fp16 or others else OUTPUT_CHUNK
    if args.output_chunk_size < 0:
        raise ValueError(
            f"--output-chunk-size {args.output_chunk_size} holds no token\n"
            f"  why: it is the number of tokens whose logits exist at once\n"
            f"  try: --output-chunk-size {OUTPUT_CHUNK}, or 0 for whole micro-batches"
        )
    for flag in others if args.output_chunk_size else ():
        raise ValueError(
            f"--output-chunk-size does not go with {flag}\n"
            f"  why: it takes the place of Megatron's output layer and loss, which {flag} changes\n"
            f"  try: leave out one of the two"
        )


def model_config(args: argparse.Namespace) -> LinearMoEModelConfig:
    """The config from which Megatron builds the model; ``resolve`` comes first."""
    transformer = _transformer_config(args)
    config = gpt_config_from_args(args, config=transformer, model_config_cls=LinearMoEModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor  # the stock function forgets it
    return config


def _transformer_config(args: argparse.Namespace) -> LinearMoEConfig:
    if not args.multi_latent_attention:
        return core_transformer_config_from_args(args, LinearMoEConfig)
    # Told of latent attention, the stock function takes its own class in place of ours; without it, it refuses YaRN.
    told = argparse.Namespace(**{**vars(args), "multi_latent_attention": False})
    told.rope_type = "rope" if args.rope_type == "rope" else None  # None: the config's default, YaRN
    return core_transformer_config_from_args(told, LatentMoEConfig)
