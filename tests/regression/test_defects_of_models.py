"""Defects D6, D7, D11, D13 and D15 of the earlier system (its models), each with the test that it would fail.

Letters: T tokens, B batch, H heads, D channels, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linear_moe.model.families import FAMILIES, megatron_arguments
from tests.launch.plans import make_plan
from tests.model import test_latent_attention as latent
from tests.regression.whole_models import (
    backward_of_nothing,
    build,
    changed,
    difference,
    logits,
    random_tokens,
)
from tests.training.tiny import metrics, train
from tests.workers import with_model_parallel

MIXED = ["gated_deltanet", "gla", "softmax", "linear_attention"]
EXPERT_SIZES = [(f, s) for f in FAMILIES for s, size in FAMILIES[f].sizes.items() if size.is_moe]


# D6: latent attention masked only when it was handed a mask, and the script told the loader to make none


def latent_outputs(rank: int, world: int, rope_type: str) -> list[Tensor]:
    with with_model_parallel(), torch.no_grad():
        layer = latent.layer(latent.LatentAttention, rope_type)
        x_TBD = latent.tokens(2)
        first, late = x_TBD.clone(), x_TBD.clone()
        first[0] += 1
        late[10] += 1
        return [layer(x, None)[0] for x in (x_TBD, first, late)]


@pytest.mark.parametrize("rope_type", ["rope", "yarn"])
def test_d06_latent_attention_is_causal_without_a_mask(gloo, rope_type):
    """D6: multi-head latent attention looked both ways, as no mask was made for it.

    Here it gets no mask either: what comes before a changed token stays, and the last token still sees the first.
    """
    (plain, first, late) = gloo(1, latent_outputs, rope_type)[0]
    assert difference(late[:10], plain[:10]) < 1e-12
    assert (late[10:] - plain[10:]).abs().amax((1, 2)).min() > 1e-6
    assert (first - plain).abs().amax((1, 2)).min() > 1e-6


def softmax_outputs(rank: int, world: int) -> list[Tensor]:
    model, tokens_BT = build(["softmax"]), random_tokens(2, 30)
    edits = (tokens_BT, changed(tokens_BT, slice(None), 0), changed(tokens_BT, slice(None), 20))
    with torch.no_grad():
        return [logits(model, tokens) for tokens in edits]


def test_d06_softmax_layers_are_causal_without_a_mask(gloo):
    """D6 again, for the softmax layers of every other family: the forward step hands them no mask."""
    (plain, first, late) = gloo(1, softmax_outputs)[0]
    assert difference(late[:, :20], plain[:, :20]) < 1e-12
    assert (late[:, 20:] - plain[:, 20:]).abs().amax((0, 2)).min() > 1e-9
    assert (first - plain).abs().amax((0, 2)).min() > 1e-9
    assert "--no-create-attention-mask-in-dataloader" in training_arguments_of()


# D7: every pipeline stage built all layers


def stage(rank: int, world: int, vpp: int) -> tuple[list[tuple[int, str]], int]:
    flags = ["--pipeline-model-parallel-size", str(world)] if world > 1 else []
    flags += ["--num-virtual-stages-per-pipeline-rank", str(vpp)] if vpp > 1 else []
    made = build(MIXED, *flags, moe=True, dtype=torch.float32, vp_stages=vpp)
    chunks = made if vpp > 1 else [made]
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    kinds = [getattr(getattr(layer.self_attention, "mixer", None), "name", "softmax") for layer in layers]
    count = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return list(zip((layer.layer_number for layer in layers), kinds, strict=True)), count


@pytest.mark.parametrize("vpp", [1, 2])
def test_d07_a_stage_builds_its_own_layers(gloo, vpp):
    """D7: with pipeline parallelism a model of k times the depth was trained, all of it on every stage.

    Here stages share the layers of the pattern, in its order, and together have the parameters of one process.
    """
    ranks, [(whole, count)] = gloo(2, stage, vpp), gloo(1, stage, 1)
    assert whole == [(i + 1, kind) for i, kind in enumerate(MIXED)]
    mine = [[number for number, _ in layers] for layers, _ in ranks]
    assert mine == ([[1, 2], [3, 4]] if vpp == 1 else [[1, 3], [2, 4]])
    assert sorted(layer for layers, _ in ranks for layer in layers) == whole
    assert sum(count for _, count in ranks) == count


# D11: no load-balancing loss, and 0 / 0 in its place in the log


def training_arguments_of(**variables: str) -> list[str]:
    from linear_moe.launch.megatron_args import training_arguments

    return training_arguments(make_plan(**variables))


@pytest.mark.parametrize("family,size", EXPERT_SIZES)
def test_d11_every_family_balances_its_experts(family, size):
    """D11: the script never passed a coefficient, and Megatron's default is 0. Every size with experts has one here."""
    flags = megatron_arguments(FAMILIES[family], FAMILIES[family].sizes[size])
    assert flags[flags.index("--moe-router-load-balancing-type") + 1] in ("aux_loss", "seq_aux_loss")
    assert float(flags[flags.index("--moe-aux-loss-coeff") + 1]) > 0
    assert flags[flags.index("--moe-router-dtype") + 1] == "fp32"


