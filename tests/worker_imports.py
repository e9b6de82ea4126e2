"""What a worker process of ``tests/workers.py`` has imported when it starts; ``pretrain`` turns on the CPU platform."""

import linear_moe.inference.load
import linear_moe.model.builder
import linear_moe.training.pretrain  # noqa: F401
