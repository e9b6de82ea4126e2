"""Training through Megatron's own ``pretrain()``: entry, arguments, data, metrics, the CPU platform."""
