"""The mixer contract: what a token mixer says about itself, and everything that follows from it.

A mixer is one recurrence over a matrix memory per head. Its file says which projections of the input it needs, how
they become the arguments of the recurrence, the recurrence itself, and its definition token by token:

    Config         a dataclass, a doc string under every field       -> flags, validation, config.json
    projections    a table of named projections                      -> one fused TP-sharded GEMM, names, counts
    parameters     a table of per-head and shared parameters         -> TP sharding, float32 upkeep, checkpoint keys
    inputs         only with token_shift: what each projection reads -> halo, decoding
    gates          element-wise maths on projected tensors           -> dtype policy, recompute
    scan           outputs and final memory                          -> training, prefill, decode, packed documents
    segment        what a run of tokens does to any memory           -> context parallelism in any layout
    reference      the definition, one token at a time               -> every test
    read_out       norm and gate of the output                       -> full-width norms under TP

No mixer knows about tensor or context parallelism, packing, decoding or checkpoints.

Letters: B rows of runs, T tokens of a run row, N runs, H heads here, G groups of heads here, D hidden, K key dim,
V value dim, W fused width per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.lsm import output, split
from linear_moe.lsm.options import check_types, one_of, positive, whole_width
from linear_moe.lsm.tables import Memory, MixerState, Parameter, Placement, Projection, checked_names

__all__ = ["Memory", "MemorySource", "Mixer", "MixerState", "Parameter", "Placement", "Projection"]

MemorySource = Callable[[Sequence[Segment]], Memory]


class Mixer:
    """Base of every token mixer: subclass it in one file, decorate it with :func:`register`."""

    name: ClassVar[str]
    family: ClassVar[Literal["diagonal decay", "delta rule", "diagonal plus low rank"]]
    source: ClassVar[str]
    """The paper that defines it: arXiv id and section."""
    unsupported: ClassVar[dict[str, str]] = {}
    """Layouts that this mixer cannot take, by the keys of ``tables.LAYOUTS``, and why: a run under one is refused."""
    token_shift: ClassVar[bool] = False
    """Projections read a mix of a token and the one before it: the mixer has :meth:`inputs`."""
    uses_positions: ClassVar[bool] = False
    """``gates`` gets ``p["positions"]``, ``[B, T]`` int64: the place of each token in its document."""
    first_value: ClassVar[str | None] = None
    """Projection whose output in the first layer of this mixer all later ones get, as ``p["first_" + name]``."""
    conv_activation: ClassVar[str | None] = "silu"
    """Activation of the short convolution."""
    norm_weight_per_head: ClassVar[bool] = False
    """The output norm has a weight per channel of every head, even where its statistics are of one head."""
    uses_hidden: ClassVar[bool] = False
    """``others["hidden"]`` is the layer's input ``[B, T, D]`` (mixtures of memories)."""

    @dataclass(kw_only=True)
    class Config:
        """Shape and options of a mixer; subclasses add their own and change defaults."""

        hidden_size: int
        """Channels of the layer's input and output."""
        num_heads: int
        """Heads of the whole layer, before tensor parallelism."""
        head_dim: int
        """Channels per head that ``expand_k`` and ``expand_v`` multiply."""
        layers_of_kind: int = 1
        """Layers of this mixer in the model."""
        expand_k: float = 1.0
        """Key dim per head is ``expand_k * head_dim``."""
        expand_v: float = 1.0
        """Value dim per head is ``expand_v * head_dim``."""
        qkv_bias: bool = False
        """Learned bias on q, k and v (Qwen2)."""
        conv_size: int = 0
        """Width of the causal short convolution on q, k and v; 0: none."""
        conv_bias: bool = False
        """Learned bias of the short convolution."""
        output_norm: str = "rmsnorm"
        """Norm of the output: rmsnorm, groupnorm (mean and bias too) or identity."""
        output_gate: str = "swish"
        """Activation of the output gate: swish, sigmoid or none."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""

        @classmethod
        def from_model(
            cls, *, hidden_size: int, num_heads: int, head_dim: int, **options: Any
        ) -> Mixer.Config:
            """The config in a model whose softmax layers have ``num_heads`` of ``head_dim``; some mixers differ."""
            return cls(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, **options)

        def __post_init__(self) -> None:
            check_types(self)
            for name in ("hidden_size", "num_heads", "head_dim", "layers_of_kind"):
                positive(name, getattr(self, name), "it counts channels, heads or layers", 64)
            positive("norm_eps", self.norm_eps, "an output of zeros is divided by its root", 1e-5)
            for name in ("expand_k", "expand_v"):
                whole_width(name, getattr(self, name), "head_dim", self.head_dim, "a head")
            if self.conv_size < 0 or self.conv_size == 1:
                raise ValueError(
                    f"conv_size is {self.conv_size}\n"
                    f"  why: it is the number of tokens that the short convolution sees, itself included\n"
                    f"  try: 4, or 0 for none"
                )
            one_of("output_norm", self.output_norm, ("rmsnorm", "groupnorm", "identity"))
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

    def inputs(self, x_BTD: Tensor, before_BTD: Tensor, w: dict[str, Tensor]) -> dict[str, Tensor]:
        """With ``token_shift``: what each projection reads, ``[B, T, D]``, from every token and the one before it."""
        raise NotImplementedError

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Element-wise maths: projected tensors ``p`` and parameters ``w`` to the arguments of ``scan``."""
        raise NotImplementedError

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """Outputs ``[B, T, H, V]`` and the memories after the last token of every run.

        Under context parallelism ``state`` may be on its way: looking at a matrix waits for it, and
        :func:`~linear_moe.kernels.arriving.states_of` hands it to a kernel that starts first.
        """
        raise NotImplementedError

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """What the tokens of every run do to each memory."""
        raise NotImplementedError

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition of ``scan``, one token at a time; tests trust only this."""
        raise NotImplementedError

    def read_out(
        self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """Norm the output and gate it: ``[B, T, H, V]`` to the same."""
        return output.read_out(o_BTHV, p.get("g"), w, self.cfg, self.num_norm_groups, place)

    @property
    def scale(self) -> float:
        """What the read is multiplied with."""
        return self.cfg.head_k_dim**-0.5

    @property
    def num_groups(self) -> int:
        """Groups of heads that share each grouped projection."""
        return 1

    @property
    def num_norm_groups(self) -> int:
        """Groups of heads that share the statistics of the output norm; 1: one norm over the full width."""
        return self.cfg.num_heads

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """Key and value dims of each matrix memory of a head."""
        return ((self.cfg.head_k_dim, self.cfg.head_v_dim),)

    def scan_flops_per_token(self) -> int:
        """Forward floating-point operations of the definition per token and head, matrix products only."""
        raise NotImplementedError

    def extra_flops_per_token(self) -> int:
        """The same of the whole layer, for products that no table shows."""
        return 0

    def initialize(self, found: dict[str, Tensor], place: Placement) -> None:
        """Change, in place, how parameters start where that depends on the layer or the heads here.

        Args:
            found: what the tables made, by checkpoint key; of the fused projection, views ``in_proj.<name>``
                ``[H, width, D]``. Copies on other tensor-parallel ranks must get the same values.
            place: the heads and the layer.
        """

    # ---- what follows ----

    def qkv(self, names: str = "qkv") -> tuple[Projection, ...]:
        """The three projections most mixers start with, through the short convolution if it is on."""
        cfg = self.cfg
        widths = zip(names, (cfg.head_k_dim, cfg.head_k_dim, cfg.head_v_dim), strict=True)
        return tuple(Projection(name, n, cfg.qkv_bias, conv=cfg.conv_size > 0) for name, n in widths)

    def output_projections(self) -> tuple[Projection, ...]:
        """The output gate, if it is on."""
        return () if self.cfg.output_gate == "none" else (Projection("g", self.cfg.head_v_dim),)

    def fused_projections(self) -> tuple[Projection, ...]:
        """The projections that share one GEMM, in the order of their channels inside a head."""
        return tuple(p for p in self.all_projections() if p.rank is None and not p.grouped)

    def grouped_projections(self) -> tuple[Projection, ...]:
        """The projections for groups of heads, which share another."""
        return tuple(p for p in self.all_projections() if p.grouped)

    def low_rank_projections(self, layer_of_kind: int | None = None) -> tuple[Projection, ...]:
        """The projections through a narrow waist: of any layer, or of that one among the mixer's."""
        is_first = layer_of_kind == 0
        table = self.all_projections()
        return tuple(p for p in table if p.rank is not None and not (is_first and p.after_first))

    def all_projections(self) -> tuple[Projection, ...]:
        """The whole table, output gate included."""
        return self._table

    @cached_property
    def _table(self) -> tuple[Projection, ...]:
        """Options do not change, and it is asked for several times in every layer and step."""
        return checked_names(type(self).__name__, self.projections(), self.output_projections())

    def all_parameters(self) -> tuple[Parameter, ...]:
        """The whole table, with the biases, the convolution and the output norm that the options ask for."""
        cfg = self.cfg
        biases = [
            Parameter(f"{p.name}_bias", (cfg.num_heads, p.width), torch.nn.init.zeros_)
            for p in self.fused_projections()
            if p.bias
        ]
        return (*self.parameters(), *biases, *self._conv_parameters(), *self._norm_parameters())

    def _conv_parameters(self) -> list[Parameter]:
        found = []
        bound = 1 / math.sqrt(max(self.cfg.conv_size, 1))
        for name, shape, per_head in (
            ("conv", (self.cfg.num_heads, self.conv_channels), True),
            ("group_conv", (self.num_groups, self.group_conv_channels), False),
        ):
            if shape[1] == 0:
                continue
            weight = (*shape, self.cfg.conv_size)
            found.append(Parameter(f"{name}_weight", weight, lambda x: x.uniform_(-bound, bound), per_head))
            if self.cfg.conv_bias:
                found.append(Parameter(f"{name}_bias", shape, torch.nn.init.zeros_, per_head))
        return found

    def _norm_parameters(self) -> list[Parameter]:
        if self.cfg.output_norm == "identity":
            return []
        # A norm per head has one weight for all heads, as in the common library; a wider one a weight per channel.
        whole = self.norm_weight_per_head or self.num_norm_groups < self.cfg.num_heads
        whole = whole or self.cfg.output_norm == "groupnorm"
        shape = (self.cfg.num_heads, self.cfg.head_v_dim) if whole else (self.cfg.head_v_dim,)
        found = [Parameter("norm_weight", shape, torch.nn.init.ones_, per_head=whole)]
        if self.cfg.output_norm == "groupnorm":
            found.append(Parameter("norm_bias", shape, torch.nn.init.zeros_))
        return found

    @property
    def conv_channels(self) -> int:
        """Channels per head that pass through the short convolution."""
        return sum(p.width for p in self.fused_projections() if p.conv) if self.cfg.conv_size else 0

    @property
    def group_conv_channels(self) -> int:
        """Channels per group of heads that pass through it."""
        return sum(p.width for p in self.grouped_projections() if p.conv) if self.cfg.conv_size else 0

    @property
    def fused_width(self) -> int:
        """W: channels per head of the fused projection."""
        return sum(p.width for p in self.fused_projections())

    @property
    def grouped_width(self) -> int:
        """Channels per group of the fused grouped projection."""
        return sum(p.width for p in self.grouped_projections())

    def groups_here(self, place: Placement) -> slice:
        """The groups that the heads of ``place`` belong to."""
        return place.groups(self.num_groups, self.cfg.num_heads)

    def conv_input(self, x_BTHW: Tensor, w: dict[str, Tensor]) -> Tensor:
        """What the short convolution reads and a :class:`MixerState` keeps: the first channels, biased."""
        return split.conv_input(self.fused_projections(), x_BTHW[..., : self.conv_channels], w)

    def mix(
        self,
        x_BTHW: Tensor,
        others: dict[str, Tensor],
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
            others: the low-rank projections by name, ``[B, T, H, width]``, and fused ones that come by themselves, if
                none is convolved (``x_BTHW`` is then without them); ``"groups"``, the fused grouped ones
                ``[B, T, G, width]``; ``"first_" + name``, see ``first_value``.
            w: the parameters by name, those per head with this placement's heads only.
            place: the heads and the layer computed here.
            state: memory and convolution tail before the first token of every run; ``None``: empty.
            memory_from: instead of ``state.memory``: gives the memory before these runs, told what they do to it.
            cu_seqlens: boundaries of the runs when ``B == 1`` row holds several.

        Returns:
            ``[B, T, H, V]`` outputs, normed and gated, and the state after the last token of every run.
        """
        o_BTHV, p, state = self.recall(
            x_BTHW, others, w, place, state=state, memory_from=memory_from, cu_seqlens=cu_seqlens
        )
        return self.read_out(o_BTHV, p, w, place), state

    def recall(
        self,
        x_BTHW: Tensor,
        others: dict[str, Tensor],
        w: dict[str, Tensor],
        place: Placement,
        *,
        state: MixerState | None = None,
        memory_from: MemorySource | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], MixerState]:
        """:meth:`mix` up to the output norm: what was read from the memory, the projections by name, the state."""
        before = state or MixerState(())
        p, tails = split.split(self, x_BTHW, others, w, place, before, cu_seqlens)
        length = None
        if self.uses_positions and "positions" not in p:
            p["positions"], length = split.positions(x_BTHW, before.length, cu_seqlens)
        gated = self.gates(p, w, place)
        memory = before.memory or None
        if memory_from is not None:
            memory = memory_from(self.segment(cu_seqlens=cu_seqlens, **gated))
        o_BTHV, memory = self.scan(state=memory, cu_seqlens=cu_seqlens, **gated)
        return o_BTHV, p, MixerState(memory, *tails, length=length)
