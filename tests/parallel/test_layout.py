"""The layout of sequences over context-parallel ranks, and what is passed between chunks, against loops over tokens."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from ranks import ThreadGroup, all_gather, on_ranks, start_all_gather

from linear_moe.kernels.segment import Segment
from linear_moe.parallel import halo, lasp2
from linear_moe.parallel.layout import SequenceLayout

LENGTH = 24  # divisible by 2 * R for R = 2, 3, 4
CASES = {
    "plain": None,
    # one document; boundaries on chunk edges of every R; inside chunks, with length 1; an empty one in the middle
    "packed": [[0, 24, 24, 24, 24], [0, 6, 12, 18, 24], [0, 1, 2, 13, 24], [0, 7, 7, 23, 24]],
}


def layouts(cp_size: int, packed: str) -> list[SequenceLayout]:
    rows = CASES[packed]
    cu_seqlens = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    return [SequenceLayout(4, LENGTH, cp_size, rank, cu_seqlens) for rank in range(cp_size)]


def documents(layout: SequenceLayout, b: int) -> list[range]:
    """The tokens of each document of sequence ``b``."""
    if layout.cu_seqlens is None:
        return [range(LENGTH)]
    return [range(*pair) for pair in itertools.pairwise(layout.cu_seqlens[b].tolist())]


def runs(layout: SequenceLayout) -> list[tuple[int, list[int], int]]:
    """Every run of the layout in order, by definition: (sequence, its positions, where its document starts)."""
    found = []
    for b in range(layout.batch):
        for c in layout.local_chunks:
            chunk = range(c * layout.chunk_length, (c + 1) * layout.chunk_length)
            for document in documents(layout, b):
                found.append((b, [t for t in document if t in chunk], document.start))
    return found


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_tokens_of_a_rank_are_megatrons(cp_size):
    x = torch.arange(4 * LENGTH).view(4, LENGTH, 1)
    for rank in range(cp_size):
        layout = SequenceLayout(4, LENGTH, cp_size, rank)
        # megatron.core.utils._get_batch_on_this_cp_rank_per_sequence_balancing, for cp_size > 1
        pieces = x.view(4, 2 * cp_size, -1, 1)
        zigzag = pieces[:, [rank, 2 * cp_size - rank - 1]].flatten(1, 2) if cp_size > 1 else x
        assert torch.equal(layout.take(x), zigzag)
        assert torch.equal(layout.take(x.mT, dim=2).mT, zigzag)
        assert torch.equal(layout.tokens(layout.runs(zigzag)), zigzag)


@pytest.mark.parametrize("packed", CASES)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_no_number_is_copied_from_the_host(monkeypatch, cp_size, packed):
    """A GPU would be waited for in every micro-batch."""
    found = layouts(cp_size, packed)
    monkeypatch.setattr(torch, "tensor", None)
    for rank, layout in enumerate(found):
        starts_J = layout.starts_of_chunks(torch.device("cpu"))
        assert starts_J.tolist() == [c * layout.chunk_length for c in layout.local_chunks]
        if cp_size > 1:
            lengths = halo.lengths_before(layout, torch.device("cpu"))
            assert len(lengths) == 4 * 2 * (len(CASES[packed][0]) - 1 if packed == "packed" else 1), rank
        if layout.is_packed:
            assert layout.run_cu_seqlens[-1] == 4 * layout.chunks_per_rank * layout.chunk_length


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_natural_order_undoes_the_cut(cp_size):
    x = torch.randn(4, LENGTH, 3)
    cut = [SequenceLayout(4, LENGTH, cp_size, rank) for rank in range(cp_size)]
    gathered = torch.stack([layout.take(x) for layout in cut])
    chunks_RBJ = gathered.unflatten(2, (cut[0].chunks_per_rank, cut[0].chunk_length))
    natural_CB = cut[0].natural_order(chunks_RBJ)
    assert torch.equal(natural_CB.movedim(0, 1).flatten(1, 2), x)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", CASES)
def test_runs_are_the_pieces_of_documents(cp_size, packed):
    position = torch.arange(LENGTH).expand(4, -1)
    for layout in layouts(cp_size, packed):
        rows = layout.runs(layout.take(position)[..., None])[..., 0]
        if layout.is_packed:
            pieces = [rows[0, slice(*pair)] for pair in itertools.pairwise(layout.run_cu_seqlens.tolist())]
            assert layout.run_cu_seqlens.dtype == torch.int32
        else:
            assert layout.run_cu_seqlens is None
            pieces = list(rows)
        assert [piece.tolist() for piece in pieces] == [positions for _, positions, _ in runs(layout)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_documents_of_tokens(cp_size):
    for layout in layouts(cp_size, "packed"):
        owner = [
            {t: n for n, document in enumerate(documents(layout, b)) for t in document} for b in range(4)
        ]
        for b, (ids, own) in enumerate(zip(layout.document_ids_BS, owner, strict=True)):
            assert all((ids[s] == ids[t]) == (own[s] == own[t]) for s in range(LENGTH) for t in range(LENGTH))
            for j, c in enumerate(layout.local_chunks):
                start = c * layout.chunk_length
                first, last = own[start], own[start + layout.chunk_length - 1]
                assert layout.starts_BJ[b, j] == start
                assert layout.first_document_BJ[b, j] == first
                assert layout.last_document_BJ[b, j] == last
                at = torch.full_like(layout.starts_BJ, first)
                assert layout.document_start(at)[b, j] == documents(layout, b)[first].start
    assert SequenceLayout(1, 8).document_ids_BS is None


@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_length_that_cannot_be_cut_is_refused(cp_size):
    with pytest.raises(ValueError, match=rf"why: .*\n  try: .*multiple of {2 * cp_size}$"):
        SequenceLayout(1, LENGTH - cp_size, cp_size)
    SequenceLayout(1, 7)


class Recurrence:
    """``S_t = A_t S_{t-1} + U_t`` over whole sequences: the truth, and segments of runs made token by token."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(len(kind))
        B, H, K, V = 4, 2, 3, 2
        self.update = torch.randn(B, LENGTH, H, K, V, dtype=torch.float64, requires_grad=True)
        shape = {"diagonal": (K, 1), "scalar": (1, 1), "none": (1, 1), "dense": (K, K)}[kind]
        self.rate = torch.randn(B, LENGTH, H, *shape, dtype=torch.float64).mul(0.4).requires_grad_()
        self.kind = kind

    def log_decay(self, b: int, positions: list[int]) -> torch.Tensor:
        return -self.rate[b, positions].square().sum(0)

    def segment(self, b: int, positions: list[int]) -> Segment:
        """What the tokens at ``positions`` do, as a batch of one; the identity where there are none."""
        H, K = self.update.shape[2:4]
        state = torch.zeros_like(self.update[0, 0])[None]
        dense = torch.eye(K, dtype=torch.float64).expand(1, H, K, K)
        for t in positions:
            if self.kind == "dense":
                state, dense = self.rate[b, t] @ state, self.rate[b, t] @ dense
            elif self.kind != "none":
                state = self.log_decay(b, [t]).exp() * state
            state = state + self.update[b, t]
        if self.kind == "dense":
            return Segment(state, decay=dense)
        return Segment(state, log_decay=None if self.kind == "none" else self.log_decay(b, positions)[None])

    def segments(self, layout: SequenceLayout) -> Segment:
        parts = [self.segment(b, positions) for b, positions, _ in runs(layout)]
        fields = {
            name: None if getattr(parts[0], name) is None else torch.cat([getattr(p, name) for p in parts])
            for name in ("state", "log_decay", "decay")
        }
        return Segment(**fields)

    def memory_before(self, b: int, positions: list[int], document_start: int) -> torch.Tensor:
        """The memory that a run starts from, by definition."""
        earlier = range(document_start, positions[0]) if positions else ()
        return self.segment(b, list(earlier)).state[0]


