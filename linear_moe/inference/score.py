"""Log-likelihoods of continuations: the scores of an evaluation, the same in any batch and under any padding.

    log p(continuation | context) = sum_t log softmax(logits after the token before t)[t]

Rows are laid end to end, so padding is not computed at all. What is left to depend on the batch is the shape of the
matrix products: a GEMM may add in another order when it has another number of rows. So every call has the same number
of tokens, the missing ones from a row that nobody looks at, and the output layer the same number of rows; a longer row
is read in pieces of that size, from its beginning, alone; and experts that run one after the other get whole tiles of
rows. Then a row's numbers are the same to the last bit at every batch size. The one product whose shape still follows
from the batch is the grouped GEMM of experts (bfloat16 on a GPU): its tiles have one size whatever an expert's share.

Letters: M tokens of a call, D hidden, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.inference.decoder import Decoder
from linear_moe.inference.load import LoadedModel

TOKENS_PER_CALL = {"cuda": 2048, "cpu": 256}
"""A call costs about as much with fewer."""
OUTPUT_ROWS = {"cuda": 256, "cpu": 16}
"""Tokens whose logits are in memory at once."""

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of the context, at least one, and of the continuation."""


@dataclass(frozen=True)
class Score:
    """What a model says to one continuation."""

    log_likelihoods: list[float]
    """Natural log of the probability of each token, after everything before it."""
    is_greedy: bool
    """Every token is the most probable one at its place."""

    @property
    def total(self) -> float:
        """Log-likelihood of the continuation."""
        return sum(self.log_likelihoods)


def score(
    loaded: LoadedModel,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    tokens_per_call: int | None = None,
) -> list[Score]:
    """Scores of ``requests``, in their order.

    Args:
        loaded: the model.
        requests: contexts and continuations of any lengths, as many as there are.
        batch_size: rows in a call, if so many have room in it.
        tokens_per_call: M, on which the last digits depend; None: as the device likes it.

    Raises:
        ValueError: an empty context, a token that is not in the vocabulary, or a row that is too long.
    """
    device = next(loaded.model.parameters()).device
    size = tokens_per_call or TOKENS_PER_CALL.get(device.type, 256)
    rows = [[*context, *continuation] for context, continuation in requests]
    _check(loaded, requests, batch_size, size)
    found: list[Score | None] = [None] * len(rows)
    for group in _groups([len(row) - 1 for row in rows], batch_size, size):
        parts = [(rows[i], len(requests[i][0])) for i in group]
        for i, result in zip(group, _score_rows(loaded, parts, size), strict=True):
            found[i] = result
    return [result for result in found if result is not None]


def score_padded(
    loaded: LoadedModel, tokens_BT: Tensor, is_token_BT: Tensor, *, tokens_per_call: int | None = None
) -> Tensor:
    """Log-likelihood of every token but the first of each row, ``[B, T]`` float64; 0 elsewhere.

    Args:
        loaded: the model.
        tokens_BT: int64, padded on any side, or in the middle.
        is_token_BT: bool, false where there is padding.
        tokens_per_call: see :func:`score`.
    """
    rows = [row[mask].tolist() for row, mask in zip(tokens_BT.cpu(), is_token_BT.cpu().bool(), strict=True)]
    known = [i for i, row in enumerate(rows) if len(row) > 1]
    scores = score(
        loaded,
        [(rows[i][:1], rows[i][1:]) for i in known],
        batch_size=len(rows),
        tokens_per_call=tokens_per_call,
    )
    out_BT = torch.zeros(tokens_BT.shape, dtype=torch.float64)
    for i, found in zip(known, scores, strict=True):
        places = is_token_BT[i].cpu().bool().nonzero().flatten()[1:]
        out_BT[i, places] = torch.tensor(found.log_likelihoods, dtype=torch.float64)
    return out_BT


def _groups(lengths: Sequence[int], batch_size: int, size: int) -> Iterator[list[int]]:
    """Rows that share a call, in order; one that is longer than a call is alone."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        if group and (len(group) == batch_size or sum(lengths[j] for j in group) + length > size):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _score_rows(loaded: LoadedModel, rows: Sequence[tuple[list[int], int]], size: int) -> list[Score]:
    """Of rows that have room in a call, or of one that is longer; ``(tokens, tokens of the context)`` each."""
    read = [torch.tensor(row[:-1], dtype=torch.int64) for row, _ in rows]
    longest = max(size, *map(len, read))
    decoder = Decoder(loaded.model, len(rows) + 1, longest + size)
    values: list[list[Tensor]] = [[] for _ in rows]
    for first in range(0, longest, size):
        parts = [tokens[first : first + size] for tokens in read]
        filling = torch.zeros(size - sum(map(len, parts)), dtype=torch.int64)
        wanted = []  # (row, token of the call in this row, token that follows)
        for i, (row, context) in enumerate(rows):
            wanted += [
                (i, t - first, row[t + 1]) for t in range(max(context - 1, first), first + len(parts[i]))
            ]
        found = decoder.call([*parts, filling], _head(wanted, loaded.vocab_size), packed=True).cpu()
        for (i, _, _), value in zip(wanted, found, strict=True):
            values[i].append(value)
    results = []
    for row_values in values:
        both = torch.stack(row_values) if row_values else torch.zeros(0, 2, dtype=torch.float64)
        results.append(Score(both[:, 0].tolist(), bool(both[:, 1].all())))
    return results


def _head(wanted: Sequence[tuple[int, int, int]], vocab_size: int) -> Callable[..., Tensor]:
    """``[wanted, 2]`` float64: the log-likelihood of each wanted token, and whether it is the most probable."""

    def head(hidden_MD: Tensor, places: list[Tensor], output: Callable[[Tensor], Tensor]) -> Tensor:
        device, found = hidden_MD.device, []
        rows = OUTPUT_ROWS.get(device.type, 16)
        for first in range(0, len(wanted), rows):
            part = wanted[first : first + rows]
            index = torch.zeros(rows, dtype=torch.int64)
            index[: len(part)] = torch.stack([places[i][t] for i, t, _ in part])
            logits_MV = output(hidden_MD[index.to(device)])[: len(part), :vocab_size]
            logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
            token_M1 = torch.tensor([[token] for _, _, token in part], device=device)
            value_M1 = logits_MV.log_softmax(-1).gather(1, token_M1).double()
            found.append(torch.cat([value_M1, logits_MV.argmax(-1, keepdim=True) == token_M1], dim=1))
        return torch.cat(found) if found else hidden_MD.new_zeros(0, 2)

    return head


def _check(loaded: LoadedModel, requests: Sequence[Request], batch_size: int, size: int) -> None:
    for name, value in (("batch_size", batch_size), ("tokens_per_call", size)):
        if value < 1:
            raise ValueError(f"{name} is {value}\n  why: it counts rows or tokens\n  try: {name}=16")
    for context, continuation in requests:
        if not len(context):
            raise ValueError(
                "a context has no tokens\n"
                "  why: the first token of a continuation is predicted from the one before it\n"
                "  try: the end-of-document token, after which training starts a new text"
            )
        wrong = [token for token in (*context, *continuation) if not 0 <= token < loaded.vocab_size]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} is not in the vocabulary\n"
                f"  why: the model has tokens 0 to {loaded.vocab_size - 1}\n"
                f"  try: the ids of the run's own tokenizer"
            )
        length, limit = len(context) + len(continuation), loaded.max_sequence_length
        if limit is not None and length > limit:
            raise ValueError(
                f"context and continuation have {length} tokens\n"
                f"  why: the limit is {limit}\n"
                f"  try: a context without its first {length - limit} tokens"
            )
