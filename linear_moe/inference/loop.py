"""The loop of generation on the device: read a token, choose the next, note it, again; the host looks now and then.

A step is one function without any waiting, over tensors that stay where they are. On a GPU it is captured as one CUDA
graph, sampling included, and replayed: the host starts one graph per token instead of a thousand kernels. When the
cache of keys has moved to grow, the next step runs as it is (it is also the warm-up that a capture wants) and the one
after it is captured anew. On a CPU every step runs as it is.

Letters: B rows, T most steps, V tokens of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from linear_moe.inference.decoder import Decoder
from linear_moe.inference.experts import waits_for_host
from linear_moe.inference.sampling import Sampling, draws

NONE = -1
"""In the notes: the row had ended."""


class Loop:
    """Steps of generation after a prompt has been read.

    Args:
        decoder: has read the prompts.
        sampling: how tokens are chosen.
        seeds: B, of the draws.
        ends: tokens that end a row.
        steps: T.
        vocab_size: V.
        graph: capture steps as a CUDA graph; None: wherever that can be done.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        ends: Sequence[int],
        steps: int,
        vocab_size: int,
        graph: bool | None = None,
    ) -> None:
        device, batch = decoder.device, decoder.batch_size
        self.decoder, self.sampling, self.vocab_size = decoder, sampling, vocab_size
        self.why_no_graph = _why_no_graph(decoder, graph)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.growths = -1  # of the cache when the last step ran as it is
        self.uniform_TB = draws(seeds, steps, device) if sampling.temperature else None
        self.ends_E = torch.tensor(list(ends), dtype=torch.int64, device=device)
        self.token_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.has_ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.notes_TB = torch.full((steps, batch), NONE, dtype=torch.int64, device=device)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self, logits_BV: Tensor) -> None:
        """The first token, from what the prompts' reading gave."""
        self._choose(logits_BV)

    def next(self) -> None:
        """One token more of every row."""
        self.decoder.context.prepare_step()
        if self.graph is not None and self.growths == self.decoder.context.growths:
            self.graph.replay()
        elif self.why_no_graph is not None:
            self._advance()
        elif self.growths != self.decoder.context.growths:
            self.graph = None  # its memory first
            self._advance_aside()
            self.growths = self.decoder.context.growths
        else:
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may ask for events meanwhile (NCCL's).
            aside = _aside(self.decoder.device)
            with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                self._advance()
            self.graph.replay()

    def noted(self, first: int, end: int) -> list[list[int | None]]:
        """Tokens of steps ``first`` to ``end``, None for rows that had ended; waits for the device."""
        rows = self.notes_TB[first:end].tolist()
        return [[None if token == NONE else token for token in row] for row in rows]

    def _advance(self) -> None:
        self._choose(self.decoder.advance(self.token_B))

    def _advance_aside(self) -> None:
        """A step on the stream of the capture, which leaves nothing to be set up there."""
        stream, current = _aside(self.decoder.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._advance()
        current.wait_stream(stream)

    def _choose(self, logits_BV: Tensor) -> None:
        uniform_B = logits_BV if self.uniform_TB is None else self.uniform_TB.index_select(0, self.step_1)[0]
        token_B = self.sampling.choose(logits_BV[:, : self.vocab_size], uniform_B)
        if self.ends_E.numel():
            self.has_ended_B |= (token_B[:, None] == self.ends_E).any(1)
        # An ended row goes on unseen, from tokens that are as good as any: its share of a step costs nothing extra.
        self.token_B.copy_(token_B)
        self.notes_TB.index_copy_(0, self.step_1, token_B.masked_fill(self.has_ended_B, NONE)[None])
        self.step_1 += 1


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The same for every loop: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it has run on."""
    return torch.cuda.Stream(device)


def _why_no_graph(decoder: Decoder, graph: bool | None) -> str | None:
    """Why steps are not captured; None: they are.

    Raises:
        ValueError: a graph is demanded where none can be.
    """
    if decoder.device.type != "cuda":
        reason: str | None = "the model is on a CPU"
    else:
        reason = waits_for_host(decoder.model)
    if graph and reason is not None:
        raise ValueError(
            f"a step cannot be captured as a CUDA graph\n"
            f"  why: {reason}\n"
            f"  try: without it (the same tokens), or the model in bfloat16 on a GPU"
        )
    if graph is None and reason is not None and decoder.device.type == "cuda":
        warnings.warn(
            f"decoding without a CUDA graph, several times slower at small batches: {reason}", stacklevel=3
        )
    return "nobody wants one" if graph is False else reason
