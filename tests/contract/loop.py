"""The definition of ``Mixer.mix``: one run after another, one token after another.

Taken from the mixer: its tables, its gates (element-wise, which is tested) and its ``reference``. Written here anew:
how the fused projections are cut, biases, the short convolution, the output norm and gate.

Letters: T tokens of a run, H heads, W fused width, C channels of the convolution, V value dim.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from linear_moe.lsm import MixerState
from tests.contract.cases import Inputs


def loop(inputs: Inputs, cu_seqlens: Tensor | None = None) -> tuple[Tensor, MixerState]:
    """``Mixer.mix`` by definition; runs are the batch rows, or the documents of one row."""
    if cu_seqlens is None:
        pieces = [(b, 0, inputs.x.shape[1]) for b in range(inputs.x.shape[0])]
    else:
        pieces = [(0, *bounds) for bounds in itertools.pairwise(cu_seqlens.tolist())]
    results = [_run(inputs, n, b, start, end) for n, (b, start, end) in enumerate(pieces)]
    dim = 0 if cu_seqlens is None else 1
    memory = tuple(torch.cat(parts) for parts in zip(*[state.memory for _, state in results]))
    conv = torch.cat([s.conv for _, s in results]) if results[0][1].conv is not None else None
    return torch.cat([o for o, _ in results], dim), MixerState(memory, conv)


def _run(inputs: Inputs, n: int, b: int, start: int, end: int) -> tuple[Tensor, MixerState]:
    """Run ``n``: tokens ``start`` to ``end`` of row ``b``."""
    mixer, w, state = inputs.mixer, inputs.w, inputs.state
    projected, offset = {}, 0
    for p in mixer.fused_projections():
        projected[p.name] = inputs.x[b, start:end, :, offset : offset + p.width]
        if p.bias:
            projected[p.name] = projected[p.name] + w[f"{p.name}_bias"]
        offset += p.width
    conv, offset = None, 0
    if mixer.conv_channels:
        tails = []
        for p in (p for p in mixer.fused_projections() if p.conv):
            channels = slice(offset, offset + p.width)
            history = projected[p.name].new_zeros(mixer.cfg.conv_size - 1, mixer.cfg.num_heads, p.width)
            if state is not None and state.conv is not None:
                history = state.conv[n, :, :, channels]
            weight_HCW = w["conv_weight"][:, channels]
            projected[p.name], tail = _convolve(projected[p.name], history, weight_HCW)
            tails.append(tail)
            offset += p.width
        conv = torch.cat(tails, -1)[None]
    memory = tuple(m[n : n + 1] for m in state.memory) if state is not None else None
    if memory is None:
        memory = tuple(_zeros(inputs, shape) for shape in mixer.memory_shapes())
    if start == end:
        o = inputs.x.new_zeros(1, 0, mixer.cfg.num_heads, mixer.cfg.head_v_dim)
        return o, MixerState(memory, conv)
    low_rank = {name: x[b, start:end] for name, x in inputs.low_rank.items()}
    gated = mixer.gates({k: v[None] for k, v in (projected | low_rank).items()}, w, inputs.place)
    o, memory = mixer.reference(state=memory, cu_seqlens=None, **gated)
    return _read_out(inputs, o, projected), MixerState(memory, conv)


def _zeros(inputs: Inputs, shape: tuple[int, int]) -> Tensor:
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    return torch.zeros(1, inputs.mixer.cfg.num_heads, *shape, dtype=dtype)


def _convolve(x_THC: Tensor, history: Tensor, weight_HCW: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's output, from its own and the last W - 1 inputs; and the inputs to remember."""
    width = weight_HCW.shape[-1]
    window, outputs = list(history), []
    for x_HC in x_THC:
        window.append(x_HC)
        y_HC = sum(window[-width + j] * weight_HCW[..., j] for j in range(width))
        outputs.append(y_HC * torch.sigmoid(y_HC))
    return torch.stack(outputs) if outputs else x_THC, torch.stack(window[len(window) - (width - 1) :])


def _read_out(inputs: Inputs, o_BTHV: Tensor, projected: dict[str, Tensor]) -> Tensor:
    cfg = inputs.mixer.cfg
    if cfg.output_norm == "rmsnorm":
        mean_square = o_BTHV.square().mean(-1, keepdim=True)
        o_BTHV = o_BTHV / (mean_square + cfg.norm_eps).sqrt() * inputs.w["norm_weight"]
    if cfg.output_gate != "none":
        g = projected["g"]
        o_BTHV = o_BTHV * torch.sigmoid(g) * (g if cfg.output_gate == "swish" else 1)
    return o_BTHV
