"""Checkpoints of stacked experts and of Megatron's ``SequentialMLP`` are one format, optimizer state included."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional as F

from linear_moe.model.backend import make_backend
from linear_moe.model.experts import GroupedExperts
from tests.workers import with_model_parallel

E, D, FFN = 4, 16, 24
EP1, EP2, ETP2 = {"etp": 1}, {"ep": 2, "etp": 1}, {"tp": 2, "etp": 2}


def experts(layout: dict[str, int], sequential: bool, gated: bool) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=4,
        ffn_hidden_size=40,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=E,
        gated_linear_unit=gated,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        tensor_model_parallel_size=layout.get("tp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout["etp"],
    )
    build = make_backend("local", sequential_experts=sequential).grouped_mlp_modules(True)
    return build(E // groups.ep.size(), config, pg_collection=groups)


def metadata(one_key_per_expert: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "singleton_local_shards": one_key_per_expert,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def whole(module: torch.nn.Module) -> list[torch.Tensor]:
    """``fc1`` and ``fc2`` of all experts of the layer, on every rank."""
    if isinstance(module, GroupedExperts):
        local = [module.fc1_weight.detach(), module.fc2_weight.detach()]
    else:
        local = [
            torch.stack([getattr(expert, name).weight.detach() for expert in module.local_experts])
            for name in ("linear_fc1", "linear_fc2")
        ]
    halves = 2 if module.config.gated_linear_unit else 1
    fc1, fc2 = (gathered(weight, module.tp_group) for weight in local)
    fc1 = [torch.cat([piece.chunk(halves, 1)[half] for piece in fc1], 1) for half in range(halves)]
    return [torch.cat(gathered(weight, module.ep_group)) for weight in (torch.cat(fc1, 1), torch.cat(fc2, 2))]


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    pieces = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return pieces


def save(rank: int, world_size: int, path: Path, how: dict[str, Any]) -> list[torch.Tensor]:
    from megatron.core import dist_checkpointing

    with with_model_parallel(**how["layout"], seed=3):
        module = experts(how["layout"], how["sequential"], how["gated"])
        state = module.sharded_state_dict("mlp.experts.", how["offsets"], metadata(how["one_key_per_expert"]))
        dist_checkpointing.save(state, str(path))
        return whole(module)


def load(rank: int, world_size: int, path: Path, how: dict[str, Any]) -> list[torch.Tensor]:
    from megatron.core import dist_checkpointing

    prefix = "mlp.experts."
    with with_model_parallel(**how["layout"], seed=9):
        module = experts(how["layout"], how["sequential"], how["gated"])
        state = module.sharded_state_dict(prefix, how["offsets"], metadata(how["one_key_per_expert"]))
        loaded = dist_checkpointing.load(state, str(path))
        module.load_state_dict({key.removeprefix(prefix): value for key, value in loaded.items()})
        return whole(module)


@pytest.mark.parametrize(
    "gated, one_key_per_expert",
    [(True, False), (False, False), (True, True)],
    ids=["gated", "plain", "gated_own_keys"],
)
@pytest.mark.parametrize(
    "source, targets",
    [
        (("sequential", EP1), [("grouped", EP1), ("grouped", EP2), ("grouped", ETP2)]),
        (("grouped", EP2), [("sequential", EP1), ("sequential", EP2), ("grouped", ETP2)]),
        (("grouped", ETP2), [("sequential", ETP2), ("sequential", EP2), ("grouped", EP1)]),
    ],
    ids=lambda case: case[0] if isinstance(case, tuple) else "",
)
def test_weights_travel(gloo, tmp_path, source, targets, gated, one_key_per_expert):
    def how(case: tuple[str, dict]) -> dict[str, Any]:
        return {
            "sequential": case[0] == "sequential",
            "layout": case[1],
            "gated": gated,
            "one_key_per_expert": one_key_per_expert,
            "offsets": ((0, 0, 1),) if gated else (),  # a stack of layers under one key, or a key per layer
        }

    saved = gloo(2, save, tmp_path, how(source))
    for target in targets:
        for found in gloo(2, load, tmp_path, how(target)):
            for got, true in zip(found, saved[0], strict=True):
                assert torch.equal(got, true), (source, target)


# ---- optimizer state ----


class Model(torch.nn.Module):
    """The least that Megatron's data parallelism and optimizer want of a model."""

    def __init__(self, layout: dict[str, int], sequential: bool) -> None:
        super().__init__()
        self.experts = experts(layout, sequential, gated=True)
        # Experts have an optimizer of their own, so this is the other one; large enough for every rank to hold some.
        self.gain = torch.nn.Parameter(torch.ones(16, D))
        self.config = self.experts.config

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.experts(x, counts, torch.ones(len(x)))[0] * self.gain.mean(0)

    def sharded_state_dict(self, *args: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        gain = make_sharded_tensors_for_checkpoint(
            {"gain": self.gain}, "", tp_group=self.experts.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        return self.experts.sharded_state_dict("experts.", (), metadata) | gain


def trained(
    rank: int, world_size: int, layout: dict, sequential: bool, steps: list[int], path: Path, sharding: str
) -> list[torch.Tensor]:
    """Load a checkpoint unless ``steps`` begins at 0, train through ``steps``, save one at the end."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from linear_moe.training import engine

    engine.install()
    with with_model_parallel(**layout, seed=3 + steps[0], gloo_groups=True):
        model = DistributedDataParallel(
            experts(layout, sequential, gated=True).config,
            DistributedDataParallelConfig(use_distributed_optimizer=True),
            Model(layout, sequential),
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=1.0), [model]
        )
        about = metadata(False) | {
            "distrib_optim_sharding_type": sharding,
            "chained_optim_avoid_prefix": True,
        }

        def state(is_loading: bool) -> dict[str, Any]:
            weights = model.module.sharded_state_dict(metadata=about)
            return {
                "model": weights,
                "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=about),
            }

        if steps[0] > 0:
            loaded = dist_checkpointing.load(state(is_loading=True), str(path / str(steps[0])))
            model.module.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
        for step in steps:
            generator = torch.Generator().manual_seed(step * 10 + rank)
            model.zero_grad_buffer()
            optimizer.zero_grad()
            n = E // layout.get("ep", 1)
            out = model(torch.randn(4 * n, D, generator=generator), torch.full((n,), 4))
            out.square().sum().backward()
            model.finish_grad_sync()
            optimizer.step()
        dist_checkpointing.save(state(is_loading=False), str(_made(rank, path / str(steps[-1] + 1))))
        return [*whole(model.module.experts), model.module.gain.detach()]


def _made(rank: int, path: Path) -> Path:
    if rank == 0:
        path.mkdir()
    dist.barrier()
    return path


@pytest.mark.parametrize("layout", [EP1, EP2], ids=["ep1", "ep2"])
def test_optimizer_state_travels(gloo, tmp_path, layout):
    """Two steps, a checkpoint, two more by the other kind of experts: as if nothing had happened."""
    sharding = "fully_reshardable"
    straight = gloo(2, trained, layout, True, [0, 1, 2, 3], _folder(tmp_path, "a"), sharding)
    for first, second in ((True, False), (False, True)):
        path = _folder(tmp_path, f"{first}")
        gloo(2, trained, layout, first, [0, 1], path, sharding)
        resumed = gloo(2, trained, layout, second, [2, 3], path, sharding)
        for got, true in zip(resumed[0], straight[0], strict=True):
            torch.testing.assert_close(got, true, atol=1e-4, rtol=0.0)  # a lost moment: 0.1


def test_optimizer_state_in_the_layout_of_its_buckets(gloo, tmp_path):
    straight = gloo(2, trained, EP1, False, [0, 1, 2, 3], _folder(tmp_path, "a"), "dp_reshardable")
    path = _folder(tmp_path, "b")
    gloo(2, trained, EP1, False, [0, 1], path, "dp_reshardable")
    resumed = gloo(2, trained, EP1, False, [2, 3], path, "dp_reshardable")
    for got, true in zip(resumed[0], straight[0], strict=True):
        assert torch.equal(got, true)


def _folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name
