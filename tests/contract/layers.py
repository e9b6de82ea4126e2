"""``MixerLayer`` inside gloo workers: built for a layout, given the same global weights, run, saved and loaded.

Everything returns plain tensors; the tests put the pieces of the ranks together by what a tensor-parallel shard *is*.
"""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.contract.cases import IN_MODEL, PLACE, mixer_class, registered
from tests.workers import with_model_parallel

LENGTH, BATCH = 24, 2
DOCUMENTS = [[0, 1, 9, 20, 24], [0, 0, 6, 23, 24]]
RICH = {"qkv_bias": True, "conv_size": 3}
"""Every part that a layer may have, on top of the mixer's defaults."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share a layer."""

    world: int
    tp: int = 1
    cp: int = 1
    sp: bool = False
    packed: bool = False


def config_of(name: str, layout: Layout, **changes: Any) -> Any:
    from linear_moe.model.config import LinearMoEConfig

    given: dict[str, Any] = dict(
        num_layers=PLACE.num_layers,
        hidden_size=16,
        num_attention_heads=PLACE.num_heads,
        kv_channels=8,
        layer_kinds=[name] * PLACE.num_layers,
        mixer_options={name: RICH | IN_MODEL.get(name, {})},
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        params_dtype=torch.float64,
        init_method_std=0.3,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return LinearMoEConfig(**(given | changes))


def build(name: str, layout: Layout, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.mixer_layer import MixerLayer

    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    config = config_of(name, layout, **changes)
    return MixerLayer(config, layer_number=PLACE.layer + 1, mixer=name, pg_collection=groups)


def split_dim(parameter: Tensor) -> int | None:
    """The dimension that tensor-parallel ranks share, by Megatron's mark; ``None``: a copy on each."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def fill(layer: Any, layout: Layout, dtype: torch.dtype = torch.float64) -> None:
    """Weights that depend on nothing but their name: a shard of the same global tensor in every layout."""
    rank = layer.tp_group.rank()
    for name, parameter in layer.named_parameters():
        dim, shape = split_dim(parameter), list(parameter.shape)
        if dim is not None:
            shape[dim] *= layout.tp
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        shard = whole if dim is None else whole.chunk(layout.tp, dim)[rank]
        parameter.data = shard.to(dtype).contiguous()


def for_each(names: Iterable[str], fn: Callable[[str], Any]) -> dict[str, Any]:
    """``fn`` of every mixer, or the traceback of the one that failed: on all ranks alike."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = fn(name)
        except Exception:
            results[name] = traceback.format_exc()
    return results


def run_all(rank: int, world: int, names: list[str], layout: Layout) -> dict[str, Any]:
    """This rank's pieces of outputs and gradients, by mixer."""
    with with_model_parallel(tp=layout.tp, cp=layout.cp), registered():
        return for_each(names, lambda name: run(name, layout))


def run_with(rank: int, world: int, name: str, options: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The same of one mixer with other options in its model."""
    with patch.dict(IN_MODEL, {name: options}):
        return run_all(rank, world, [name], layout)[name]


def run(name: str, layout: Layout) -> dict[str, Any]:
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
    from megatron.core.packed_seq_params import PackedSeqParams

    from linear_moe.parallel.layout import SequenceLayout

    layer = build(name, layout)
    fill(layer, layout)
    tp_rank, cp_rank = layer.tp_group.rank(), layer.cp_group.rank()
    sequence = SequenceLayout(BATCH, LENGTH, layout.cp, cp_rank)

    def here(seed: int) -> Tensor:
        """This rank's tokens of one random global tensor, ``[T, B, D]``."""
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(LENGTH, BATCH, 16, generator=generator, dtype=torch.float64)
        local = sequence.take(whole, dim=0)
        return local.chunk(layout.tp)[tp_rank].contiguous() if layout.sp else local

    hidden = here(1).requires_grad_()
    packed = None
    if layout.packed:
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    first = first_value(layer, layout)
    out, bias = layer(hidden, packed_seq_params=packed)
    assert bias is None
    (out * here(2)).sum().backward()
    # the part of finalize_model_grads that is about tensor parallelism, on a layer that is not wrapped
    layer.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    _allreduce_non_tensor_model_parallel_grads([layer], layer.config, layer.tp_group)
    gradients = {key: (split_dim(p), p.grad) for key, p in layer.named_parameters()}
    for _, grad in gradients.values():
        torch.distributed.all_reduce(grad, group=layer.cp_group)  # Megatron's data-parallel reduction does it
    if first is not None:
        # all heads and tokens of the gradient, on every rank: a parameter of one process, so to say
        gradients["first value"] = (None, _whole_gradient(first, layer, sequence))
    return {
        "tp": tp_rank,
        "cp": cp_rank,
        "tokens": {"out": out.detach(), "grad hidden": hidden.grad},
        "grads": gradients,
    }


def first_value(layer: Any, layout: Layout) -> Tensor | None:
    """What an earlier layer would have left, this rank's tokens and heads ``[B, T, H, V]`` of one global tensor."""
    from linear_moe.parallel.layout import SequenceLayout

    if layer.mixer.first_value is None:
        return None
    sequence = SequenceLayout(BATCH, LENGTH, layout.cp, layer.cp_group.rank())
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, LENGTH, PLACE.num_heads, layer.mixer.cfg.head_v_dim)
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    place = layer.place
    here = sequence.take(whole)[:, :, place.first_head : place.first_head + place.num_heads]
    layer.first_value.x_BTHV = here.clone().requires_grad_(torch.is_grad_enabled())
    return layer.first_value.x_BTHV


def _whole_gradient(first: Tensor, layer: Any, sequence: Any) -> Tensor:
    """Gradient of the global first value from this rank's and the others' pieces."""
    positions = sequence.take(torch.arange(LENGTH)[None])[0]
    whole = torch.zeros(BATCH, LENGTH, PLACE.num_heads, first.shape[-1], dtype=first.dtype)
    heads = torch.arange(layer.place.num_heads) + layer.place.first_head
    whole[:, positions[:, None], heads] = first.grad
    torch.distributed.all_reduce(whole, group=layer.tp_group)
    torch.distributed.all_reduce(whole, group=layer.cp_group)
    return whole


def alone(rank: int, world: int, names: list[str], fn: Callable[[str], Any]) -> dict[str, Any]:
    """``fn`` of every mixer on one rank."""
    with with_model_parallel(), registered():
        return for_each(names, fn)


def reshard(rank: int, world: int, names: list[str], steps: list[int], folder: str) -> dict[str, Any]:
    """Save under the first size, load under the next, save that ..: every rank's weights at the start and the end.

    The model is bfloat16 with some float32 parameters. A layer that only loads starts from other weights.
    """
    from pathlib import Path

    from megatron.core import dist_checkpointing

    seen: dict[str, Any] = {}
    for i, tp in enumerate(steps):
        layout = Layout(world, tp=tp)
        with with_model_parallel(tp=tp, seed=100 + i), registered():
            layers = {name: build(name, layout, params_dtype=torch.bfloat16) for name in names}

            def state(layers: dict[str, Any] = layers) -> dict[str, Any]:
                return {n: x.sharded_state_dict(prefix=f"layers.{n}.") for n, x in layers.items()}

            if i:
                loaded = dist_checkpointing.load(state(), str(Path(folder) / str(i - 1)))
                for name, layer in layers.items():
                    tensors = {k.removeprefix(f"layers.{name}."): v for k, v in loaded[name].items()}
                    missing, unexpected = layer.load_state_dict(tensors, strict=False)
                    assert not unexpected and not [k for k in missing if "_extra_state" not in k]
            made = {name: _snapshot(layer) for name, layer in layers.items()}
            seen[f"{i}"] = made
            path = Path(folder) / str(i)
            if rank == 0:
                path.mkdir()
            torch.distributed.barrier()
            if i + 1 < len(steps):
                dist_checkpointing.save(state(), str(path))
    return seen


def _snapshot(layer: Any) -> dict[str, tuple[int | None, Tensor]]:
    return {key: (split_dim(p), p.detach().clone()) for key, p in layer.named_parameters()}


def initial(rank: int, world: int, names: list[str], tp: int) -> dict[str, Any]:
    """Weights as they start out, on ``tp`` ranks."""
    with with_model_parallel(tp=tp), registered():
        return for_each(names, lambda name: _snapshot(build(name, Layout(world, tp=tp))))


def half_precision(name: str) -> dict[str, Any]:
    """Dtype of every parameter after each cast, and that the layer still runs and trains."""
    from megatron.core.transformer.module import Float16Module

    def made(**changes: Any) -> Any:
        return build(name, Layout(1), **({"params_dtype": torch.float32} | changes))

    def dtypes(layer: Any) -> dict[str, str]:
        return {key: str(p.dtype).removeprefix("torch.") for key, p in layer.named_parameters()}

    layer = made()
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    wrapped = Float16Module(made(bf16=True, params_dtype=torch.bfloat16).config, layer)
    kept = [key for key, p in layer.named_parameters() if torch.equal(p, before[key])]
    hidden = torch.randn(LENGTH, BATCH, 16).bfloat16().requires_grad_()
    if layer.mixer.first_value is not None:
        layer.first_value.x_BTHV = first_value(layer, Layout(1)).detach().bfloat16()
    out, _ = layer(hidden)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and hidden.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())
    return {
        "table": {
            f"model_tables.{p.name}" if p.per_model else p.name: p.keep_float32
            for p in layer.mixer.all_parameters()
        },
        "kept": kept,
        "Float16Module": dtypes(wrapped.module),
        "bfloat16()": dtypes(made().bfloat16()),
        "half()": dtypes(made().half()),
        "built": dtypes(made(params_dtype=torch.bfloat16)),
    }


@torch.no_grad()
def by_hand(name: str) -> dict[str, Tensor]:
    """The layer in one process, and its definition: products with its weights around the token loop."""
    from tests.contract.cases import Inputs
    from tests.contract.loop import loop

    layout = Layout(1)
    layer = build(name, layout)
    fill(layer, layout)
    hidden_TBD = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)
    w = dict(layer.named_parameters())

    def heads(x_TBC: Tensor) -> Tensor:
        return x_TBC.unflatten(-1, (PLACE.num_heads, -1)).transpose(0, 1)

    mixer = layer.mixer
    tables = {key.removeprefix("model_tables."): x for key, x in w.items()}
    read = dict.fromkeys([p.name for p in mixer.all_projections()], hidden_TBD)
    if mixer.token_shift:
        before_TBD = torch.cat([torch.zeros_like(hidden_TBD[:1]), hidden_TBD[:-1]])
        read = mixer.inputs(hidden_TBD.transpose(0, 1), before_TBD.transpose(0, 1), tables)
        read = {key: x.transpose(0, 1) for key, x in read.items()}
    waists = {None: lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    others = {}
    for p in mixer.low_rank_projections():
        up, down = w[f"low_rank.{p.name}.up.weight"], w[f"low_rank.{p.name}.down"]
        waist = waists[p.waist](read[p.name] @ down.T)
        others[p.name] = heads(waist @ up.T + w.get(f"low_rank.{p.name}.up.bias", 0))
    if mixer.grouped_width:
        groups_TBC = hidden_TBD @ w["group_proj.weight"].T
        others["groups"] = groups_TBC.unflatten(-1, (mixer.num_groups, -1)).transpose(0, 1)
    if mixer.first_value is not None:
        others[f"first_{mixer.first_value}"] = first_value(layer, layout)
    weight_HWD = w["in_proj.weight"].unflatten(0, (PLACE.num_heads, -1))
    pieces = weight_HWD.split([p.width for p in mixer.fused_projections()], 1)
    named = zip(mixer.fused_projections(), pieces, strict=True)
    x = torch.cat([torch.einsum("tbd,hwd->bthw", read[p.name], piece) for p, piece in named], -1)
    if mixer.uses_hidden:
        probs = (hidden_TBD @ w["router"].T).softmax(-1).transpose(0, 1)
        weight, others["memory_index"] = probs.sort(dim=-1, descending=True)
        weight, others["memory_index"] = (x[..., : mixer.cfg.topk] for x in (weight, others["memory_index"]))
        others["memory_weight"] = weight / weight.sum(-1, keepdim=True)
        others["hidden"] = hidden_TBD.transpose(0, 1)
    o, _ = loop(Inputs(mixer, x, others, tables, None, PLACE))
    return {"found": layer(hidden_TBD)[0], "truth": o.transpose(0, 1).flatten(2) @ w["out_proj.weight"].T}


@torch.no_grad()
def decode(name: str) -> dict[str, Tensor]:
    """Prefill of some tokens and one step for each of the others, through Megatron's inference context."""
    from megatron.core.inference.contexts import StaticInferenceContext

    layout = Layout(1)
    layer = build(name, layout).eval()
    fill(layer, layout)
    hidden = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)
    first = first_value(layer, layout)
    whole, _ = layer(hidden)
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
    pieces = []
    for piece in hidden.split([7, *[1] * 5, LENGTH - 12]):
        start = context.sequence_len_offset
        layer.first_value.x_BTHV = None if first is None else first[:, start : start + len(piece)]
        pieces.append(layer(piece, inference_context=context)[0])
        context.sequence_len_offset += len(piece)
    return {"whole": whole, "pieces": torch.cat(pieces)}


def tables(name: str) -> Any:
    """The mixer of :func:`config_of`, without Megatron."""
    config = mixer_class(name).Config(hidden_size=16, num_heads=PLACE.num_heads, head_dim=8, **RICH)
    return mixer_class(name)(config)
