"""Mixture of memories: a router gives each token to a few of several memories, each a recurrence of an inner mixer.

    g_t = top-k of softmax(W_g x_t), divided by their sum
    memory m updates, with its own keys, values and gates, only at the tokens that chose it; it does not fade meanwhile
    o_t = sum over chosen m of g_t[m] * read(memory m, q_t)  +  read(shared memory, q_t)

The shared memory sees every token, with weight 1. Queries, the output gate, the short convolution's weights, the
inner mixer's parameters and the output norm are shared by all memories; every other projection is a memory's own
(``single_projection``: all memories use the shared memory's). All memories run as packed documents of one scan, and
the short convolution sees the tokens of one memory only, in training as in evaluation. Convolution and router follow
the paper and its text, not the common library's training path, which convolves across memories.

Letters: B rows, T tokens, S = B * T, N runs, E routed memories, F = E memories and the shared one, M slots (see
:mod:`linear_moe.lsm.routing`), H heads here, W fused width per head, C convolution channels, D hidden.
Source: arXiv:2502.13685, sections 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from linear_moe.lsm import memories, memories_step, registry, routing, split
from linear_moe.lsm.mixer import MemorySource, Mixer
from linear_moe.lsm.options import positive
from linear_moe.lsm.routing import Slots
from linear_moe.lsm.tables import MixerState, Parameter, Placement, Projection, widen

SHARED = ("q", "g")
"""Projections that all memories share: queries and the output gate."""


@dataclass(kw_only=True)
class Memories:
    """Options that a mixture adds to those of its inner mixer."""

    num_memories: int = 4
    """Routed memories."""
    topk: int = 2
    """Memories per token."""
    shared_memory: bool = True
    """One more memory that sees every token, with weight 1."""
    single_projection: bool = False
    """All memories use the projections of the shared memory instead of their own."""
    capacity: float | None = None
    """A memory takes that many times its even share of a document's tokens, the first ones; None: all."""
    aux_loss_coeff: float = 1e-3
    """Weight of the loss that balances the memories; 0: none."""

    def check(self) -> None:
        """Refuse what cannot work."""
        positive("num_memories", self.num_memories, "tokens are routed to that many memories", 4)
        positive("topk", self.topk, "every token goes to that many memories", 2)
        if self.topk > self.num_memories:
            raise ValueError(
                f"topk is {self.topk}\n"
                f"  why: a token chooses among {self.num_memories} memories (num_memories)\n"
                f"  try: {self.num_memories} or less"
            )
        if self.capacity is not None:
            positive("capacity", self.capacity, "a memory must take some tokens", "None")
        if self.aux_loss_coeff < 0:
            raise ValueError(
                f"aux_loss_coeff is {self.aux_loss_coeff}\n"
                f"  why: below 0 it would reward an uneven load\n"
                f"  try: 0.001, or 0 for none"
            )


