"""linear_moe: Linear-MoE language models on Megatron-Core."""
