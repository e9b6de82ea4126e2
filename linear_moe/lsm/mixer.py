"""The mixer contract: what a token mixer says about itself, and everything that follows from it.

A mixer is one recurrence over a matrix memory per head. Its file says which projections of the input it needs, how
they become the arguments of the recurrence, the recurrence itself, and its definition token by token:

    Config         a dataclass, a doc string under every field       -> flags, validation, config.json
    projections    a table of named projections                      -> one fused TP-sharded GEMM, names, counts
    parameters     a table of per-head and shared parameters         -> TP sharding, float32 upkeep, checkpoint keys
    gates          element-wise maths on projected tensors           -> dtype policy, recompute
    scan           outputs and final memory                          -> training, prefill, decode, packed documents
    segment        what a run of tokens does to any memory           -> context parallelism in any layout
    reference      the definition, one token at a time               -> every test

No mixer knows about tensor or context parallelism, packing, decoding or checkpoints.

Letters: B rows of runs, T tokens of a run row, H heads here, K key dim, V value dim, W fused width per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import Segment, short_conv
from linear_moe.lsm.options import check_types, one_of, positive


@dataclass(frozen=True)
class Projection:
    """A named linear map of the layer's input, ``num_heads * width`` channels.

    Attributes:
        name: key of the projected tensor ``[B, T, H, width]`` in ``gates``.
        width: channels per head.
        bias: add a learned bias.
        rank: low rank: input -> ``rank`` channels (replicated over TP) -> heads; ``None``: part of the fused GEMM.
        conv: passes through the layer's short convolution; such projections come first in the table.
    """

    name: str
    width: int
    bias: bool = False
    rank: int | None = None
    conv: bool = False


@dataclass(frozen=True)
class Parameter:
    """A learned tensor that is not a projection.

    Attributes:
        name: key in ``gates`` and in the checkpoint.
        shape: of the whole tensor; starts with ``num_heads`` when ``per_head``.
        init: fills the tensor (this rank's heads of it) in place.
        per_head: sharded over tensor-parallel ranks by head; otherwise one copy serves all heads.
        keep_float32: stays float32 in a half-precision model.
    """

    name: str
    shape: tuple[int, ...]
    init: Callable[[Tensor], object]
    per_head: bool = True
    keep_float32: bool = False


@dataclass(frozen=True)
class Placement:
    """Which heads of which layer are computed here: decays by head or depth use global indices.

    Attributes:
        num_heads: heads here.
        first_head: global index of the first of them.
        layer: global index of the layer, from 0.
        num_layers: layers of the model.
    """

    num_heads: int
    first_head: int = 0
    layer: int = 0
    num_layers: int = 1


Memory = tuple[Tensor, ...]
"""``[N, H, K, V]`` float32 for each matrix memory of a mixer; most have one."""


@dataclass(frozen=True)
class MixerState:
    """What decoding carries from one call to the next.

    Attributes:
        memory: the memories after the last token.
        conv: ``[N, conv_size - 1, H, channels]``, the last inputs of the short convolution, or ``None``.
    """

    memory: Memory
    conv: Tensor | None = None


MemorySource = Callable[[Sequence[Segment]], Memory]


class Mixer:
    """Base of every token mixer: subclass it in one file, decorate it with :func:`register`."""

    name: ClassVar[str]
    family: ClassVar[Literal["diagonal decay", "delta rule"]]
    source: ClassVar[str]
    """The paper that defines it: arXiv id and section."""

    @dataclass(kw_only=True)
    class Config:
        """Shape and options of a mixer; subclasses add their own and change defaults."""

        hidden_size: int
        """Channels of the layer's input and output."""
        num_heads: int
        """Heads of the whole layer, before tensor parallelism."""
        head_dim: int
        """Channels per head that ``expand_k`` and ``expand_v`` multiply."""
        expand_k: float = 1.0
        """Key dim per head is ``expand_k * head_dim``."""
        expand_v: float = 1.0
        """Value dim per head is ``expand_v * head_dim``."""
        qkv_bias: bool = False
        """Learned bias on q, k and v (Qwen2)."""
        conv_size: int = 0
        """Width of the causal short convolution on q, k and v; 0: none."""
        output_norm: str = "rmsnorm"
        """Per-head norm of the output: rmsnorm or identity."""
        output_gate: str = "swish"
        """Activation of the output gate: swish, sigmoid or none."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""

        def __post_init__(self) -> None:
            check_types(self)
            for name in ("hidden_size", "num_heads", "head_dim"):
                positive(name, getattr(self, name), "it counts channels or heads", 64)
            positive("norm_eps", self.norm_eps, "an output of zeros is divided by its root", 1e-5)
            for name in ("expand_k", "expand_v"):
                width = getattr(self, name) * self.head_dim
                if width != int(width) or width < 1:
                    raise ValueError(
                        f"{name} {getattr(self, name)} gives a head of {width} channels\n"
                        f"  why: it multiplies head_dim {self.head_dim} and must give a whole number\n"
                        f"  try: {name} 1.0"
                    )
            if self.conv_size < 0 or self.conv_size == 1:
                raise ValueError(
                    f"conv_size is {self.conv_size}\n"
                    f"  why: it is the number of tokens that the short convolution sees, itself included\n"
                    f"  try: 4, or 0 for none"
                )
            one_of("output_norm", self.output_norm, ("rmsnorm", "identity"))
            one_of("output_gate", self.output_gate, ("swish", "sigmoid", "none"))

        @property
        def head_k_dim(self) -> int:
            """K."""
            return int(self.expand_k * self.head_dim)

        @property
        def head_v_dim(self) -> int:
            """V."""
            return int(self.expand_v * self.head_dim)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    # ---- what a mixer says ----

    def projections(self) -> tuple[Projection, ...]:
        """The table of projections, those of the short convolution first."""
        raise NotImplementedError

    def parameters(self) -> tuple[Parameter, ...]:
        """Learned tensors that are not projections; the output norm and the convolution come by themselves."""
        return ()

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Element-wise maths: projected tensors ``p`` and parameters ``w`` to the arguments of ``scan``."""
        raise NotImplementedError

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """Outputs ``[B, T, H, V]`` and the memories after the last token of every run."""
        raise NotImplementedError

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """What the tokens of every run do to each memory."""
        raise NotImplementedError

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition of ``scan``, one token at a time; tests trust only this."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """What the read is multiplied with."""
        return self.cfg.head_k_dim**-0.5

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """Key and value dims of each matrix memory of a head."""
        return ((self.cfg.head_k_dim, self.cfg.head_v_dim),)

    def scan_flops_per_token(self) -> int:
        """Forward floating-point operations of the definition per token and head, matrix products only."""
        raise NotImplementedError

    # ---- what follows ----

    def qkv(self, *, conv: bool = False) -> tuple[Projection, ...]:
        """The three projections most mixers start with."""
        widths = {"q": self.cfg.head_k_dim, "k": self.cfg.head_k_dim, "v": self.cfg.head_v_dim}
        return tuple(Projection(name, width, self.cfg.qkv_bias, conv=conv) for name, width in widths.items())

    def output_projections(self) -> tuple[Projection, ...]:
        """The output gate, if it is on."""
        return () if self.cfg.output_gate == "none" else (Projection("g", self.cfg.head_v_dim),)

    def fused_projections(self) -> tuple[Projection, ...]:
        """The projections that share one GEMM, in the order of their channels inside a head."""
        return tuple(p for p in self.all_projections() if p.rank is None)

    def low_rank_projections(self) -> tuple[Projection, ...]:
        """The projections through a narrow waist."""
        return tuple(p for p in self.all_projections() if p.rank is not None)

    def all_projections(self) -> tuple[Projection, ...]:
        """The whole table, output gate included."""
        return self.projections() + self.output_projections()

    def all_parameters(self) -> tuple[Parameter, ...]:
        """The whole table, with the biases, the convolution and the output norm that the options ask for."""
        cfg = self.cfg
        parameters = list(self.parameters())
        shape: tuple[int, ...]
        for p in self.fused_projections():
            if p.bias:
                shape = (cfg.num_heads, p.width)
                parameters.append(Parameter(f"{p.name}_bias", shape, torch.nn.init.zeros_))
        if self.conv_channels:
            shape = (cfg.num_heads, self.conv_channels, cfg.conv_size)
            bound = 1 / math.sqrt(cfg.conv_size)
            parameters.append(Parameter("conv_weight", shape, lambda x: x.uniform_(-bound, bound)))
        if cfg.output_norm == "rmsnorm":
            shape = (cfg.head_v_dim,)
            parameters.append(Parameter("norm_weight", shape, torch.nn.init.ones_, per_head=False))
        return tuple(parameters)

    @property
    def conv_channels(self) -> int:
        """Channels per head that pass through the short convolution."""
        if self.cfg.conv_size == 0:
            return 0
        return sum(p.width for p in self.fused_projections() if p.conv)

    @property
    def fused_width(self) -> int:
        """W: channels per head of the fused projection."""
        return sum(p.width for p in self.fused_projections())

    def mix(
        self,
        x_BTHW: Tensor,
        low_rank: dict[str, Tensor],
        w: dict[str, Tensor],
        place: Placement,
        *,
        state: MixerState | None = None,
        memory_from: MemorySource | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Everything between the input projections and the output projection.

        Args:
            x_BTHW: ``[B, T, H, W]`` fused projections.
            low_rank: the low-rank projections by name, ``[B, T, H, width]``.
            w: the parameters by name, those per head with this placement's heads only.
            place: the heads and the layer computed here.
            state: memory and convolution tail before the first token of every run; ``None``: empty.
            memory_from: instead of ``state.memory``: gives the memory before these runs, told what they do to it.
            cu_seqlens: boundaries of the runs when ``B == 1`` row holds several.

        Returns:
            ``[B, T, H, V]`` outputs, normed and gated, and the state after the last token of every run.
        """
        p, conv_tail = self._split(x_BTHW, w, state.conv if state else None, cu_seqlens)
        gated = self.gates(p | low_rank, w, place)
        memory = state.memory if state and state.memory else None
        if memory_from is not None:
            memory = memory_from(self.segment(cu_seqlens=cu_seqlens, **gated))
        o_BTHV, memory = self.scan(state=memory, cu_seqlens=cu_seqlens, **gated)
        return self.read_out(o_BTHV, p, w), MixerState(memory, conv_tail)

    def conv_input(self, x_BTHW: Tensor, w: dict[str, Tensor]) -> Tensor:
        """What the short convolution reads and a :class:`MixerState` keeps: the first channels, biased."""
        head = x_BTHW[..., : self.conv_channels]
        convolved = [p for p in self.fused_projections() if p.conv]
        if not any(p.bias for p in convolved):
            return head
        zeros = head.new_zeros(())
        biases = [
            w[f"{p.name}_bias"] if p.bias else zeros.expand(x_BTHW.shape[2], p.width) for p in convolved
        ]
        return head + torch.cat(biases, dim=-1)

    def _split(
        self, x_BTHW: Tensor, w: dict[str, Tensor], conv_tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Named views of the fused projections, biased and convolved."""
        fused = self.fused_projections()
        if self.conv_channels:
            tail = x_BTHW[..., self.conv_channels :]
            head, conv_tail = short_conv(
                self.conv_input(x_BTHW, w),
                w["conv_weight"],
                activation="silu",
                state=conv_tail,
                cu_seqlens=cu_seqlens,
            )
            convolved = [p for p in fused if p.conv]
            plain = [p for p in fused if not p.conv]
            views = [*head.split([p.width for p in convolved], -1), *tail.split([p.width for p in plain], -1)]
        else:
            convolved, plain = [], list(fused)
            views = list(x_BTHW.split([p.width for p in fused], dim=-1))
        named = dict(zip([p.name for p in convolved + plain], views, strict=True))
        for p in plain:
            if p.bias:
                named[p.name] = named[p.name] + w[f"{p.name}_bias"]
        return named, conv_tail

    def read_out(self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        """Norm the output per head and gate it; statistics in float32 at least."""
        dtype = o_BTHV.dtype
        if self.cfg.output_norm == "rmsnorm":
            wide = widen(o_BTHV)
            o_BTHV = F.rms_norm(wide, (wide.shape[-1],), w["norm_weight"].to(wide.dtype), self.cfg.norm_eps)
        if self.cfg.output_gate != "none":
            act = F.silu if self.cfg.output_gate == "swish" else torch.sigmoid
            o_BTHV = o_BTHV * act(p["g"].to(o_BTHV.dtype))
        return o_BTHV.to(dtype)


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when it is wider: gates and long sums never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
