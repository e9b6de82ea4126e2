"""Continue a prompt with the model of a run: python tools/generate.py --load runs/demo --prompt "import os" """

import argparse
import os
import sys
import time

from linear_moe.inference.quiet import no_messages, no_output

# Read when torch and transformers are imported: no chatter from C++, no question to a network.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    args = parse()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with no_messages():
        try:
            with no_output():
                import torch.distributed as dist

                from linear_moe.inference.generate import Generation
                from linear_moe.inference.load import load_model
                from linear_moe.inference.text import TextStream

                loaded = load_model(args.load, step=args.step, tokenizer=args.tokenizer)
            tokenizer = loaded.tokenizer
            prompt = read_prompt(args.prompt, tokenizer)
            generation = Generation(
                loaded,
                [prompt],
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=args.seed,
                eos=None if args.ignore_eos else tokenizer.eod,
            )
        except ValueError as error:
            print(f"linear_moe: {error}", file=sys.stderr)
            return 2
        stream = TextStream(tokenizer, prompt)
        write(args.prompt)
        times = [time.perf_counter()]
        for (token,) in generation:
            assert token is not None
            write(stream.feed(token))
            times.append(time.perf_counter())
        write(stream.flush() + "\n")
        print(summary(len(prompt), times, generation.memory_size()))
        dist.destroy_process_group()
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a prompt with the model of a run.")
    parser.add_argument(
        "--load", required=True, metavar="RUN", help="run folder, with config.json and checkpoint/"
    )
    parser.add_argument("--prompt", default="", help="text; numbers for a run without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most so many tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the so many most probable; 0: no limit"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the fewest that hold this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the last one unless given")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is now, if it has moved")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    return parser.parse_args()


def read_prompt(text: str, tokenizer) -> list[int]:
    """Tokens of the prompt; of an empty one, the end of the document before it."""
    try:
        return (tokenizer.tokenize(text) if text else []) or [tokenizer.eod]
    except ValueError:
        raise ValueError(
            f"the prompt {text!r} is not a row of numbers\n"
            f"  why: the run has no tokenizer, so its tokens are numbers\n"
            f"  try: --prompt '1 2 3'"
        ) from None


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def summary(prompt_tokens: int, times: list[float], held) -> str:
    """Tokens, their speed (without reading the prompt) and the memory of the sequence."""
    count = len(times) - 1
    speed = f"{(count - 1) / (times[-1] - times[1]):.1f} tokens/s" if count > 1 else "too few to time"
    return (
        f"[{prompt_tokens} + {count} tokens, {speed}; "
        f"recurrent state {held.recurrent} bytes, KV cache {held.kv_cache} bytes]"
    )


if __name__ == "__main__":
    sys.exit(main())
