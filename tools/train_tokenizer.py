"""Train a byte-level BPE: python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output tok"""

import argparse
import itertools
import shlex
import sys
from pathlib import Path

from linear_moe.data.corpus import check_inputs, read_documents
from linear_moe.data.tokenizer import train_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer that Megatron can load.")
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, or text files")
    parser.add_argument(
        "--json-key", default="text", help="field of a JSONL line that holds the text [%(default)s]"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="tokens, with the two special ones [%(default)s]"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args()
    try:
        check_inputs(args.input)
        if (Path(args.output) / "tokenizer.json").exists() and not args.overwrite:
            raise ValueError(
                f"{args.output} holds a tokenizer.\n"
                f"  why: token files and models made with it would mean other text with another one.\n"
                f"  try: --overwrite, or another --output"
            )
        texts = itertools.chain(*(read_documents(path, args.json_key) for path in args.input))
        info = train_tokenizer(texts, args.vocab_size, args.output)
    except ValueError as error:
        print(f"linear_moe: {error}", file=sys.stderr)
        return 2
    print(f"{info.vocab_size} tokens, end of document {info.eod}: TOKENIZER={shlex.quote(info.path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
