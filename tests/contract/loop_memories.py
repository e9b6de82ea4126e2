"""The definition of a mixture of memories: one memory after another, each over the tokens that chose it.

Letters: T tokens of a run, H heads, W fused width, D hidden, V value dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from linear_moe.lsm import MixerState
from tests.contract.cases import Inputs


def run(inputs: Inputs, n: int, b: int, start: int, end: int) -> tuple[Tensor, MixerState]:
    """Run ``n``: tokens ``start`` to ``end`` of row ``b``. Memory 0 is the shared one, if there is one."""
    mixer, cfg, state = inputs.mixer, inputs.mixer.cfg, inputs.state or MixerState(())
    copies = list(range(-1 if cfg.shared_memory else 0, cfg.num_memories))
    choice = inputs.others["memory_index"][b, start:end].tolist()
    weight = inputs.others["memory_weight"][b, start:end]
    total = inputs.x.new_zeros(end - start, cfg.num_heads, cfg.head_v_dim)
    gate: dict[str, Tensor] = {}
    memories, convs = [], []
    for i, memory in enumerate(copies):
        tokens = [t for t in range(end - start) if memory < 0 or memory in choice[t]]
        if memory >= 0 and cfg.capacity is not None:
            share = cfg.capacity * cfg.topk / cfg.num_memories * (end - start)
            tokens = tokens[: math.ceil(share)]
        o, after, gate = _one(
            inputs, n, b, start, end, tokens, memory, _slice(inputs, state, n, i, len(copies))
        )
        memories.append(after.memory)
        convs.append(after.conv)
        if memory >= 0 and tokens:
            o = torch.stack([weight[t, choice[t].index(memory)] for t in tokens])[:, None, None] * o
        total = total.index_add(0, torch.tensor(tokens, dtype=torch.int64), o)
    by_matrix = zip(*memories, strict=True)
    memory = tuple(m for matrix in by_matrix for m in matrix)
    conv = torch.cat(convs, -1) if convs[0] is not None else None
    length = None
    if mixer.uses_positions:
        length = torch.tensor([end - start]) + (0 if state.length is None else state.length[n])
    if start == end:
        return total[None], MixerState(memory, conv, length=length)
    return read_out(inputs, total[None], gate), MixerState(memory, conv, length=length)


def read_out(inputs: Inputs, total: Tensor, gate: dict[str, Tensor]) -> Tensor:
    from tests.contract.loop import _read_out

    inner = dataclasses.replace(inputs, mixer=inputs.mixer.inner)
    return _read_out(inner, total, gate)


def _slice(inputs: Inputs, state: MixerState, n: int, i: int, count: int) -> MixerState:
    """What memory ``i`` of run ``n`` starts from."""
    memory = tuple(m[n : n + 1] for m in state.memory[i::count])
    conv = state.conv
    if conv is not None:
        width = conv.shape[-1] // count
        conv = conv[n : n + 1, ..., i * width : (i + 1) * width]
    return MixerState(memory, conv)


def _one(
    inputs: Inputs, n: int, b: int, start: int, end: int, tokens: list[int], memory: int, state: MixerState
) -> tuple[Tensor, MixerState, dict[str, Tensor]]:
    """One memory over its tokens: outputs, what it leaves, and the gates of all tokens."""
    from tests.contract.loop import _cut, _zeros

    mixer, w, core = inputs.mixer, inputs.w, inputs.mixer.core
    named, offset = {}, 0
    for p in mixer.fused_projections():
        named[p.name] = inputs.x[b, start:end, :, offset : offset + p.width]
        named[p.name] = named[p.name] + w[f"{p.name}_bias"] if p.bias else named[p.name]
        offset += p.width
    named |= {
        p.name: inputs.others[p.name][b, start:end]
        for p in mixer.low_rank_projections()
        if p.name in inputs.others
    }
    gate = {"g": named["g"][None]} if "g" in named else {}
    if memory >= 0 and not mixer.cfg.single_projection:
        own = [p for p in mixer.inner.projections() if p.name not in ("q", "g")]
        for p in own:
            named[p.name] = _own(p, own, inputs.others["hidden"][b, start:end], w, memory)
    chosen = {name: x[tokens] for name, x in named.items()}
    x = torch.cat([chosen[p.name] for p in core.fused_projections()], -1)
    taps = w.get("conv_weight"), w.get("conv_bias")
    projected, conv = _cut(core.fused_projections(), x[None], w, taps, state.conv, core.conv_activation)
    projected |= {p.name: chosen[p.name][None] for p in core.low_rank_projections()}
    if mixer.uses_positions:
        read = 0 if inputs.state is None or inputs.state.length is None else int(inputs.state.length[n])
        projected["positions"] = torch.tensor([[read + t for t in tokens]], dtype=torch.int64)
    empty = state.memory or tuple(_zeros(inputs, 1, shape) for shape in mixer.inner.memory_shapes())
    if not tokens:
        return inputs.x.new_zeros(0, mixer.cfg.num_heads, mixer.cfg.head_v_dim), MixerState(empty, conv), gate
    gated = core.gates(projected, w, inputs.place)
    o, after = core.reference(state=empty, cu_seqlens=None, **gated)
    return o[0], MixerState(after, conv), gate


def _own(p, own, hidden_TD: Tensor, w: dict[str, Tensor], memory: int) -> Tensor:
    """A memory's own projection of every token, ``[T, H, width]``."""
    waists = {None: lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    if p.rank is not None:
        hidden_TD = waists[p.waist](hidden_TD @ w[f"memory_{p.name}_down"][memory].T)
        weight_HwI = w[f"memory_{p.name}_up"][:, memory]
    else:
        fused = [other for other in own if other.rank is None]
        start = sum(other.width for other in fused[: fused.index(p)])
        weight_HwI = w["memory_weight"][:, memory, start : start + p.width]
    out = torch.einsum("ti,hwi->thw", hidden_TD, weight_HwI)
    return out + w[f"memory_{p.name}_bias"][:, memory] if p.bias else out
