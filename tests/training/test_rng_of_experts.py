"""The random states of experts in a checkpoint: one for each data-parallel rank, where Megatron keeps the first's."""

import argparse
from typing import Any

import pytest
import torch

from linear_moe.training import engine
from tests.workers import with_model_parallel


def rng_of_experts(rank: int, world_size: int, cp: int) -> tuple[str, torch.Tensor, list[torch.Tensor]]:
    import megatron.training.checkpointing as checkpointing
    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args

    engine.install()
    with with_model_parallel(ep=2, cp=cp):
        groups = (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        set_args(argparse.Namespace(data_parallel_random_init=False))
        stock = engine.stock(checkpointing, "get_rng_state")("torch_dist", *groups)
        ours = checkpointing.get_rng_state("torch_dist", *groups)
        tracker = stock.data[0]["rng_tracker_states"]["expert-parallel-rng"]
        return str(stock.unique_key), tracker, ours.data[0][engine.EXPERTS_RNG]


@pytest.mark.parametrize("cp", [1, 2])
def test_checkpoints_still_take_the_experts_rng_for_equal(gloo, cp: int) -> None:
    (key, state, both), (other_key, other_state, _) = gloo(2, rng_of_experts, cp)
    assert key == other_key and not torch.equal(state, other_state)
    assert torch.equal(both[0], state) and torch.equal(both[1], other_state)


def loaded(rank: int, world_size: int, by_rank: list[torch.Tensor] | None) -> tuple[torch.Tensor, Any]:
    """This rank's fresh state, and what is there in its place after a checkpoint with these was read."""
    import megatron.training.checkpointing as checkpointing
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    engine.install()
    state: dict[str, Any] = {"rng_tracker_states": {"expert-parallel-rng": "the first rank's", "other": 1}}
    if by_rank is not None:
        state[engine.EXPERTS_RNG] = by_rank
    load = engine._load_rng_of_experts(lambda *args: ({"rng_state": [state]}, *args))
    assert checkpointing._load_base_checkpoint.__wrapped__ is engine.stock(
        checkpointing, "_load_base_checkpoint"
    )
    with with_model_parallel(ep=world_size):
        fresh = get_cuda_rng_tracker().get_states()["expert-parallel-rng"]
        found, *others = load("name", 3)
        assert others == ["name", 3]
        (after,) = found["rng_state"]
        assert after.keys() == {"rng_tracker_states"}, (
            "Megatron would take what is left for a state of its own"
        )
        assert after["rng_tracker_states"]["other"] == 1
        return fresh, after["rng_tracker_states"]["expert-parallel-rng"]


SAVED = [torch.arange(8) + i for i in range(4)]


def test_each_rank_goes_on_with_its_own(gloo) -> None:
    for rank, (_, after) in enumerate(gloo(2, loaded, SAVED[:2])):
        assert torch.equal(after, SAVED[rank])


@pytest.mark.parametrize("saved", [1, 4])
def test_another_number_of_ranks_begins_anew(gloo, saved: int) -> None:
    """None of the saved ones is taken twice: experts of two ranks would draw the same."""
    for fresh, after in gloo(2, loaded, SAVED[:saved]):
        assert torch.equal(after, fresh)


def test_checkpoints_without_them_are_as_they_are(gloo) -> None:
    assert [after for _, after in gloo(2, loaded, None)] == ["the first rank's"] * 2
    load = engine._load_rng_of_experts(lambda: (None, "", False))
    assert load() == (None, "", False), "there is no checkpoint"
