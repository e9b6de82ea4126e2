"""Continue prompts: read them once, then one token at a time on a state that does not grow with the text.

Letters: B prompts, T tokens of a prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from linear_moe.inference.decoder import PREFILL_CHUNK, Decoder, MemorySize
from linear_moe.inference.load import LoadedModel
from linear_moe.inference.sampling import Sampling


class Generation:
    """The continuation of prompts as it comes: iterate over it once, one step at a time.

    Each step is a list of B token ids, None for a sequence that has ended; it ends when all have, or after
    ``max_new_tokens`` steps. The token ``eos`` ends a sequence and is not part of it.

    Args:
        loaded: the model.
        prompts: B lists of token ids, all of one length, at least one token each.
        max_new_tokens: most steps.
        temperature, top_k, top_p: see :class:`~linear_moe.inference.sampling.Sampling`; greedy by default.
        seed: of the draws.
        eos: token that ends a sequence; None: none does.
        prefill_chunk: tokens of the prompts read at once.

    Raises:
        ValueError: prompts that are empty, of unequal length, too long, or not of the vocabulary; impossible options.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        _check(loaded, prompts, max_new_tokens)
        self.sampling = Sampling(temperature, top_k, top_p)
        self.max_new_tokens, self.eos, self.prefill_chunk = max_new_tokens, eos, prefill_chunk
        self.vocab_size = loaded.vocab_size
        device = next(loaded.model.parameters()).device
        self.prompts_BT = torch.tensor(prompts, dtype=torch.int64, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.decoder = Decoder(loaded.model, len(prompts), self.prompts_BT.shape[1] + max_new_tokens)

    def __iter__(self) -> Iterator[list[int | None]]:
        assert self.decoder.length == 0, "a generation is read once"
        tokens_BT = self.prompts_BT
        ended_B = [False] * len(tokens_BT)
        for _ in range(self.max_new_tokens):
            logits_BV = self.decoder.feed(tokens_BT, self.prefill_chunk)[:, : self.vocab_size]
            next_B = self.sampling.choose(logits_BV, self.generator)
            tokens_BT = next_B[:, None]  # an ended sequence goes on unseen: its row costs nothing extra
            step = next_B.tolist()
            ended_B = [ended or token == self.eos for ended, token in zip(ended_B, step, strict=True)]
            if all(ended_B):
                return
            yield [None if ended else token for ended, token in zip(ended_B, step, strict=True)]

    def memory_size(self) -> MemorySize:
        """Bytes of recurrent state and of keys and values that are held for all prompts now."""
        return self.decoder.memory_size()


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | None = None,
) -> list[list[int]]:
    """The continuations of ``prompts``, without the prompts and without ``eos``; arguments of :class:`Generation`."""
    if not prompts:
        return []
    steps = Generation(
        loaded,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=eos,
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for output, token in zip(outputs, step, strict=True):
            if token is not None:
                output.append(token)
    return outputs


def _check(loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    lengths = sorted({len(prompt) for prompt in prompts})
    if not lengths or lengths[0] == 0:
        raise ValueError(
            "a prompt has no tokens\n"
            "  why: the first new token is predicted from the one before it\n"
            "  try: the end-of-document token, after which training starts a new text"
        )
    if len(lengths) > 1:
        raise ValueError(
            f"prompts of one batch have {lengths[0]} to {lengths[-1]} tokens\n"
            f"  why: unequal lengths need left padding, which comes with evaluation (issue 6)\n"
            f"  try: prompts of one length, or one prompt per call"
        )
    wrong = {token for prompt in prompts for token in prompt if not 0 <= token < loaded.vocab_size}
    if wrong:
        raise ValueError(
            f"token {min(wrong)} is not in the vocabulary\n"
            f"  why: the model has tokens 0 to {loaded.vocab_size - 1}\n"
            f"  try: the ids of the run's own tokenizer"
        )
    longest = lengths[0] + max_new_tokens
    if max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}\n  why: it counts tokens\n  try: max_new_tokens=100"
        )
    if loaded.max_sequence_length is not None and longest > loaded.max_sequence_length:
        raise ValueError(
            f"prompt and continuation reach {longest} tokens\n"
            f"  why: the limit is {loaded.max_sequence_length}\n"
            f"  try: max_new_tokens={max(loaded.max_sequence_length - lengths[0], 0)}, or a shorter prompt"
        )
