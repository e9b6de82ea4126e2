"""Text to Megatron's token files: python tools/preprocess_data.py --input a.jsonl --output-prefix a --tokenizer tok"""

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections import Counter


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokenize text into Megatron's indexed format.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSONL files, or text files of one document each"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_<key>_document.{bin,idx,json}")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--json-key", default="text", help="field of a JSONL line that holds the text [%(default)s]"
    )
    parser.add_argument("--workers", type=int, help="threads; all cores unless given")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if args.workers is not None:
        if args.workers < 1:
            print(
                f"linear_moe: --workers is {args.workers}\n"
                f"  why: it counts threads\n"
                f"  try: --workers 8, or none of it to use all cores",
                file=sys.stderr,
            )
            return 2
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # read once, by the tokenizer library
    warnings.simplefilter("ignore")  # Megatron warns about a dozen missing packages that no tokenizing needs
    logging.disable(logging.WARNING)
    from linear_moe.data.preprocess import preprocess

    empty: Counter[str] = Counter()
    try:
        prefix, manifest = preprocess(
            args.input,
            args.output_prefix,
            args.tokenizer,
            key=args.json_key,
            overwrite=args.overwrite,
            empty=empty,
            tell=lambda line: print(f"linear_moe: {line}", file=sys.stderr),
        )
    except ValueError as error:
        print(f"linear_moe: {error}", file=sys.stderr)
        return 2
    left_out = f"; {empty.total()} empty ones left out" if empty else ""
    print(
        f"{manifest.num_documents} documents, {manifest.num_tokens} tokens of {manifest.vocab_size}{left_out}"
    )
    print(f"DATASET_PATH={shlex.quote(prefix)} TOKENIZER={shlex.quote(manifest.tokenizer)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
