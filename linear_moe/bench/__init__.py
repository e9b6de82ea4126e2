"""What models hold and cost: counted on the meta device, and measured step by step (``python -m linear_moe.bench``)."""
