"""Autocast does not reach the kernels: it would multiply float32 memories and their decays as bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which products are computed in the dtype of their factors."""
    # Whether a device has autocast cannot be traced by torch.compile; that meta has none is all one needs to know.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
