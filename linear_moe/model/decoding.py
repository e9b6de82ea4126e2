"""What decoding keeps between calls, at fixed addresses: the states of mixers, keys and values of softmax layers.

Rows of a batch may differ in length, and nothing here is padded: prompts of different length are read as packed
documents, each token once; afterwards every row gets one token per step, at its own position. A step reads and writes
the same memory as the one before it, waits for nothing, and takes its positions from ``lengths_B`` on the device, so
that it can be captured as one CUDA graph.

Keys are kept rotated. A step attends to the whole cache under a mask, so its time follows the capacity: that grows by a
quarter at least, which wastes a quarter of memory and time at most and gives 22 addresses from 1k to 128k tokens.

Letters: B rows, T tokens of a call, S capacity, L query tokens of a row, G key heads, K channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from linear_moe.lsm import MixerState

BLOCK = 64
"""The capacity is a multiple of this: rows of a mask are then aligned as fused attention likes them."""


@dataclass(frozen=True)
class Reading:
    """The tokens of one call, of which every row gets as many as it has: none is padding.

    Attributes:
        starts: tokens that each row has read before.
        counts: tokens that it gets now; 0 is allowed.
        rows_TB: the row of each token; ``[sum(counts), 1]`` when packed.
        positions_TB: its place in its row.
        is_packed: rows lie one after another in one row; otherwise all counts are equal.
    """

    starts: list[int]
    counts: list[int]
    rows_TB: Tensor
    positions_TB: Tensor
    is_packed: bool

    @classmethod
    def of(
        cls, starts: Sequence[int], counts: Sequence[int], device: torch.device, packed: bool | None = None
    ) -> Reading:
        """Rows of ``counts`` tokens after ``starts`` earlier ones."""
        is_packed = len(set(counts)) > 1 if packed is None else packed
        rows, places = [], []
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            rows.append(torch.full((count,), row))
            places.append(torch.arange(start, start + count))
        join = (lambda x: torch.cat(x)[:, None]) if is_packed else (lambda x: torch.stack(x, dim=1))
        return cls(list(starts), list(counts), join(rows).to(device), join(places).to(device), is_packed)

    def of_row(self, x_TB: Tensor, row: int) -> Tensor:
        """``[count, 1, ...]``, the tokens of one row."""
        if not self.is_packed:
            return x_TB[:, row : row + 1]
        first = sum(self.counts[:row])
        return x_TB[first : first + self.counts[row]]

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """The inverse: ``[count, 1, ...]`` of every row that has tokens."""
        return torch.cat(list(rows), dim=0 if self.is_packed else 1)

    def places(self) -> list[Tensor]:
        """Where the tokens of each row are in the flattened ``[T, B]``, on the host."""
        if not self.is_packed:
            batch = len(self.counts)
            return [torch.arange(count) * batch + row for row, count in enumerate(self.counts)]
        return list(torch.arange(sum(self.counts)).split(self.counts))

    def packed_seq_params(self, length: int) -> PackedSeqParams | None:
        """The rows as documents; ``length`` of the rotary table."""
        if not self.is_packed:
            return None
        ends = torch.tensor([0, *self.counts]).cumsum(0).int().to(self.rows_TB.device)[None]
        return PackedSeqParams(
            qkv_format="sbhd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )


class KeyValueCache:
    """Tensors ``[B, G, S, K]``, one for each of the things kept of a token; zeros where nothing was written yet."""

    def __init__(self, batch: int, capacity: int, like: Sequence[Tensor]) -> None:
        self.tensors = tuple(x.new_zeros(batch, x.shape[2], capacity, x.shape[3]) for x in like)

    def grow(self, capacity: int) -> None:
        """Room for ``capacity`` tokens; what is there stays."""
        grown = []
        for x in self.tensors:
            grown.append(x.new_zeros(*x.shape[:2], capacity, x.shape[3]))
            grown[-1][:, :, : x.shape[2]] = x
        self.tensors = tuple(grown)


@dataclass(frozen=True)
class Mark:
    """A place in the text that every row can go back to: its tokens, and a copy of the mixers' states behind them."""

    lengths: list[int]
    states: dict[int, MixerState]