def router_gradients(rank: int, world: int, coefficient: str) -> list[float]:
    flags = ["--moe-aux-loss-coeff", coefficient]
    model = build(["gla", "softmax"], *flags, moe=True, train=True, dtype=torch.float32, noise=0.1)
    backward_of_nothing(model, random_tokens(2, 30))
    return [layer.mlp.router.weight.grad.abs().max().item() for layer in model.decoder.layers]


def test_d11_the_balance_is_in_the_loss(gloo):
    """D11: routers learned from the language-model loss alone.

    Here they have a gradient when that loss is multiplied by 0, in every layer, and none with a coefficient of 0.
    """
    assert min(gloo(1, router_gradients, "1e-2")[0]) > 1e-8
    assert gloo(1, router_gradients, "0")[0] == [0.0, 0.0]


def test_d11_the_balance_is_in_the_log(gloo, tmp_path):
    """D11: the log showed NaN. A run as the script starts it logs a loss of about 1, its value when all is even."""
    small = {"MODEL_SIZE": "tiny", "SEQ_LEN": "32", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "PR": "fp32"}
    where = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "run", "EVAL_ITERS": "0", "SAVE_INTERVAL": "0"}
    gloo(1, train, training_arguments_of(**small, **where, TRAIN_ITERS="2"))
    for step in metrics(tmp_path / "run"):
        assert 0.9 < step["moe_load_balancing_loss"] < 2, step
        assert math.isfinite(step["lm_loss"])


# D13: the model of the `*` layers was not given the base of the rotary embedding


def rotated(rank: int, world: int, base: str) -> dict[str, Tensor]:
    """Queries of the softmax layer of a hybrid before and after the rotary embedding, ``[T, B, H, D]``."""
    model, caught = build(["gla", "softmax"], "--rotary-base", base), {}
    layer = model.decoder.layers[1].self_attention
    layer.linear_qkv.register_forward_hook(
        lambda module, inputs, outputs: caught.update(before=outputs[0].unflatten(2, (4, 48))[..., :16])
    )
    layer.core_attention.register_forward_pre_hook(lambda module, inputs: caught.update(after=inputs[0]))
    with torch.no_grad():
        logits(model, random_tokens(2, 40))
    return {name: x.detach() for name, x in caught.items()}


@pytest.mark.parametrize("base", [10_000, 1_000_000])
def test_d13_the_rotary_base_reaches_softmax_layers(gloo, base):
    """D13: softmax layers of a Mamba2 hybrid turned with base 10000 whatever ROPE_THETA said.

    Here queries are turned by t base^(-2i / D) in the softmax layer of a hybrid.
    """
    (seen,) = gloo(1, rotated, str(base))
    before, D = seen["before"], 16
    angle_TD = torch.arange(40.0)[:, None] * float(base) ** (-torch.arange(0, D, 2) / D)
    cos, sin = (f(angle_TD.double())[:, None, None] for f in (torch.cos, torch.sin))
    first, second = before.chunk(2, -1)
    truth = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    assert difference(seen["after"], truth) < 1e-5  # Megatron's table is a float32


def test_d13_the_rotary_base_of_a_size_is_passed():
    """D13: from the table of sizes to the command line of the training."""
    for family in FAMILIES.values():
        for size in family.sizes.values():
            flags = megatron_arguments(family, size)
            assert flags[flags.index("--rotary-base") + 1] == str(size.rotary_base)


# D15: no group-limited routing and no scaling factor in the router


def routes(rank: int, world: int, flags: list[str]) -> dict[str, Tensor]:
    router = build(["gla"], *flags, moe=True, dtype=torch.float32).decoder.layers[0].mlp.router
    x_TBD = torch.randn(50, 2, 64)
    with torch.no_grad():
        probs, chosen = router(x_TBD)
    return {"logits": (x_TBD @ router.weight.T).flatten(0, 1), "probs": probs, "chosen": chosen}


def test_d15_routing_is_limited_to_groups_and_scaled(gloo):
    """D15: DeepSeek-V2 could not be reproduced: a token chose among all experts, and weights were not scaled.

    Here a group counts as its best expert does: 6 of 16 experts, from 3 of 8 groups, weights times 16.
    """
    flags = {"num-experts": 16, "moe-router-topk": 6, "moe-router-num-groups": 8, "moe-router-group-topk": 3}
    flags |= {"moe-router-topk-scaling-factor": 16.0}
    (seen,) = gloo(1, routes, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    for logits_E, probs_E, chosen_E in zip(seen["logits"], seen["probs"], seen["chosen"], strict=True):
        scores = logits_E.softmax(-1).tolist()
        best = sorted(range(8), key=lambda g: -max(scores[2 * g : 2 * g + 2]))[:3]
        experts = sorted((e for e in range(16) if e // 2 in best), key=lambda e: -scores[e])[:6]
        assert sorted(chosen_E.nonzero()[:, 0].tolist()) == sorted(experts)
        expected = torch.tensor([16 * score if e in experts else 0.0 for e, score in enumerate(scores)])
        torch.testing.assert_close(probs_E.float(), expected, rtol=1e-5, atol=1e-7)
    free = (seen["logits"].topk(6).indices // 2).sort().values
    assert any(len(set(row)) > 3 for row in free.tolist()), "without groups tokens would choose otherwise"
