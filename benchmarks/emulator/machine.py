"""One program: its threads, in lockstep, and the instructions that are more than arithmetic."""

from __future__ import annotations

import numpy as np

from emulator import products
from emulator.memory import Global, IllegalAccess, Shared
from emulator.numbers import UNSIGNED, Array, as_type

Registers = list[Array]


class Machine:
    """``grid`` programs, of which this is the one at ``place``."""

    def __init__(
        self,
        num_threads: int,
        shared: Shared,
        memory: Global,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
    ) -> None:
        self.shared, self.memory, self.place, self.grid = shared, memory, place, grid
        self.num_threads = num_threads
        self.threads = np.arange(num_threads)
        self.thread = self.threads.astype(np.uint32)
        self._copies: list[tuple[Array, Array, Array]] = []
        self._copy_groups: list[list[tuple[Array, Array, Array]]] = []
        self._products: list[Array] = []
        self._product_groups: list[list[Array]] = []

    def of_threads(self, x: Array) -> Array:
        """One number for each thread."""
        return np.broadcast_to(np.asarray(x), (self.num_threads,))

    def of_warps(self, x: Array) -> Array:
        """The same, ``[warps, 32]``."""
        return self.of_threads(x).reshape(-1, 32)

    def is_taken(self, condition: Array) -> bool:
        """A branch; all threads go the same way."""
        condition = np.asarray(condition)
        if condition.all() != condition.any():
            raise NotImplementedError("threads part ways")
        return bool(condition.all())

    def load(
        self, space: str, address: Array, element: int, count: int, where: str, active: Array = True
    ) -> Registers:
        """``count`` registers of ``element`` bytes; zeros in threads that are not active."""
        chosen = self.of_threads(active)
        found = np.zeros((self.num_threads, count), UNSIGNED[element])
        if chosen.any():
            addresses, threads = self.of_threads(address)[chosen], self.threads[chosen]
            size = element * count
            if space == "shared":
                self._check_alignment(addresses, size, where)
                self.shared.reads(addresses, size, threads, where)
                places = addresses.astype(np.int64)[:, None] // element + np.arange(count)
                found[chosen] = self.shared.view(element)[places]
            else:
                read = self.memory.access(addresses, size, threads, self.shared.barrier, where)
                found[chosen] = read.view(UNSIGNED[element])
        return [found[:, n].copy() for n in range(count)]

    def store(
        self, space: str, address: Array, element: int, values: Registers, where: str, active: Array = True
    ) -> None:
        """The inverse."""
        chosen = self.of_threads(active)
        if not chosen.any():
            return
        addresses, threads = self.of_threads(address)[chosen], self.threads[chosen]
        bits = np.stack([self.of_threads(x)[chosen] for x in values], 1).astype(UNSIGNED[element])
        size = element * len(values)
        if space == "shared":
            self._check_alignment(addresses, size, where)
            self.shared.writes(addresses, size, threads, where)
            places = addresses.astype(np.int64)[:, None] // element + np.arange(len(values))
            self.shared.view(element)[places] = bits
        else:
            words = np.ascontiguousarray(bits).view(UNSIGNED[min(size, 4)])
            self.memory.access(addresses, size, threads, self.shared.barrier, where, words)

    def copy(
        self, target: Array, source: Array, size: int, taken: Array, where: str, active: Array = True
    ) -> None:
        """cp.async: ``taken`` bytes, all or none, and zeros; they arrive when they are waited for."""
        chosen, targets = self.of_threads(active), self.of_threads(target)
        if not chosen.any():
            return
        words = np.zeros((self.num_threads, size // 4), np.uint32)
        reads = chosen & (self.of_threads(taken) > 0)
        if reads.any():
            addresses = self.of_threads(source)[reads]
            words[reads] = self.memory.access(
                addresses, size, self.threads[reads], self.shared.barrier, where
            )
        self.shared.writes(targets[chosen], size, self.threads[chosen], where, is_copy=True)
        places = self.shared.words(targets[chosen], size)
        self._copies.append((places, words[chosen], self.threads[chosen][:, None]))

    def commit_copies(self) -> None:
        """They can be waited for together."""
        self._copy_groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, left: int) -> None:
        """All but the last ``left`` groups."""
        while len(self._copy_groups) > left:
            for places, words, threads in self._copy_groups.pop(0):
                self.shared.view(4)[places] = words
                self.shared.is_copied_to[places] = False
                self.shared.written(places, threads)

    def shuffle(self, mode: str, x: Array, by: Array) -> Array:
        """A register of another lane of the warp."""
        lanes = np.arange(32)
        if mode == "idx":
            return np.take_along_axis(self.of_warps(x), self.of_warps(by).astype(np.int64) & 31, 1).reshape(
                -1
            )
        by = int(np.asarray(by).flat[0])
        source = {"bfly": lanes ^ by, "up": lanes - by, "down": lanes + by}[mode]
        source = np.where((source >= 0) & (source < 32), source, lanes)
        return self.of_warps(x)[:, source].reshape(-1)

    def reduce(self, how: str, x: Array) -> Array:
        """Over a warp, for all of its lanes."""
        ufunc = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
        }[how]
        x = self.of_warps(x)
        return np.repeat(ufunc.reduce(x, axis=1, dtype=x.dtype), 32).view(np.uint32)

    def load_matrices(self, count: int, transposed: bool, address: Array, where: str) -> Registers:
        """ldmatrix."""
        rows, lanes = self._rows(address, count)
        self.shared.reads(rows.reshape(-1), 16, lanes, where)
        tiles = self.shared.view(2)[rows[..., None] // 2 + np.arange(8)].reshape(-1, count, 8, 8)
        return [x.reshape(-1) for x in products.matrices_to_lanes(tiles, transposed)]

    def store_matrices(self, transposed: bool, address: Array, values: Registers, where: str) -> None:
        """stmatrix."""
        rows, lanes = self._rows(address, len(values))
        self.shared.writes(rows.reshape(-1), 16, lanes, where)
        tiles = products.lanes_to_matrices([self.of_warps(x) for x in values], transposed)
        self.shared.view(2)[rows[..., None] // 2 + np.arange(8)] = tiles.reshape(*rows.shape, 8)

    def multiply(self, depth: int, kind: str, a: Registers, b: Registers, c: Registers) -> Registers:
        """mma.sync."""
        of_warps = ([self.of_warps(x) for x in factor] for factor in (a, b, c))
        return [x.reshape(-1) for x in products.mma(depth, kind, *of_warps)]

    def multiply_async(
        self,
        kind: str,
        total: Registers,
        a: Array | Registers,
        b: Array,
        adds: Array,
        transposed: tuple[bool, bool],
        where: str,
    ) -> Registers:
        """wgmma, computed at once; what it reads counts as being read until it is waited for."""
        columns = 2 * len(total)
        result = [np.array(self.of_threads(x)).astype(np.uint32) for x in total]
        keeps = self.of_threads(adds).astype(bool)
        for first in range(0, self.num_threads, 128):
            of_group = slice(first, first + 128)
            right = self._factor(self.of_threads(b)[of_group], columns, transposed[1], kind, where)
            if isinstance(a, list):
                left = products.of_registers([self.of_threads(x)[of_group] for x in a], kind)
            else:
                left = self._factor(self.of_threads(a)[of_group], 64, transposed[0], kind, where)
            product = left @ right.T
            for n, register in enumerate(result):
                row, column = products.places_of_64_rows()[n % 4]
                old = np.where(keeps[of_group], register[of_group].view(np.float32), np.float32(0))
                register[of_group] = (
                    (old + product[row, column + 8 * (n // 4)]).astype(np.float32).view(np.uint32)
                )
        return result

    def commit_products(self) -> None:
        """They can be waited for together."""
        self._product_groups.append(self._products)
        self._products = []

    def wait_for_products(self, left: int) -> None:
        """All but the last ``left`` groups."""
        self._product_groups = self._product_groups[max(0, len(self._product_groups) - left) :]
        self.shared.is_multiplied[:] = False
        for words in (words for group in (*self._product_groups, self._products) for words in group):
            self.shared.is_multiplied[words] = True

    def _factor(self, descriptors: Array, rows: int, transposed: bool, kind: str, where: str) -> Array:
        addresses = products.described(int(descriptors[0]), rows, transposed)
        if (
            (descriptors != descriptors[0]).any()
            or addresses.min() < 0
            or addresses.max() + 2 > self.shared.size
        ):
            raise IllegalAccess(f"a product's factor: {where}")
        words = np.unique(addresses >> 2)
        self.shared.multiplies(words, where)
        self._products.append(words)
        if kind == "tf32":
            assert not transposed
            return products.as_tf32(self.shared.view(4)[addresses[:, ::2] >> 2])
        return as_type(self.shared.view(2)[addresses >> 1], kind)

    def _rows(self, address: Array, count: int) -> tuple[Array, Array]:
        """Addresses ``[warps, 8 count]``, and the lanes that give them."""
        rows = self.of_warps(address)[:, : 8 * count].astype(np.int64)
        self._check_alignment(rows, 16, "matrices")
        return rows, self.threads.reshape(-1, 32)[:, : 8 * count].reshape(-1)

    @staticmethod
    def _check_alignment(addresses: Array, size: int, where: str) -> None:
        if (addresses % size).any():
            raise IllegalAccess(f"shared memory, misaligned by {size}: {where}")