class DecodingContext(StaticInferenceContext):
    """Megatron's static context with rows of any length; ``key_value_memory_dict`` holds what each layer keeps.

    Args:
        batch_size: B.
        limit: tokens that a row may reach.
        device: of the model.
        has_cache: whether any layer keeps keys; without, the capacity stays at one block (a rotary table follows it).
    """

    def __init__(self, batch_size: int, limit: int, device: torch.device, has_cache: bool = True) -> None:
        super().__init__(batch_size, 0)
        self.max_sequence_length: int = 0
        self.limit, self.has_cache = limit, has_cache
        self.lengths = [0] * batch_size
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.reading: Reading | None = None
        self.allowed_B11S: Tensor | None = None
        self.growths = 0
        self.tables: dict[int, Tensor] = {}

    # ---- how a call begins and ends ----

    def begin_reading(self, counts: Sequence[int], packed: bool | None = None) -> Reading:
        """The next call reads ``counts`` tokens of every row, ``packed`` end to end (None: if they differ)."""
        self.enable_prefill_mode()
        self.reserve(max(start + count for start, count in zip(self.lengths, counts, strict=True)))
        self.reading = Reading.of(self.lengths, counts, self.lengths_B.device, packed)
        return self.reading

    def end_reading(self) -> None:
        """The tokens of the call have been read."""
        assert self.reading is not None
        self.set_lengths([a + b for a, b in zip(self.reading.starts, self.reading.counts, strict=True)])
        self.reading = None

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Tokens that each row has read."""
        self.lengths = list(lengths)
        self.lengths_B.copy_(torch.tensor(self.lengths))
        self.sequence_len_offset = max(self.lengths)

    def prepare_step(self) -> None:
        """On the host, before every step, also one that is replayed: room for one token more of every row."""
        self.reserve(max(self.lengths) + 1)
        self.lengths = [length + 1 for length in self.lengths]
        self.sequence_len_offset += 1

    def begin_step(self) -> None:
        """On the device: where each row's token goes, and where it may look."""
        self.enable_decode_mode()
        if self.has_cache:
            places_S = torch.arange(self.max_sequence_length, device=self.lengths_B.device)
            self.allowed_B11S = (places_S <= self.lengths_B[:, None])[:, None, None]

    def end_step(self) -> None:
        """On the device: every row has one token more."""
        self.lengths_B += 1
        self.allowed_B11S = None

    # ---- memory ----

    def reserve(self, needed: int) -> None:
        """A capacity of ``needed`` tokens at least."""
        assert needed <= self.limit, f"{needed} tokens, the limit is {self.limit}"
        capacity = self.max_sequence_length
        if needed <= capacity or (capacity and not self.has_cache):
            return
        wanted = max(needed, capacity + capacity // 4) if self.has_cache else 1
        self.max_sequence_length = _blocks(min(wanted, self.limit))
        self.growths += 1
        self.tables.clear()
        for held in self.key_value_memory_dict.values():
            if isinstance(held, KeyValueCache):
                held.grow(self.max_sequence_length)

    def write(self, layer: int, *x_TBGK: Tensor) -> tuple[Tensor, ...]:
        """Cache these of the tokens of this call. Returns what is cached of all tokens, ``[B, G, S, K]`` each."""
        held = self.key_value_memory_dict
        if layer not in held:
            held[layer] = KeyValueCache(self.max_batch_size, self.max_sequence_length, x_TBGK)
        cache: KeyValueCache = held[layer]
        if self.reading is not None:
            rows_TB, places_TB = self.reading.rows_TB, self.reading.positions_TB
        else:
            places_TB = self.lengths_B[None]
            rows_TB = torch.arange(self.max_batch_size, device=places_TB.device)[None]
        for kept, x in zip(cache.tensors, x_TBGK, strict=True):
            kept[rows_TB, :, places_TB] = x
        return cache.tensors

    @property
    def positions_TB(self) -> Tensor:
        """The place of each token of this call in its row."""
        return self.lengths_B[None] if self.reading is None else self.reading.positions_TB

    def hold(self, layer: int, table: Tensor) -> Tensor:
        """The table of rotary angles that a layer uses: the first one given, until the cache grows.

        Megatron keeps a few tables for all models and drops the oldest; a captured step must find its own again.
        """
        return self.tables.setdefault(layer, table)

    def mark(self) -> Mark:
        """The present place of every row; later calls do not change it."""
        held = self.key_value_memory_dict
        return Mark(
            list(self.lengths), {layer: _cloned(x) for layer, x in held.items() if isinstance(x, MixerState)}
        )

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark in the same text; keys that were cached after it are no longer looked at."""
        for layer, state in mark.states.items():
            self.keep(layer, state)
        self.set_lengths(mark.lengths)

    def keep(self, layer: int, state: MixerState) -> None:
        """Overwrite the state of a mixer in place, so that a captured step finds it."""
        before = self.key_value_memory_dict.get(layer)
        if before is None:
            self.key_value_memory_dict[layer] = _cloned(state)
            return
        for old, new in zip(state_tensors(before), state_tensors(state), strict=True):
            old.copy_(new)


def state_tensors(state: MixerState) -> list[Tensor]:
    """All tensors of a state, always in the same order."""
    beside = (getattr(state, field.name) for field in fields(state)[1:])
    return [*state.memory, *(x for x in beside if x is not None)]


def _cloned(state: MixerState) -> MixerState:
    """A copy: the state that a call returns may be a view into tensors of all its tokens."""
    beside = {field.name: getattr(state, field.name) for field in fields(state)[1:]}
    return MixerState(
        tuple(x.clone() for x in state.memory),
        **{name: None if x is None else x.clone() for name, x in beside.items()},
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
