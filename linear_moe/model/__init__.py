"""From the layer pattern to a Megatron model: config, specs, builder, and the modules of a layer."""
