"""Shared and global memory of one program, with what a GPU does not say: races, reads too early, bounds.

Threads go through the PTX in lockstep, so that a barrier that is missing never shows in a result. Instead every word
remembers who touched it since which barrier: two threads meet without one, or memory is touched while an asynchronous
copy or product still uses it, and a hazard is noted.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from emulator.numbers import UNSIGNED, Array

SEVERAL = -2
"""Threads that read one word."""


class IllegalAccess(Exception):
    """The program would end with an error."""


class Shared:
    """``size`` bytes, at first not a number."""

    def __init__(self, size: int, hazards: set[str]) -> None:
        self.bytes, self.size, self.hazards = np.full(size + 16, 0xFF, np.uint8), size, hazards
        num_words = size // 4 + 8
        fresh = lambda: np.full(num_words, -1, np.int64)  # noqa: E731
        self._write, self._writer, self._write_in_warp = fresh(), fresh(), fresh()
        self._read, self._reader, self._read_in_warp = fresh(), fresh(), fresh()
        self.is_unfenced = np.zeros(num_words, bool)
        """Written by ordinary stores, which an asynchronous product sees after a fence only."""
        self.is_copied_to, self.is_multiplied = np.zeros(num_words, bool), np.zeros(num_words, bool)
        """An asynchronous copy, or product, is under way."""
        self.barrier = self.barrier_of_warp = 0

    def view(self, size: int) -> Array:
        """As numbers of ``size`` bytes."""
        return self.bytes[: self.bytes.size // size * size].view(UNSIGNED[size])

    def words(self, addresses: Array, size: int) -> Array:
        """``[N, words]`` of ``size`` bytes each."""
        addresses = addresses.astype(np.int64)
        if addresses.min() < 0 or addresses.max() + size > self.size:
            raise IllegalAccess(f"shared memory at {addresses.max()} of {self.size}")
        return (addresses[:, None] >> 2) + np.arange(max(1, size // 4))

    def reads(self, addresses: Array, size: int, threads: Array, where: str) -> None:
        """Notes it, and what is wrong with it."""
        words, threads = self.words(addresses, size), threads[:, None]
        if self._meets(words, threads, self._write, self._writer, self._write_in_warp).any():
            self.hazards.add(f"read after write of another thread without barrier: {where}")
        if self.is_copied_to[words].any():
            self.hazards.add(f"read before the asynchronous copy is waited for: {where}")
        is_read = (self._read[words] == self.barrier) & (self._reader[words] != threads)
        self._reader[words] = np.where(is_read, SEVERAL, threads)
        self._read[words], self._read_in_warp[words] = self.barrier, self.barrier_of_warp

    def writes(
        self, addresses: Array, size: int, threads: Array, where: str, *, is_copy: bool = False
    ) -> None:
        """The same; halves of a word are two writes of it and are not looked at."""
        words, threads = self.words(addresses, size), threads[:, None]
        if size >= 4 and self._meets(words, threads, self._write, self._writer, self._write_in_warp).any():
            self.hazards.add(f"write after write of another thread without barrier: {where}")
        if self._meets(words, threads, self._read, self._reader, self._read_in_warp).any():
            self.hazards.add(f"write after read of another thread without barrier: {where}")
        if self.is_multiplied[words].any():
            self.hazards.add(f"write while an asynchronous product reads: {where}")
        self.written(words, threads)
        self.is_unfenced[words] = not is_copy
        self.is_copied_to[words] = is_copy

    def written(self, words: Array, threads: Array) -> None:
        """Notes who wrote last."""
        self._write[words], self._writer[words] = self.barrier, threads
        self._write_in_warp[words] = self.barrier_of_warp

    def multiplies(self, words: Array, where: str) -> None:
        """An asynchronous product begins to read."""
        if self.is_unfenced[words].any():
            self.hazards.add(f"product reads ordinary stores without a fence: {where}")
        if self.is_copied_to[words].any():
            self.hazards.add(f"product reads before the asynchronous copy is waited for: {where}")
        if (self._write[words] == self.barrier).any():
            self.hazards.add(f"product reads stores without a barrier: {where}")
        self._read[words], self._reader[words] = self.barrier, SEVERAL
        self.is_multiplied[words] = True

    def _meets(self, words: Array, threads: Array, when: Array, who: Array, in_warp: Array) -> Array:
        """Whether another thread was there since the last barrier of both."""
        is_new = (when[words] == self.barrier) & (who[words] != threads)
        in_order = (
            (who[words] // 32 == threads // 32) & (in_warp[words] < self.barrier_of_warp) & (who[words] >= 0)
        )
        return is_new & ~in_order


class Global:
    """The storages of all tensors that a kernel is given, for all of its programs."""

    def __init__(self, tensors: list[Any], hazards: set[str]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._starts = np.array(sorted(start for start, size in storages.items() if size), np.uint64)
        sizes = [storages[int(start)] for start in self._starts]
        self._ends = self._starts + np.array(sizes, np.uint64)
        self._bytes = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(int(start)), np.uint8)
            for start, size in zip(self._starts, sizes)
        ]
        fresh = lambda: [np.full((size + 1) // 2, -1, np.int64) for size in sizes]  # noqa: E731
        self._writing_program, self._reading_program, self._write, self._writer = (
            fresh(),
            fresh(),
            fresh(),
            fresh(),
        )
        self._hazards, self.program = hazards, -1

    def begin(self) -> None:
        """The next program."""
        self.program += 1
        for when in self._write:
            when[:] = -1

    def access(
        self,
        addresses: Array,
        size: int,
        threads: Array,
        barrier: int,
        where: str,
        write: Array | None = None,
    ) -> Array:
        """Read, or write, ``size`` bytes for each of ``threads``: ``[N, words]`` of at most 4 bytes."""
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        if (which < 0).any() or (addresses + np.uint64(size) > self._ends[which]).any():
            raise IllegalAccess(f"no tensor's memory: {where}")
        if (addresses % np.uint64(size)).any():
            raise IllegalAccess(f"misaligned by {size}: {where}")
        element = min(size, 4)
        found = np.zeros((addresses.size, size // element), UNSIGNED[element])
        for storage in np.unique(which):
            chosen = which == storage
            offsets = (addresses[chosen] - self._starts[storage]).astype(np.int64)[:, None]
            view = self._bytes[storage][: self._bytes[storage].size // element * element].view(
                UNSIGNED[element]
            )
            places = offsets // element + np.arange(size // element)
            spans = offsets // 2 + np.arange(max(1, size // 2))
            self._note(int(storage), spans, threads[chosen][:, None], barrier, where, write is not None)
            if write is None:
                found[chosen] = view[places]
            else:
                view[places] = write[chosen].reshape(places.shape)
        return found

    def _note(
        self, storage: int, spans: Array, threads: Array, barrier: int, where: str, is_write: bool
    ) -> None:
        """Who was there, in units of two bytes, and whether that is wrong."""
        writing, reading = self._writing_program[storage], self._reading_program[storage]
        when, who = self._write[storage], self._writer[storage]
        word = "written" if is_write else "read"
        if ((writing[spans] >= 0) & (writing[spans] != self.program)).any():
            self._hazards.add(f"{word} after another program's write: {where}")
        if ((writing[spans] == self.program) & (when[spans] == barrier) & (who[spans] != threads)).any():
            self._hazards.add(
                f"{word} after another thread's write to global memory without barrier: {where}"
            )
        if not is_write:
            several = (reading[spans] >= 0) & (reading[spans] != self.program)
            reading[spans] = np.where(several, 1 << 40, self.program)
            return
        if ((reading[spans] >= 0) & (reading[spans] != self.program)).any():
            self._hazards.add(f"written after another program's read: {where}")
        writing[spans], when[spans], who[spans] = self.program, barrier, threads