@pytest.mark.parametrize("kind", ["none", "scalar", "diagonal", "dense"])
@pytest.mark.parametrize("packed", CASES)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_lasp2_gives_every_run_the_memory_before_it(monkeypatch, cp_size, packed, kind):
    monkeypatch.setattr(lasp2, "start_all_gather", start_all_gather)
    recurrence = Recurrence(kind)
    two = SimpleNamespace(a=recurrence, b=Recurrence("scalar" if kind == "none" else "none"))
    cut = layouts(cp_size, packed)

    def rank(group: ThreadGroup) -> tuple:
        layout = cut[group.rank()]
        return tuple(lasp2.initial_states([two.a.segments(layout), two.b.segments(layout)], layout, group))

    results = on_ranks(cp_size, rank)
    found, expected = [], []
    for layout, states in zip(cut, results, strict=True):
        for truth, state in zip((two.a, two.b), states, strict=True):
            for (b, positions, start), before in zip(runs(layout), state, strict=True):
                found.append(before)
                expected.append(truth.memory_before(b, positions, start))
    found, expected = torch.stack(found), torch.stack(expected)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    leaves = [x for truth in (two.a, two.b) for x in (truth.update, truth.rate)]
    weight = torch.randn_like(found)
    grads = [
        torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True, retain_graph=True)
        for x in (found, expected)
    ]
    for got, true in zip(*grads, strict=True):
        if true is not None:
            torch.testing.assert_close(got, true, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("packed", CASES)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_halo_gives_every_run_the_tokens_before_it(monkeypatch, cp_size, packed, count):
    monkeypatch.setattr(halo, "all_gather", all_gather)
    x = torch.randn(4, LENGTH, 2, 3, dtype=torch.float64, requires_grad=True)
    cut = layouts(cp_size, packed)

    def rank(group: ThreadGroup) -> torch.Tensor:
        return halo.tokens_before(cut[group.rank()].take(x), count, cut[group.rank()], group)

    found, expected = [], []
    for layout, rows in zip(cut, on_ranks(cp_size, rank), strict=True):
        for (b, positions, start), before in zip(runs(layout), rows, strict=True):
            found.append(before)
            first = positions[0] if positions else start
            expected.append(
                torch.stack(
                    [
                        x[b, t] if t >= start else torch.zeros_like(x[b, 0])
                        for t in range(first - count, first)
                    ]
                )
            )
    found, expected = torch.stack(found), torch.stack(expected)
    assert torch.equal(found, expected)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("packed", CASES)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_how_much_of_its_document_comes_before_a_run(cp_size, packed):
    for layout in layouts(cp_size, packed):
        expected = [positions[0] - start if positions else 0 for _, positions, start in runs(layout)]
        assert halo.lengths_before(layout, torch.device("cpu")).tolist() == expected


def test_a_halo_longer_than_a_chunk_is_refused():
    layout = SequenceLayout(1, 8, 4, 0)
    with pytest.raises(ValueError, match=r"why: .*neighbour"):
        halo.tokens_before(torch.zeros(1, 2, 1), 2 + 1, layout, None)
