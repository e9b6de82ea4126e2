"""The fused operators, side by side with others': ``python -m linear_moe.bench kernels``."""
