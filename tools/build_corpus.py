"""A corpus without a download, the installed Python's own library: python tools/build_corpus.py corpus.jsonl"""

import argparse
import json
import os
import sys

from linear_moe.data.corpus import python_documents


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the text of the installed Python as JSONL.")
    parser.add_argument("output", help="JSONL file to write")
    parser.add_argument(
        "--max-bytes", type=int, default=50_000_000, help="stop after this much text [%(default)s]"
    )
    args = parser.parse_args()
    count = size = 0
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    part = f"{args.output}.part{os.getpid()}"
    with open(part, "w", encoding="utf-8") as lines:
        for text in python_documents():
            if size >= args.max_bytes:
                break
            lines.write(json.dumps({"text": text}) + "\n")
            count, size = count + 1, size + len(text)
    os.replace(part, args.output)
    print(f"{count} documents, {size / 1e6:.1f} MB of text of Python {sys.version.split()[0]}")
    print(
        "Licence: Python Software Foundation licence; read in place for local use, not to be redistributed from here."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
