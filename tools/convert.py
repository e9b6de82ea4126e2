"""From and to Hugging Face (docs/checkpoints.md); everything is in linear_moe/checkpoint.

python tools/convert.py import --hf Qwen2-7B --save runs/qwen2-7b
python tools/convert.py import --hf Qwen2-7B --save runs/qwen2-7b-gla --la-module gla --layer-type-list LLLN
python tools/convert.py export --load runs/mine --hf mine-hf
"""

import sys

from linear_moe.checkpoint.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
