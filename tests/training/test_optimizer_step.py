"""The optimizer's kernels over all parameters: the norm and the clipping are those of the definition."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from linear_moe.training import engine, optimizer_step
from tests.training.test_engine import params, small_optimizer
from tests.workers import with_model_parallel


def clipped(rank: int, world_size: int) -> None:
    engine.install()
    with with_model_parallel(gloo_groups=True), pytest.MonkeyPatch.context() as patch:
        optimizer = small_optimizer((3, 200, 64))
        generator = torch.Generator().manual_seed(0)
        grads = {p: torch.randn(p.shape, generator=generator) for p in optimizer.buffers[0].param_index_map}
        for param, grad in grads.items():
            param.main_grad.copy_(grad)
        optimizer.prepare_grads()
        reads = []
        for name in ("item", "__float__", "tolist"):
            read = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor,
                name,
                lambda x, read=read: reads.append(sys._getframe(1).f_code.co_name) or read(x),
            )
        norm = optimizer.clip_grad_norm(1.0)
        assert reads == ["get_grad_norm_fp32", "has_grad_norm_group"], "not one for each gradient"
        patch.undo()
        true = sum(grad.double().square().sum().item() for grad in grads.values()) ** 0.5
        assert norm == pytest.approx(true, rel=1e-6) and true > 1.0
        for param in params(optimizer):
            here = optimizer._get_model_param_range_map(param)["param"]
            group, order = optimizer.model_param_group_index_map[param]
            found = optimizer.optimizer.param_groups[group]["params"][order].grad
            torch.testing.assert_close(
                found, grads[param][here.start : here.end] / true, rtol=2e-6, atol=1e-7
            )


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_clipped_to_their_norm(gloo: Any, world_size: int) -> None:
    gloo(world_size, clipped)


def test_scaling_into_another_list() -> None:
    source, target = [torch.ones(3), torch.full((2, 2), 5.0)], [torch.zeros(3), torch.zeros(2, 2)]
    optimizer_step.scale_all(lambda: None)(0, torch.zeros(1), [source, target], 0.5)
    assert [x.unique().tolist() for x in (*source, *target)] == [[1.0], [5.0], [0.5], [2.5]]


def test_steps_of_what_is_not_stepped_stay_where_they_are() -> None:
    """Those of parameters that a kernel of ours takes are counted on the host, which would wait for them."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    params[0].grad = torch.ones(3)
    inner, moved = torch.optim.AdamW(params), []

    class Step:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, device: Any) -> Step:
            moved.append(self.name)
            return self

    for name, param in zip(("stepped", "not"), params, strict=True):
        inner.state[param] = {"step": Step(name)}
    optimizer_step._choose_fused(inner, None, None)
    assert moved == ["stepped"]
