"""The definition of ``Mixer.mix``: one token after another.

Taken from the mixer: its tables, its gates (element-wise, which is tested) and its ``reference``. Written here anew:
how the fused projections are cut, biases, the short convolution, the output norm and gate.

Letters: B runs of equal length, T tokens of a run, H heads, W fused width, C channels of the convolution, V value dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from linear_moe.lsm import Mixer, MixerState, Projection
from tests.contract import loop_memories
from tests.contract.cases import Inputs


def loop(inputs: Inputs, cu_seqlens: Tensor | None = None) -> tuple[Tensor, MixerState]:
    """``Mixer.mix`` by definition; runs are the batch rows, or the documents of one row."""
    if inputs.mixer.uses_hidden:
        return _joined([loop_memories.run(inputs, *run) for run in _runs(inputs, cu_seqlens)], cu_seqlens)
    if cu_seqlens is None:  # rows of equal length, side by side
        return _run(inputs, slice(None), slice(None), 0, inputs.x.shape[1])
    runs = [(slice(n, n + 1), slice(0, 1), start, end) for n, _, start, end in _runs(inputs, cu_seqlens)]
    return _joined([_run(inputs, *run) for run in runs], cu_seqlens)


def _runs(inputs: Inputs, cu_seqlens: Tensor | None) -> list[tuple[int, int, int, int]]:
    """Number, row, start and end of each run."""
    if cu_seqlens is None:
        return [(b, b, 0, inputs.x.shape[1]) for b in range(inputs.x.shape[0])]
    return [(n, 0, start, end) for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist()))]


def _joined(results: list[tuple[Tensor, MixerState]], cu_seqlens: Tensor | None) -> tuple[Tensor, MixerState]:
    states = [state for _, state in results]
    memory = tuple(torch.cat(parts) for parts in zip(*[state.memory for state in states]))
    others = [[getattr(state, name) for state in states] for name in ("conv", "group_conv", "length")]
    conv, group_conv, length = (None if parts[0] is None else torch.cat(parts) for parts in others)
    o = torch.cat([o for o, _ in results], 0 if cu_seqlens is None else 1)
    return o, MixerState(memory, conv, group_conv, length=length)


def _run(inputs: Inputs, n: slice, b: slice, start: int, end: int) -> tuple[Tensor, MixerState]:
    """Runs ``n`` of equal length: tokens ``start`` to ``end`` of rows ``b``."""
    mixer, w, state = inputs.mixer, inputs.w, inputs.state or MixerState(())
    taps = w.get("conv_weight"), w.get("conv_bias")
    before = None if state.conv is None else state.conv[n]
    x_BTHW = inputs.x[b, start:end]
    projected, conv = _cut(mixer.fused_projections(), x_BTHW, w, taps, before, mixer.conv_activation)
    group_conv = None
    if mixer.grouped_width:
        taps = w.get("group_conv_weight"), w.get("group_conv_bias")
        before = None if state.group_conv is None else state.group_conv[n]
        groups = inputs.others["groups"][b, start:end]
        grouped, group_conv = _cut(
            mixer.grouped_projections(), groups, w, taps, before, mixer.conv_activation
        )
        projected |= grouped
    length = None
    if mixer.uses_positions:
        read = torch.zeros(len(x_BTHW), dtype=torch.int64) if state.length is None else state.length[n]
        projected["positions"] = read[:, None] + torch.arange(end - start)
        length = read + end - start
    memory = tuple(m[n] for m in state.memory)
    memory = memory or tuple(_zeros(inputs, len(x_BTHW), shape) for shape in mixer.memory_shapes())
    after = {"conv": conv, "group_conv": group_conv, "length": length}
    if start == end:
        o = inputs.x.new_zeros(len(x_BTHW), 0, mixer.cfg.num_heads, mixer.cfg.head_v_dim)
        return o, MixerState(memory, **after)
    projected |= {name: x[b, start:end] for name, x in inputs.others.items() if name != "groups"}
    gated = mixer.gates(projected, w, inputs.place)
    o, memory = mixer.reference(state=memory, cu_seqlens=None, **gated)
    return _read_out(inputs, o, projected), MixerState(memory, **after)


def _cut(
    table: Sequence[Projection],
    x_BTHW: Tensor,
    w: dict[str, Tensor],
    taps: tuple[Tensor | None, Tensor | None],
    before: Tensor | None,
    activation: str | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each projection of a fused tensor, biased, some convolved; and the inputs that the convolution remembers."""
    named, tails, offset, channel = {}, [], 0, 0
    for p in table:
        x = x_BTHW[..., offset : offset + p.width]
        x = x + w[f"{p.name}_bias"] if p.bias else x
        offset += p.width
        if p.conv and taps[0] is not None:
            channels = slice(channel, channel + p.width)
            history = x.new_zeros(len(x), taps[0].shape[-1] - 1, *x.shape[2:])
            if before is not None:
                history = before[..., channels]
            bias = 0 if taps[1] is None else taps[1][:, channels]
            x, tail = _convolve(x, history, taps[0][:, channels], bias, activation)
            tails.append(tail)
            channel += p.width
        named[p.name] = x
    return named, torch.cat(tails, -1) if tails else None


def _zeros(inputs: Inputs, runs: int, shape: tuple[int, int]) -> Tensor:
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    return torch.zeros(runs, inputs.mixer.cfg.num_heads, *shape, dtype=dtype)


def _convolve(
    x_BTHC: Tensor, history: Tensor, weight_HCW: Tensor, bias_HC: Tensor | int, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Each token's output, from its own and the last W - 1 inputs; and the inputs to remember."""
    tokens, width = x_BTHC.shape[1], weight_HCW.shape[-1]
    window = torch.cat([history, x_BTHC], 1)
    y = bias_HC + sum(window[:, j : j + tokens] * weight_HCW[..., j] for j in range(width))
    return y * torch.sigmoid(y) if activation == "silu" else y, window[:, tokens:]


def _read_out(inputs: Inputs, o_BTHV: Tensor, projected: dict[str, Tensor]) -> Tensor:
    """By the options; a mixer with a read-out of its own gives its definition in test_contract_read_out."""
    mixer, cfg, w = inputs.mixer, inputs.mixer.cfg, inputs.w
    if type(mixer).read_out is not Mixer.read_out:
        return mixer.read_out(o_BTHV, projected, w, inputs.place)
    if cfg.output_norm == "groupnorm":
        centred = o_BTHV - o_BTHV.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        o_BTHV = centred / (variance + cfg.norm_eps).sqrt() * w["norm_weight"] + w["norm_bias"]
    elif cfg.output_norm == "rmsnorm":
        squares = o_BTHV.square().mean(-1).unflatten(2, (mixer.num_norm_groups, -1))
        mean_square = squares.mean(-1, keepdim=True).expand_as(squares).flatten(2).unsqueeze(-1)
        o_BTHV = o_BTHV / (mean_square + cfg.norm_eps).sqrt() * w["norm_weight"]
    if cfg.output_gate != "none":
        g = projected["g"]
        o_BTHV = o_BTHV * torch.sigmoid(g) * (g if cfg.output_gate == "swish" else 1)
    return o_BTHV
