"""Experts that are all on one rank, against Megatron's own dispatching."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linear_moe.model import local_dispatcher
from linear_moe.model.experts import made_again
from linear_moe.model.local_dispatcher import LocalDispatcher, MoE
from tests.workers import with_model_parallel

E, D = 6, 16


def config(tp: int = 1, **options: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    defaults: dict[str, Any] = dict(
        num_layers=1, hidden_size=D, num_attention_heads=4, ffn_hidden_size=24, moe_ffn_hidden_size=24,
        num_moe_experts=E, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        bias_activation_fusion=False, moe_router_topk=3, moe_aux_loss_coeff=0.01, hidden_dropout=0.0,
        moe_token_dispatcher_type="alltoall", params_dtype=torch.float64, moe_router_dtype="fp64",
        moe_shared_expert_intermediate_size=8, tensor_model_parallel_size=tp, sequence_parallel=tp > 1,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    return TransformerConfig(**(defaults | options))


def both(rank: int, world_size: int, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Output and gradients of Megatron's layer and of ours, with the same weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.backend import make_backend

    found = []
    with with_model_parallel(tp=world_size, etp=1):
        stock = get_moe_module_spec_for_backend(
            make_backend("local", sequential_experts=False), num_experts=E, moe_grouped_gemm=True
        )
        for spec in (stock, partial(MoE, **stock.keywords)):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            layer = spec(config=config(world_size, **options), pg_collection=groups, is_mtp_layer=False)
            assert isinstance(layer.token_dispatcher, LocalDispatcher) == (spec is not stock)
            draw = torch.Generator().manual_seed(5 + rank)
            for name, weight in sorted(layer.named_parameters()):
                of_all = torch.Generator().manual_seed(len(name))
                weight.data.copy_(torch.randn(weight.shape, generator=of_all, dtype=torch.float64) * 0.2)
            x = torch.randn(7, 2, D, generator=draw, dtype=torch.float64).requires_grad_()
            out, _ = layer(x)
            (out * out.detach().cos()).sum().backward()
            grads = {name: weight.grad for name, weight in layer.named_parameters()}
            found.append({"out": out.detach(), "x": x.grad, **grads})
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"moe_router_topk": 1, "moe_router_pre_softmax": True}, {"moe_router_topk": 6}],
    ids=["three", "one", "all"],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_layer_does_not_notice(gloo: Any, world_size: int, options: dict[str, Any]) -> None:
    for stock, ours in gloo(world_size, both, options):
        assert stock.keys() == ours.keys()
        for name, truth in stock.items():
            torch.testing.assert_close(ours[name], truth, rtol=1e-11, atol=1e-12, msg=f"{name}: {{}}".format)


def with_and_without(rank: int, world_size: int) -> None:
    """The same gradients to the bit, of slots that are made again, and nothing of the size of all slots is kept."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.backend import make_backend

    found, x = [], torch.randn(7, 2, D, dtype=torch.float64)
    with with_model_parallel():
        stock = get_moe_module_spec_for_backend(make_backend("local"), num_experts=E, moe_grouped_gemm=True)
        for again in (False, True):
            settings, groups = config(), ProcessGroupCollection.use_mpu_process_groups()
            settings.recompute_expert_inputs = again
            layer = MoE(config=settings, pg_collection=groups, is_mtp_layer=False, **stock.keywords)
            draw = torch.Generator().manual_seed(5)
            for _, weight in sorted(layer.named_parameters()):
                weight.data.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64) * 0.2)
            calls = []
            patch = pytest.MonkeyPatch()
            made = local_dispatcher.spread_rows
            patch.setattr(local_dispatcher, "spread_rows", lambda *args: calls.append(1) or made(*args))  # noqa: B023
            given = x.clone().requires_grad_()
            out, _ = layer(given)
            assert len(calls) == 1
            (out * out.detach().cos()).sum().backward()
            assert (len(calls) > 1) == again
            patch.undo()
            found.append([out.detach(), given.grad, *(w.grad for w in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_inputs_of_experts_are_made_again(gloo: Any) -> None:
    gloo(1, with_and_without)


def test_what_is_made_again_is_not_kept() -> None:
    x, weight, calls = torch.randn(4, 3), torch.randn(3, 5, requires_grad=True), []
    true = torch.autograd.grad((x @ weight).square().sum(), weight)[0]
    source, x = x.clone(), x.requires_grad_()
    with made_again(x, lambda: calls.append(1) or source):
        y = x @ weight
    x.data.zero_()  # as if its memory were another's
    assert torch.equal(torch.autograd.grad(y.square().sum(), weight)[0], true) and calls == [1]


def local(rank: int, world_size: int, options: dict[str, Any], sequential: bool = False) -> bool:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.backend import make_backend

    with with_model_parallel(ep=options.get("expert_model_parallel_size", 1)):
        backend = make_backend("local", sequential_experts=sequential)
        stock = get_moe_module_spec_for_backend(backend, num_experts=E, moe_grouped_gemm=not sequential)
        groups, own = ProcessGroupCollection.use_mpu_process_groups(), dict(options)
        again = own.pop("recompute_expert_inputs", False)
        settings = config(**own)
        settings.recompute_expert_inputs = again
        layer = MoE(**stock.keywords, config=settings, pg_collection=groups, is_mtp_layer=False)
        return isinstance(layer.token_dispatcher, LocalDispatcher)


@pytest.mark.parametrize(
    "world_size, options",
    [
        (2, {"expert_model_parallel_size": 2}),
        (1, {"moe_expert_capacity_factor": 1.0}),
        (1, {"moe_token_dispatcher_type": "allgather"}),
    ],
)
def test_megatron_dispatches_where_it_must(gloo: Any, world_size: int, options: dict[str, Any]) -> None:
    assert gloo(world_size, local, options) == [False] * world_size


@pytest.mark.parametrize("options", [{"moe_expert_capacity_factor": 1.0}, {}])
def test_inputs_that_cannot_be_made_again(gloo: Any, options: dict[str, Any]) -> None:
    """They come from other ranks, or no experts ask for them."""
    with pytest.raises(
        ValueError, match=r"--recompute-expert-inputs needs all experts .*\n  why: .*\n  try: "
    ):
        gloo(1, local, options | {"recompute_expert_inputs": True}, not options)
