"""Fused kernels in Triton, for CUDA; on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.

Importing this package, which the first call of a fused kernel does, says once that kernels will be compiled.
"""

import logging
import os

if os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("LOCAL_RANK", "0") == "0":
    logging.getLogger(__name__).warning(
        "linear_moe: the first call of each fused kernel compiles it, seconds each, or finds it in Triton's cache (%s)",
        os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache"),
    )
