"""Continue prompts: read them once, then one token at a time on a state that does not grow with the text.

Prompts of one batch may differ in length, and what a row gives does not depend on the others: not on their number,
their length, their draws or their end.

Letters: B prompts, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from linear_moe.inference.conversation import Conversation
from linear_moe.inference.decoder import Decoder, MemorySize
from linear_moe.inference.load import LoadedModel
from linear_moe.inference.loop import Loop
from linear_moe.inference.sampling import Sampling

LOOK_EVERY = 8
"""On a GPU, tokens between two looks of the host at what has been written: a look waits for the device."""


class Generation:
    """The continuation of prompts as it comes: iterate over it once, one step at a time.

    Each step is a list of B token ids, None for a sequence that has ended; it ends when all have, or after
    ``max_new_tokens`` steps. A token of ``eos`` ends a sequence and is not part of it.

    Args:
        loaded: the model.
        prompts: B lists of token ids of any lengths, at least one token each.
        max_new_tokens: most steps.
        temperature, top_k, top_p: see :class:`~linear_moe.inference.sampling.Sampling`; greedy by default.
        seed: of the draws: of each row, or of the first one, those after it get the next numbers.
        eos: token or tokens that end a sequence; None: none does.
        prefill_chunk: tokens of all prompts read at once; None: as many as the device likes.
        look_every: steps between two looks at the tokens; None: as the device likes it.
        graph: capture steps as a CUDA graph; None: wherever that can be done.
        conversation: what the one prompt goes on from, as far as it extends it; the next one may go on from this.

    Raises:
        ValueError: prompts that are empty, too long, or not of the vocabulary; impossible options.
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
        seed: int | Sequence[int] = 0,
        eos: int | Sequence[int] | None = None,
        prefill_chunk: int | None = None,
        look_every: int | None = None,
        graph: bool | None = None,
        conversation: Conversation | None = None,
    ) -> None:
        _check(loaded, prompts, max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        self.prompts, self.max_new_tokens, self.prefill_chunk = prompts, max_new_tokens, prefill_chunk
        longest = max(map(len, prompts)) + max_new_tokens
        self.conversation, kept = conversation, 0
        if conversation is None:
            self.decoder = Decoder(loaded.model, len(prompts), longest)
        else:
            assert len(prompts) == 1, "a conversation is one text"
            self.decoder = conversation.decoder_of(loaded.model, prompts[0], longest)
            kept = conversation.num_kept
        self.unread = [prompt[kept:] for prompt in prompts]
        self.look_every = look_every or (LOOK_EVERY if self.decoder.device.type == "cuda" else 1)
        self.loop = Loop(
            self.decoder,
            sampling,
            seeds=_seeds(seed, len(prompts)),
            ends=() if eos is None else (eos,) if isinstance(eos, int) else eos,
            steps=max_new_tokens,
            vocab_size=loaded.vocab_size,
            graph=graph,
        )

    def __iter__(self) -> Iterator[list[int | None]]:
        assert self.unread, "a generation is read once"
        if self.max_new_tokens == 0:
            return
        self.loop.start(self.decoder.read(self.unread, self.prefill_chunk))
        self.unread = []
        if self.conversation is not None:
            self.conversation.begin(self.prompts[0])
        done, ran, text = 0, 1, list(self.prompts[0])
        while done < self.max_new_tokens:
            for _ in range(min(done + self.look_every, self.max_new_tokens) - ran):
                self.loop.next()
                ran += 1
            for step in self.loop.noted(done, ran):
                if all(token is None for token in step):
                    return
                text += [token for token in step[:1] if token is not None]
                yield step
            done = ran
            if done < self.max_new_tokens:
                self.loop.next()
                ran += 1
                if self.conversation is not None:
                    self.conversation.note(text)

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
    seed: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
    graph: bool | None = None,
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
        graph=graph,
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for output, token in zip(outputs, step, strict=True):
            if token is not None:
                output.append(token)
    return outputs


def _seeds(seed: int | Sequence[int], rows: int) -> Sequence[int]:
    if isinstance(seed, int):
        return range(seed, seed + rows)
    if len(seed) != rows:
        raise ValueError(
            f"{len(seed)} seeds for {rows} prompts\n"
            f"  why: every prompt draws by its own\n"
            f"  try: one number, the seed of the first prompt, or one for each"
        )
    return seed


def _check(loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            "a prompt has no tokens\n"
            "  why: the first new token is predicted from the one before it\n"
            "  try: the end-of-document token, after which training starts a new text"
        )
    wrong = {token for prompt in prompts for token in prompt if not 0 <= token < loaded.vocab_size}
    if wrong:
        raise ValueError(
            f"token {min(wrong)} is not in the vocabulary\n"
            f"  why: the model has tokens 0 to {loaded.vocab_size - 1}\n"
            f"  try: the ids of the run's own tokenizer"
        )
    longest = max(lengths) + max_new_tokens
    if max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}\n  why: it counts tokens\n  try: max_new_tokens=100"
        )
    if loaded.max_sequence_length is not None and longest > loaded.max_sequence_length:
        raise ValueError(
            f"prompt and continuation reach {longest} tokens\n"
            f"  why: the limit is {loaded.max_sequence_length}\n"
            f"  try: max_new_tokens={max(loaded.max_sequence_length - max(lengths), 0)}, or a shorter prompt"
        )
