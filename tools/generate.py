"""Continue prompts with the model of a run: python tools/generate.py --load runs/demo --prompt "import os" """

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from linear_moe.inference.quiet import no_messages, no_output

# Read when torch and transformers are imported: no chatter from C++, no question to a network.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    args = parse()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    is_first, is_guest = os.environ.get("RANK", "0") == "0", has_process_group()
    with no_messages():
        try:
            texts = read_prompts(args)
            with no_output():
                from linear_moe.inference.load import load_model

                loaded = load_model(args.load, step=args.step, tokenizer=args.tokenizer)
            session = Session(args, loaded, write if is_first else lambda text: None)
            if args.chat and not texts:
                session.converse(read_lines(is_first))
            elif len(texts) == 1 and args.output is None:
                session.stream(texts[0])
            else:
                session.batches(texts)
        except KeyboardInterrupt:
            return 130
        except ValueError as error:
            if is_first:
                print(f"linear_moe: {error}", file=sys.stderr)
            elif not is_guest:
                time.sleep(
                    2
                )  # torchrun ends all processes once the first has ended: that one may still speak
            return 2
        finally:
            if has_process_group() and not is_guest:
                sys.modules["torch.distributed"].destroy_process_group()
    return 0


class Session:
    """A loaded model that answers, and where its text goes."""

    def __init__(self, args: argparse.Namespace, loaded: Any, write: Callable[[str], None]) -> None:
        self.args, self.loaded, self.write, self.chat = args, loaded, write, None
        self.said: set[str] = set()
        if loaded.warning:
            self.say_once(loaded.warning)
        if args.chat:
            from linear_moe.inference.chat import ChatTemplate

            self.chat = ChatTemplate(loaded.tokenizer, read_template(args.chat_template))
        ends = self.chat.ends() if self.chat else [loaded.tokenizer.eod]
        drawing = {"--top-k": args.top_k, "--top-p": args.top_p < 1, "--seed": args.seed}
        if args.temperature == 0 and (idle := [flag for flag, is_given in drawing.items() if is_given]):
            self.say_once(
                f"--temperature 0, the default, draws nothing, whatever {' and '.join(idle)} may be"
            )
        self.options = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "eos": None if args.ignore_eos else ends,
        }

    def tokens(self, text: str) -> list[int]:
        """Tokens of a prompt; of an empty one, the end of the document before it."""
        if self.chat:
            return self.chat.prompt([*self.opening(), {"role": "user", "content": text}])
        tokenizer = self.loaded.tokenizer
        try:
            return (tokenizer.tokenize(text) if text else []) or [tokenizer.eod]
        except ValueError:
            raise ValueError(
                f"the prompt {text!r} is not a row of numbers\n"
                f"  why: the run has no tokenizer, so its tokens are numbers\n"
                f"  try: --prompt '1 2 3', or --tokenizer <folder of the tokenizer that wrote its data>"
            ) from None

    def opening(self) -> list[dict[str, str]]:
        """What stands before the first question."""
        return [{"role": "system", "content": self.args.system}] if self.args.system else []

    def stream(self, text: str) -> None:
        """One prompt, its text as it comes."""
        prompt = self.tokens(text)
        generation = self.generation([prompt], self.args.seed)
        self.write("" if self.chat else text)
        self.answer(prompt, generation)

    def converse(self, lines: Iterator[str]) -> None:
        """Every line is a question; the conversation grows."""
        assert self.chat is not None
        from linear_moe.inference.conversation import Conversation

        messages, conversation = self.opening(), Conversation()
        for turn, line in enumerate(lines):
            messages.append({"role": "user", "content": line})
            prompt = self.chat.prompt(messages)
            generation = self.generation([prompt], self.args.seed + turn, conversation)
            if turn > 0 and conversation.num_kept == 0:
                self.say_once("the chat template changes earlier turns: every answer reads all of them anew")
            answer = self.answer(prompt, generation)
            messages.append({"role": "assistant", "content": answer})

    def batches(self, texts: list[str]) -> None:
        """Many prompts, side by side; every row draws by its own number."""
        if self.args.output is None:
            for number, row in enumerate(itertools.chain.from_iterable(self.answers(texts)), start=1):
                self.write(f"--- {number}\n{'' if self.chat else row['prompt']}{row['text']}\n")
            return
        from linear_moe.inference.answers import Answers

        is_writer = os.environ.get("RANK", "0") == "0"
        with Answers(self.args.output, len(texts), is_writer=is_writer) as file:
            for rows in self.answers(texts):
                file.add(rows)

    def answers(self, texts: list[str]) -> Iterator[list[dict[str, Any]]]:
        """A batch at a time."""
        for first in range(0, len(texts), self.args.batch_size):
            part = texts[first : first + self.args.batch_size]
            prompts = [self.tokens(text) for text in part]
            outputs: list[list[int]] = [[] for _ in prompts]
            for step in self.generation(prompts, self.args.seed + first):
                for output, token in zip(outputs, step, strict=True):
                    output += [] if token is None else [token]
            yield [
                {"prompt": text, "text": self.loaded.tokenizer.detokenize(tokens), "tokens": tokens}
                for text, tokens in zip(part, outputs, strict=True)
            ]

    def generation(self, prompts: list[list[int]], seed: int, conversation: Any = None) -> Any:
        """The continuation of prompts; on a GPU it says if its steps are slow ones."""
        from linear_moe.inference.generate import Generation

        generation = Generation(self.loaded, prompts, seed=seed, conversation=conversation, **self.options)
        reason = generation.loop.why_no_graph
        if reason is not None and generation.decoder.device.type == "cuda":
            self.say_once(f"no CUDA graph, several times slower at small batches: {reason}")
        return generation

    def say_once(self, line: str) -> None:
        """Something about the speed or the text."""
        if line not in self.said and os.environ.get("RANK", "0") == "0":
            print(f"linear_moe: {line}", file=sys.stderr)
        self.said.add(line)

    def answer(self, prompt: list[int], generation: Any) -> str:
        """The text of one continuation, written as it comes."""
        from linear_moe.inference.text import TextStream

        stream, times, pieces = TextStream(self.loaded.tokenizer, prompt), [time.perf_counter()], []
        for (token,) in generation:
            pieces.append(stream.feed(token))
            self.write(pieces[-1])
            times.append(time.perf_counter())
        pieces.append(stream.flush())
        self.write(pieces[-1] + "\n")
        self.write(summary(len(prompt), times, generation.memory_size()) + "\n")
        return "".join(pieces)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue prompts with the model of a run.")
    add = parser.add_argument
    folder = "run folder; its checkpoint/; one iteration in that; or a folder of Hugging Face's"
    add("--load", required=True, metavar="DIR", help=folder)
    add("--prompt", action="append", help="text, may be repeated; numbers for a run without a tokenizer")
    add("--prompts", metavar="FILE", help="a prompt per line; of .jsonl, a string or the field prompt")
    add("--batch-size", type=int, default=16, help="prompts read side by side, of any lengths [%(default)s]")
    output = "JSON lines instead of text: prompt, text, tokens; FILE.part until all are there, never over one"
    add("--output", metavar="FILE", help=output)
    chat = "the prompt is a question, in the tokenizer's chat template; without one, ask line by line"
    add("--chat", action="store_true", help=chat)
    add("--chat-template", metavar="FILE", help="Jinja template instead of the tokenizer's, or plain")
    add("--system", help="message before the first question")
    add("--max-new-tokens", type=int, default=128, help="at most so many tokens [%(default)s]")
    add("--temperature", type=float, default=0.0, help="0: always the most probable token [%(default)s]")
    add("--top-k", type=int, default=0, help="draw from the so many most probable; 0: no limit [%(default)s]")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the fewest that hold this probability [%(default)s]",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first prompt's draws; the next prompt gets the next number [%(default)s]",
    )
    add("--step", type=int, help="step of the checkpoint; the last one unless given")
    moved = (
        "where the tokenizer is now, if it has moved; or whose tokens the numbers are, if the run has none"
    )
    add("--tokenizer", metavar="FOLDER", help=moved)
    add("--ignore-eos", action="store_true", help="go on after the end of a document or a turn")
    return parser.parse_args()


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from None
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        held = f"an object with {', '.join(row) or 'nothing'}" if isinstance(row, dict) else "no string"
        raise ValueError(f"{where} is {held}, and has no text under 'prompt'")
    return prompt


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts; none only for a conversation."""
    texts = list(args.prompt or [])
    if args.prompts is not None:
        try:
            # Not splitlines(): a prompt may hold what that takes for the end of a line, U+2028 for one.
            text = Path(args.prompts).read_text(encoding="utf-8-sig")
            lines = text.removesuffix("\n").split("\n") if text else []
            if args.prompts.endswith(".jsonl"):
                rows = enumerate(lines, 1)
                lines = [_prompt_of(line, f"line {number}") for number, line in rows if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--prompts {args.prompts} cannot be read: {type(error).__name__}: {error}\n"
                f"  why: it holds one prompt per line, in a .jsonl file as a string or in the field prompt\n"
                f'  try: lines of {{"prompt": ".."}}, or a .txt file in UTF-8'
            ) from None
        texts += lines
    if args.batch_size < 1:
        raise ValueError(
            f"--batch-size is {args.batch_size}\n  why: it counts prompts\n  try: --batch-size 16"
        )
    if args.output is not None:
        output = Path(args.output).absolute()
        if output.is_dir() or not output.parent.is_dir():
            why = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
            instead = (
                "the name of a file"
                if output.is_dir()
                else f"mkdir -p {shlex.quote(str(Path(args.output).parent))}"
            )
            raise ValueError(f"--output {args.output} cannot be written\n  why: {why}\n  try: {instead}")
        from linear_moe.inference.answers import Answers

        Answers(
            args.output, len(texts), is_writer=False
        )  # refuses to write over others, before a model is loaded
    for flag, is_given in (("--system", args.system), ("--chat-template", args.chat_template)):
        if is_given and not args.chat:
            raise ValueError(
                f"{flag} says how a chat goes, and there is none\n"
                f"  why: a prompt alone is continued as it is\n"
                f"  try: --chat {flag} .., or leave it out"
            )
    if not texts and not args.chat:
        raise ValueError(
            "there is no prompt\n"
            "  why: the model continues a text; from nothing it has to be asked for: --prompt ''\n"
            '  try: --prompt "import os", --prompts FILE, or --chat to type questions'
        )
    return texts


def read_template(name: str | None) -> str | None:
    """A chat template from a file."""
    if name is None:
        return None
    from linear_moe.data.instructions.template import read_template as read

    return read(name)


def read_lines(is_first: bool) -> Iterator[str]:
    """Lines of standard input until its end, the same on every rank."""
    import torch.distributed as dist

    while True:
        if is_first and sys.stdin.isatty():
            write("> ")
        found = [sys.stdin.readline() if is_first else ""]
        dist.broadcast_object_list(found, src=0)
        if not found[0]:
            return
        if found[0].strip():
            yield found[0].strip()


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def summary(prompt_tokens: int, times: list[float], held: Any) -> str:
    """Tokens, their speed (without reading the prompt) and the memory of the sequence."""
    count = len(times) - 1
    speed = f"{(count - 1) / (times[-1] - times[1]):.1f} tokens/s" if count > 1 else "too few to time"
    return (
        f"[{prompt_tokens} + {count} tokens, {speed}; "
        f"recurrent state {held.recurrent} bytes, KV cache {held.kv_cache} bytes]"
    )


def has_process_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


if __name__ == "__main__":
    sys.exit(main())
