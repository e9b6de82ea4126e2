"""Fused kernels in Triton, for CUDA; on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests."""
