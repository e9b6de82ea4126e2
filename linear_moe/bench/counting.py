"""Parameters and operations of a family's size with any mixers, from its real modules, in one process without a GPU.

The command line of a training run is made as the launcher makes it, and the model is built from it on the meta device.
Importing this module switches a machine without a CUDA device to the CPU platform.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

from dataclasses import dataclass, replace

from linear_moe.inference.load import join_single_process
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import RunPlan
from linear_moe.model.builder import padded_vocab_size
from linear_moe.model.counts import ParameterCounts, build_on_meta, count_parameters
from linear_moe.training import arguments
from linear_moe.training.flops import FlopsPerToken, flops_per_token


@dataclass(frozen=True)
class ModelCounts:
    """What one model holds and costs."""

    plan: RunPlan
    """Family, size, and the mixer of each layer."""
    parameters: ParameterCounts
    """Of the built model."""
    flops: FlopsPerToken
    """Forward operations."""

    def training_flops(self, seq_len: int) -> dict[str, float]:
        """Operations of a training step per token, by part, of sequences of one length; their sum is the whole."""
        flops, feed_forward = self.flops, "experts" if self.plan.size.is_moe else "feed_forward"
        parts = {
            "mixer": replace(flops, feed_forward=0, head=0),
            feed_forward: replace(flops, mixers=0, per_pair=0, head=0),  # with the router, and what is dense
            "head": replace(flops, mixers=0, per_pair=0, feed_forward=0),
        }
        return {name: part.of_step(1, seq_len) for name, part in parts.items()}


def count(plan: RunPlan) -> ModelCounts:
    """Build the model of a run without memory for it, and count.

    Raises:
        ValueError: the mixers do not fit the size, or an option of them is impossible.
    """
    args = single_process_arguments(training_arguments(plan), padded_vocab_size=plan.padded_vocab_size)
    config = arguments.model_config(args)
    join_single_process()
    parameters = count_parameters(build_on_meta(config))
    return ModelCounts(plan, parameters, flops_per_token(config.transformer, padded_vocab_size(config)))
