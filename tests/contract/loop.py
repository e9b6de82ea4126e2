"""The definition of ``Mixer.mix``: one run after another, one token after another.

Taken from the mixer: its tables, its gates (element-wise, which is tested) and its ``reference``. Written here anew:
how the fused projections are cut, biases, the short convolution, the output norm and gate.

Letters: T tokens of a run, H heads, W fused width, C channels of the convolution, V value dim.
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
    if cu_seqlens is None:
        pieces = [(b, 0, inputs.x.shape[1]) for b in range(inputs.x.shape[0])]
    else:
        pieces = [(0, *bounds) for bounds in itertools.pairwise(cu_seqlens.tolist())]
    run = loop_memories.run if inputs.mixer.uses_hidden else _run
    results = [run(inputs, n, b, start, end) for n, (b, start, end) in enumerate(pieces)]
    dim = 0 if cu_seqlens is None else 1
    memory = tuple(torch.cat(parts) for parts in zip(*[state.memory for _, state in results]))
    tails = [_joined([getattr(s, name) for _, s in results]) for name in ("conv", "group_conv")]
    length = _joined([s.length for _, s in results])
    return torch.cat([o for o, _ in results], dim), MixerState(memory, *tails, length=length)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _run(inputs: Inputs, n: int, b: int, start: int, end: int) -> tuple[Tensor, MixerState]:
    """Run ``n``: tokens ``start`` to ``end`` of row ``b``."""
    mixer, w, state = inputs.mixer, inputs.w, inputs.state or MixerState(())
    taps = w.get("conv_weight"), w.get("conv_bias")
    before = None if state.conv is None else state.conv[n]
    projected, conv = _cut(
        mixer.fused_projections(), inputs.x[b, start:end], w, taps, before, mixer.conv_activation
    )
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
        read = 0 if state.length is None else int(state.length[n])
        projected["positions"] = torch.tensor([read + t for t in range(end - start)], dtype=torch.int64)
        length = torch.tensor([read + end - start])
    memory = tuple(m[n : n + 1] for m in state.memory)
    memory = memory or tuple(_zeros(inputs, shape) for shape in mixer.memory_shapes())
    after = {"conv": conv, "group_conv": group_conv, "length": length}
    if start == end:
        o = inputs.x.new_zeros(1, 0, mixer.cfg.num_heads, mixer.cfg.head_v_dim)
        return o, MixerState(memory, **after)
    projected |= {name: x[b, start:end] for name, x in inputs.others.items() if name != "groups"}
    projected = {name: x[None] for name, x in projected.items()}
    gated = mixer.gates(projected, w, inputs.place)
    o, memory = mixer.reference(state=memory, cu_seqlens=None, **gated)
    return _read_out(inputs, o, projected), MixerState(memory, **after)


def _cut(
    table: Sequence[Projection],
    x_THW: Tensor,
    w: dict[str, Tensor],
    taps: tuple[Tensor | None, Tensor | None],
    before: Tensor | None,
    activation: str | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each projection of a fused tensor, biased, some convolved; and the inputs that the convolution remembers."""
    named, tails, offset, channel = {}, [], 0, 0
    for p in table:
        x = x_THW[..., offset : offset + p.width]
        x = x + w[f"{p.name}_bias"] if p.bias else x
        offset += p.width
        if p.conv and taps[0] is not None:
            channels = slice(channel, channel + p.width)
            history = x.new_zeros(taps[0].shape[-1] - 1, x.shape[1], p.width)
            if before is not None:
                history = before[..., channels]
            bias = 0 if taps[1] is None else taps[1][:, channels]
            x, tail = _convolve(x, history, taps[0][:, channels], bias, activation)
            tails.append(tail)
            channel += p.width
        named[p.name] = x
    return named, torch.cat(tails, -1)[None] if tails else None


def _zeros(inputs: Inputs, shape: tuple[int, int]) -> Tensor:
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    return torch.zeros(1, inputs.mixer.cfg.num_heads, *shape, dtype=dtype)


def _convolve(
    x_THC: Tensor, history: Tensor, weight_HCW: Tensor, bias_HC: Tensor | int, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Each token's output, from its own and the last W - 1 inputs; and the inputs to remember."""
    width = weight_HCW.shape[-1]
    window, outputs = list(history), []
    for x_HC in x_THC:
        window.append(x_HC)
        y_HC = bias_HC + sum(window[-width + j] * weight_HCW[..., j] for j in range(width))
        outputs.append(y_HC * torch.sigmoid(y_HC) if activation == "silu" else y_HC)
    return torch.stack(outputs) if outputs else x_THC, torch.stack(window[len(window) - (width - 1) :])


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