class MixtureOfMemories(Mixer):
    """Several memories of an ``inner_class`` mixer behind a router; :func:`mixture` makes a class for each mixer."""

    inner_class: ClassVar[type[Mixer]]
    uses_hidden = True

    @dataclass(kw_only=True)
    class Config(Mixer.Config, Memories):
        """Options of a mixture; :func:`mixture` puts those of the inner mixer in place of the base's."""

    cfg: Any

    def __init__(self, cfg: Mixer.Config) -> None:
        super().__init__(cfg)
        # What each memory runs: the inner mixer without its gate, which is applied to the sum over memories, and
        # without biases, since what it gets is biased already (every memory has biases of its own).
        bare: Any = dataclasses.replace(cfg, output_gate="none", qkv_bias=False)
        self.inner = self.inner_class(cfg)
        self.core = self.inner_class(bare)
        assert not any(p.bias for p in self.core.fused_projections())

    # ---- tables ----

    def projections(self) -> tuple[Projection, ...]:
        """Those of the inner mixer, for the shared memory; without one, only what all memories share."""
        table = self.inner.projections()
        if self.cfg.shared_memory or self.cfg.single_projection:
            return table
        return tuple(p for p in table if p.name in SHARED)

    def output_projections(self) -> tuple[Projection, ...]:
        """The inner mixer's gate."""
        return self.inner.output_projections()

    def parameters(self) -> tuple[Parameter, ...]:
        """The inner mixer's, the router, and the projections of every memory."""
        cfg = self.cfg
        router = Parameter(
            "router", (cfg.num_memories, cfg.hidden_size), None, per_head=False, keep_float32=True
        )
        return (*self.inner.parameters(), router, *memories.parameters(self._own, cfg))

    @property
    def _own(self) -> tuple[Projection, ...]:
        """Projections of which every memory has its own."""
        if self.cfg.single_projection:
            return ()
        return tuple(p for p in self.inner.projections() if p.name not in SHARED)

    @property
    def num_copies(self) -> int:
        """F: memories, the shared one first."""
        return self.cfg.num_memories + int(self.cfg.shared_memory)

    @property
    def conv_channels(self) -> int:
        """Channels per head of one memory that pass through the short convolution."""
        return self.core.conv_channels

    @property
    def num_norm_groups(self) -> int:
        """The inner mixer's."""
        return self.inner.num_norm_groups

    def _norm_parameters(self) -> list[Parameter]:
        """The inner mixer's."""
        return self.inner._norm_parameters()

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """The inner mixer's, for the shared memory and every routed one."""
        return tuple(shape for shape in self.inner.memory_shapes() for _ in range(self.num_copies))

    def scan_flops_per_token(self) -> int:
        """Of the memories that a token reads and writes."""
        return self._touched * self.inner.scan_flops_per_token()

    def extra_flops_per_token(self) -> int:
        """The router, and the projections and convolutions of the memories that a token chose, of the whole layer."""
        cfg = self.cfg
        total = 2 * cfg.hidden_size * cfg.num_memories
        for p in self._own:
            width = cfg.num_heads * p.width
            per_memory = p.rank * (cfg.hidden_size + width) if p.rank else cfg.hidden_size * width
            total += 2 * cfg.topk * per_memory
        return total + 2 * (self._touched - 1) * cfg.num_heads * self.conv_channels * cfg.conv_size

    @property
    def _touched(self) -> int:
        return self.cfg.topk + int(self.cfg.shared_memory)

    # ---- what a memory does ----

    def read_out(
        self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """The inner mixer's, of the sum over memories."""
        return self.inner.read_out(o_BTHV, p, w, place)

    def route(self, hidden_BTD: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities ``[B, T, E]`` float32, weights and indices of the chosen memories ``[B, T, k]``."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            wide_BTD = widen(hidden_BTD)
            logits_BTE = torch.nn.functional.linear(wide_BTD, w["router"].to(wide_BTD.dtype))
        return routing.route(logits_BTE, self.cfg.topk)

    # ---- all memories ----

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
        """The weighted sum of what all memories read; ``others`` has the routing of :meth:`route` too.

        ``others["memory_weight"]`` and ``others["memory_index"]`` are ``[B, T, k]``, ``others["hidden"]`` is
        ``[B, T, D]``.
        """
        batch, tokens = x_BTHW.shape[:2]
        rows = memories.Rows.of(batch, tokens, cu_seqlens, x_BTHW.device)
        before = state or MixerState(())
        x_BTHC, named, length = self._named(x_BTHW, others, w, before, cu_seqlens)
        choice_Sk = others["memory_index"].flatten(0, 1)
        slots = Slots.sort(choice_Sk, rows.run_S, self.cfg.num_memories, rows.num_runs, self._limit(rows))
        cu_packed = slots.cu_seqlens
        if self.cfg.shared_memory:
            cu_packed = torch.cat([rows.cu_seqlens, slots.cu_seqlens[1:] + batch * tokens])
        x, packed = self._pack(x_BTHC, named, others["hidden"], w, slots, place)
        copies = memories.Copies(self.num_copies, rows.num_runs)
        if tokens == 1 and cu_seqlens is None and memory_from is None and not torch.is_grad_enabled():
            total, after = memories_step.recall(self, x, packed, others, w, place, slots, copies, before)
            after = dataclasses.replace(copies.join(after), length=length)
            return total.unsqueeze(1), named, after
        o, _, after = self.core.recall(
            x,
            packed,
            w,
            place,
            state=self._state_before(x, copies.split(before), cu_packed, copies, memory_from),
            memory_from=copies.through(memory_from),
            cu_seqlens=cu_packed,
        )
        rows_of = [batch * tokens] * self.cfg.shared_memory + [len(slots.order)]
        *shared, o_MHV = o.flatten(0, 1).split(rows_of)  # o[0] has a gradient that is filled with zeros first
        total = slots.scatter(o_MHV, others["memory_weight"].flatten(0, 1))
        for o_SHV in shared:
            total = total + o_SHV
        after = dataclasses.replace(copies.join(after), length=length)
        return total.unflatten(0, (batch, tokens)), named, after

    def _named(
        self,
        x_BTHW: Tensor,
        others: dict[str, Tensor],
        w: dict[str, Tensor],
        before: MixerState,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """What memories get of all tokens, ``[B, T, H, C]``; all by name, biased, not convolved; the new lengths."""
        table = self.fused_projections()
        x_BTHW = split.biased(table, x_BTHW, w)
        core = {p.name for p in self.core.fused_projections()}
        gates = [p for p in table if p.name not in core]
        widths = [p.width for p in gates]
        x_BTHC, *parts = split.cut(x_BTHW, [x_BTHW.shape[-1] - sum(widths), *widths]) if gates else [x_BTHW]
        named = {p.name: part for p, part in zip(gates, parts, strict=True)}
        inside = [p for p in table if p not in gates]
        named |= dict(zip([p.name for p in inside], x_BTHC.split([p.width for p in inside], -1), strict=True))
        low_rank = {p.name for p in self.low_rank_projections()}
        named |= {name: x for name, x in others.items() if name in low_rank}
        length = None
        if self.uses_positions:
            named["positions"], length = split.positions(x_BTHW, before.length, cu_seqlens)
        return x_BTHC, named, length

    def _pack(
        self,
        x_BTHC: Tensor,
        named: dict[str, Tensor],
        hidden_BTD: Tensor,
        w: dict[str, Tensor],
        slots: Slots,
        place: Placement,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fused and other projections of the core, ``[1, S + M, H, width]``: all tokens, then every memory's slots."""
        fused: Tensor | None = None
        own: dict[str, Tensor] = {}
        if self._own:
            x_MD = slots.gather(hidden_BTD.flatten(0, 1))
            fused, own = memories.project(self._own, x_MD, w, slots, place.num_heads)
        of_tokens, names = self.cfg.shared_memory, {p.name for p in self._own}

        def beside(table: Sequence[Projection], x_BTHC: Tensor, own_MHC: Tensor | None) -> Tensor:
            widths = {p.name: p.width for p in table}
            return memories.side_by_side(widths, x_BTHC, own_MHC, names, slots, of_tokens=of_tokens)

        x = beside(self.core.fused_projections(), x_BTHC, fused)
        packed = {}
        for p in self.core.low_rank_projections():
            is_alone = p.name in own and not of_tokens
            packed[p.name] = own[p.name][None] if is_alone else beside([p], named[p.name], own.get(p.name))
        if self.uses_positions:
            of_all = named["positions"].flatten()
            of_slots = slots.gather(of_all)
            packed["positions"] = torch.cat([of_all, of_slots] if of_tokens else [of_slots])[None]
        return x, packed

    def _limit(self, rows: memories.Rows) -> Tensor | None:
        """Slots that a memory takes of each run, ``[N]``."""
        if self.cfg.capacity is None:
            return None
        share = self.cfg.capacity * self.cfg.topk / self.cfg.num_memories
        return torch.ceil(share * rows.cu_seqlens.diff()).long()

    def _state_before(
        self,
        x: Tensor,
        state: MixerState,
        cu_seqlens: Tensor,
        copies: memories.Copies,
        memory_from: MemorySource | None,
    ) -> MixerState:
        """What the runs of all memories start from; under context parallelism also of the convolution."""
        source = copies.through(memory_from)
        if source is None or not self.conv_channels or state.conv is not None:
            return state
        last = memories.last_inputs(x[..., : self.conv_channels], self.cfg.conv_size - 1, cu_seqlens)
        (tails,) = source([last])
        return dataclasses.replace(state, conv=tails.unflatten(-1, (x.shape[2], -1)).squeeze(1).to(x.dtype))


def mixture(inner: type[Mixer]) -> type[MixtureOfMemories]:
    """The mixture of memories of a mixer."""

    @dataclass(kw_only=True)
    class Config(inner.Config, Memories):  # type: ignore[name-defined]
        """Options of the inner mixer and of the mixture."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check()

    members = {
        "__doc__": f"Several memories, each as in :class:`{inner.__name__}`, behind a router.",
        "__module__": inner.__module__,
        "Config": Config,
        "inner_class": inner,
        "family": inner.family,
        "source": f"arXiv:2502.13685, section 3; {inner.source}",
        "unsupported": inner.unsupported,
        "uses_positions": inner.uses_positions,
    }
    return type(f"MixtureOf{inner.__name__}", (MixtureOfMemories,), members)


def excluded(inner: type[Mixer]) -> str | None:
    """Why a mixer has no mixture of memories; ``None``: it has one."""
    if inner.token_shift or inner.first_value:
        return "its tokens also read their neighbours, who may be in another memory"
    if inner.initialize is not Mixer.initialize:
        return "it sets how its projections start, and not those of which every memory has its own"
    probe = inner(inner.Config.from_model(hidden_size=1024, num_heads=8, head_dim=128))
    if probe.grouped_projections():
        return "its keys belong to groups of heads, which memories cannot have their own of"
    if not any(p.name == "q" for p in probe.fused_projections()):
        return "memories share the query, and it has none"
    if any(p.bias for p in probe.fused_projections()):
        return "its projections have biases of their own, besides those of qkv_bias"
    return None


def add_mixtures() -> None:
    """Register ``mom_<name>`` for every registered mixer that can have it and has not."""
    for name in registry.names():
        inner = registry.get(name)
        is_new = not issubclass(inner, MixtureOfMemories) and f"mom_{name}" not in registry.names()
        if is_new and excluded(inner) is None:
            registry.register(f"mom_{name}")(mixture(inner))
