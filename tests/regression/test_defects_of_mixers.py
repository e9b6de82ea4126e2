"""Defects D1-D5, D12, D16 and D17 of the earlier system (its token mixers), each with the test that it would fail.

The list is section 2.1 of the study of that system. Every registered mixer is tested, in one-layer models.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import lsm
from tests.regression.whole_models import (
    build,
    changed,
    cp_logits,
    difference,
    logits,
    of_models,
    random_tokens,
    stepwise,
)
from tests.training.tiny import ARGUMENTS

MIXTURES = ("mom_gated_deltanet", "mom_gla")
"""Mixtures of memories share one file; these two are the paper's. Hazards of their own: test_mom_hazards.py."""
MIXERS = [name for name in lsm.names() if name in MIXTURES or not name.startswith("mom_")]
DELTA = [name for name in MIXERS if name in ("deltanet", "gated_deltanet")]
BARE = ("output-norm", "identity"), ("output-gate", "none")


def options(name: str, *pairs: tuple[str, str]) -> list[str]:
    """Flags of one mixer."""
    return [word for key, value in pairs for word in (f"--{name}-{key}".replace("_", "-"), value)]


def hidden(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(_pool) -> dict[str, dict[str, Any]]:
    """What the functions say of a model of every mixer, in one process."""
    measures = [by_steps, edited, sample_by_sample, of_zeros, layer_by_steps]
    return _pool.run(1, of_models, MIXERS, measures)[0]


@pytest.fixture(scope="module")
def over_ranks(_pool) -> dict[str, dict[str, Any]]:
    """The same over two context-parallel ranks."""
    return _pool.run(2, of_models, MIXERS, [whole, edited], "--context-parallel-size", "2")[0]


# D1: an RNN layer returned a bare tensor where Megatron unpacks (output, bias): rows 0 and 1 became output and bias


def layer_by_steps(model: Any) -> list[dict[str, Any]]:
    layer = model.decoder.layers[0]
    layer.mlp.linear_fc2.weight.data.zero_()  # the layer adds what its mixer says, and nothing else
    return [at_once_and_by_steps(layer, length) for length in (2, 7)]


def at_once_and_by_steps(layer: Any, length: int) -> dict[str, Any]:
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    x_TBD, mixed = hidden(length, 3, 64), []
    context = StaticInferenceContext(3, length)
    with torch.no_grad():
        out, bias = layer.self_attention(x_TBD)
        assert out.shape == x_TBD.shape and bias is None
        found, _ = layer(x_TBD, attention_mask=None)
        normed_TBD, _ = layer.input_layernorm(x_TBD)
        for x_1BD in normed_TBD.split(1):
            mixed.append(layer.self_attention(x_1BD, inference_context=context)[0])
            context.sequence_len_offset += 1
    return {
        "found": found - x_TBD,
        "truth": torch.cat(mixed),
        "suppressed": torch._dynamo.config.suppress_errors,
    }


@pytest.mark.parametrize("name", MIXERS)
def test_d01_every_token_gets_its_own_output(alone, name):
    """D1: recurrent layers put o[0] + o[1] at every position, silently, and compile errors were hidden.

    Here a transformer layer adds to each token what its mixer says of that token, as in a loop over the tokens. Two
    tokens are the length at which a bare tensor unpacks into output and bias without an error.
    """
    for seen in alone[name]["layer_by_steps"]:
        assert difference(seen["found"], seen["truth"]) < 1e-10
        assert difference(seen["found"][0], seen["found"][1]) > 1e-2, "tokens differ"
        assert not seen["suppressed"]


# D2 and D3: LASP-2 saw only earlier blocks of 256 tokens, and its other form had no mask inside a tile of 64


TOKENS_BS = random_tokens(2, 44)
LONGER_BS, EDITS = random_tokens(2, 72), (40, 64)


def read(model: Any, tokens_BS: Tensor) -> Tensor:
    """Logits ``[B, S, V]``, from context-parallel ranks if there are several."""
    from megatron.core import mpu

    with torch.no_grad():
        return cp_logits(model, tokens_BS, mpu.get_context_parallel_group())


def whole(model: Any) -> Tensor:
    return read(model, TOKENS_BS)


def by_steps(model: Any) -> Tensor:
    return stepwise(model, TOKENS_BS)


def edited(model: Any) -> list[Tensor]:
    """As the tokens are, and with another token at each of the places."""
    sequences = [LONGER_BS, *(changed(LONGER_BS, slice(None), place) for place in EDITS)]
    return [read(model, tokens_BS) for tokens_BS in sequences]


def test_d02_context_parallel_sees_every_block(alone, over_ranks):
    """D2: LASP-2 left out the block of the token itself, so the first outputs were 0, and tails were never written.

    Here two ranks with 22 tokens each (no multiple of any block, fewer than one) give what one process gives that
    reads one token after the other.
    """
    for name in MIXERS:
        assert difference(over_ranks[name]["whole"], alone[name]["by_steps"]) < 1e-10, name


@pytest.mark.parametrize("ranks", ["alone", "over_ranks"])
def test_d03_no_token_sees_a_later_one(request, ranks):
    """D3: without a mask inside the diagonal tile, editing token 40 changed output 5.

    Here outputs before an edited token stay as they are, in one process and over context-parallel ranks.
    """
    for name, seen in request.getfixturevalue(ranks).items():
        before, *after = seen["edited"]
        for place, changed_BSV in zip(EDITS, after, strict=True):
            assert difference(changed_BSV[:, :place], before[:, :place]) < 1e-12, (name, place)
            assert difference(changed_BSV[:, place], before[:, place]) > 1e-6, (name, place)


# D4: beta was handed over as [T, H, B] to a kernel that reads [B, H, T]


def strengths(rank: int, world: int, name: str) -> dict[str, Tensor]:
    """What reaches the output projection, ``[T, B, H, V]``: as it is, with another beta, and with another token."""
    layer = build([name]).decoder.layers[0].self_attention
    mixer, caught = layer.mixer, []
    layer.out_proj.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    offset = 0
    for projection in mixer.fused_projections():
        if projection.name == "b":
            break
        offset += projection.width
    x_TBD = hidden(5, 3, 64)
    with torch.no_grad():
        layer(x_TBD)
        layer.in_proj.weight.data[2 * mixer.fused_width + offset] *= -3
        layer(x_TBD)
        layer.in_proj.weight.data[2 * mixer.fused_width + offset] /= -3
        x_TBD[3, 1] += 1
        layer(x_TBD)
    names = ("plain", "other beta", "other token")
    return {name: o.unflatten(2, (mixer.cfg.num_heads, -1)) for name, o in zip(names, caught, strict=True)}


@pytest.mark.parametrize("name", DELTA)
def test_d04_beta_is_of_its_own_token_head_and_sample(gloo, name):
    """D4: a transposed beta mixed heads, samples of the batch, and future tokens.

    Here beta of one head changes that head alone, and a token of one sample changes that sample alone, from there on.
    """
    (seen,) = gloo(1, strengths, name)
    moved_TBH = (seen["other beta"] - seen["plain"]).abs().amax(-1)
    assert moved_TBH[..., [0, 1, 3]].max() < 1e-12 and moved_TBH[..., 2].min() > 1e-6
    moved_TBH = (seen["other token"] - seen["plain"]).abs().amax(-1)
    assert moved_TBH[:, [0, 2]].max() < 1e-12 and moved_TBH[:3].max() < 1e-12
    assert moved_TBH[3:, 1].min() > 1e-6


# D5: the chunk size was passed where the kernel takes the scale, and q, k, v were not activated


def delta_layer(rank: int, world: int, name: str) -> dict[str, Tensor]:
    layer = build([name], *options(name, ("conv-size", "0"), *BARE)).decoder.layers[0].self_attention
    caught: list[Tensor] = []
    layer.out_proj.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    x_TBD = hidden(70, 2, 64)
    with torch.no_grad():
        layer(x_TBD)
        x_TBHW = (x_TBD @ layer.in_proj.weight.T).unflatten(2, (layer.mixer.cfg.num_heads, -1))
        widths = [projection.width for projection in layer.mixer.fused_projections()]
        names = [projection.name for projection in layer.mixer.fused_projections()]
        parts = dict(zip(names, x_TBHW.split(widths, -1), strict=True))
    parameters = {key: p.detach().double() for key, p in layer.named_parameters()}
    return {"found": caught[0].unflatten(2, (4, -1)), **parts, **parameters}


@pytest.mark.parametrize("name", DELTA)
def test_d05_delta_rule_is_the_published_one(gloo, name):
    """D5: the read was scaled by 64, the chunk size, and q, k, v passed without SiLU.

    Here a layer without norm and gate gives the loop below: SiLU, unit keys and queries, scale K^-1/2.
    """
    (w,) = gloo(1, delta_layer, name)
    q, k, v = (F.silu(w[part] + w[f"{part}_bias"]) for part in "qkv")
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    beta_TBH = torch.sigmoid(w["b"][..., 0])
    decay_TBH = torch.ones_like(beta_TBH)
    if name == "gated_deltanet":
        decay_TBH = torch.exp(-w["A_log"].exp() * F.softplus(w["a"][..., 0] + w["dt_bias"]))
    S_BHKV = torch.zeros(*q.shape[1:], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(len(q)):
        S_BHKV = S_BHKV * decay_TBH[t, ..., None, None]
        wrong_BHV = v[t] - (k[t][..., None] * S_BHKV).sum(-2)
        S_BHKV = S_BHKV + k[t][..., None] * (beta_TBH[t][..., None] * wrong_BHV)[..., None, :]
        outputs.append((q[t][..., None] * S_BHKV).sum(-2) / math.sqrt(q.shape[-1]))
    assert difference(w["found"], torch.stack(outputs)) < 1e-7  # exp(A_log) is a float32


# D12: a bias of q, k and v came with a bias of the output gate


def of_zeros(model: Any) -> dict[str, Any]:
    layer = model.decoder.layers[0].self_attention
    with torch.no_grad():
        out, _ = layer(torch.zeros(6, 2, 64, dtype=torch.float64))
    return {
        "biases": [key for key, _ in layer.named_parameters() if key in ("q_bias", "k_bias", "v_bias")],
        "gate": layer.mixer.cfg.output_gate,
        "largest": out.abs().max().item(),
    }


def test_d12_the_output_gate_has_no_bias(alone):
    """D12: --add-qkv-bias gave the output gate a bias too.

    Here q, k and v have theirs, and an input of zeros still shuts a swish gate: the output is exactly 0.
    """
    assert "--add-qkv-bias" in ARGUMENTS
    found = {name: seen["of_zeros"] for name, seen in alone.items()}
    gated = [name for name in MIXERS if found[name]["gate"] == "swish"]
    assert {"linear_attention", "gla", "gated_deltanet"} <= set(gated)
    for name in ("linear_attention", "gla", "gated_deltanet"):
        assert found[name]["biases"] == ["q_bias", "k_bias", "v_bias"]
    assert {name: found[name]["largest"] for name in gated} == dict.fromkeys(gated, 0.0)


# D16: `output, _ = kernel(...)` of a kernel that returns one tensor: it came apart along the batch


def sample_by_sample(model: Any) -> tuple[Tensor, Tensor]:
    tokens_BT = random_tokens(2, 20)
    with torch.no_grad():
        apart = torch.cat([logits(model, tokens_1T) for tokens_1T in tokens_BT.split(1)])
        return logits(model, tokens_BT), apart


def test_d16_a_batch_of_two_is_two_samples(alone):
    """D16: Based and ReBased dropped the second sample of a batch of two, or failed for any other batch.

    Here both samples come out as they do alone.
    """
    for name, seen in alone.items():
        together, apart = seen["sample_by_sample"]
        assert difference(together, apart) < 1e-10, name


# D17: A_log, dt_bias and the router ran in bfloat16


def recorded(owner: Any, method: str) -> list[Any]:
    """Everything that a method of ``owner`` returns from now on."""
    stock, returned = getattr(owner, method), []

    def recording(*args: Any) -> Any:
        returned.append(stock(*args))
        return returned[-1]

    setattr(owner, method, recording)
    return returned


def in_bfloat16(rank: int, world: int, names: list[str]) -> dict[str, dict[str, Any]]:
    from megatron.core.transformer.module import Float16Module

    from linear_moe.inference.decoder import Decoder
    from tests.workers import leave_model_parallel

    found = {}
    for name in names:
        model = build([name], "--bf16", moe=True, dtype=torch.float32, noise=0.1)
        layer, router = model.decoder.layers[0].self_attention, model.decoder.layers[0].mlp.router
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        model = Float16Module(model.config, model).module.eval()
        gated = recorded(getattr(layer.mixer, "core", layer.mixer), "gates")  # of a mixture: its inner mixer
        routed = recorded(router, "gating")
        decoder = Decoder(model, 2, 8)
        decoder.feed(random_tokens(2, 8))
        memory = decoder.context.key_value_memory_dict[1].memory
        found[name] = {
            "exact": [k.split(".")[-1] for k, p in model.named_parameters() if torch.equal(p, before[k])],
            "table": [table.name for table in layer.mixer.all_parameters() if table.keep_float32],
            "gates": {k: str(x.dtype) for k, x in gated[0].items() if k.startswith(("log_decay", "beta"))},
            "memory": {str(m.dtype) for m in memory},
            "router": {str(x.dtype) for x in routed},
            "activations": str(layer.in_proj.weight.dtype),
        }
        leave_model_parallel()
    return found


def test_d17_gates_and_routers_are_float32_in_bfloat16(gloo):
    """D17: the cast of the model took A_log and dt_bias along, and the router multiplied in bfloat16.

    Here a model cast to bfloat16 keeps those values to the bit, decays, write strengths, memories and router logits are
    float32, and the rest is bfloat16.
    """
    (found,) = gloo(1, in_bfloat16, MIXERS)
    assert {"A_log", "dt_bias"} <= set(found["gated_deltanet"]["exact"])
    assert set(found["gated_deltanet"]["gates"]) == {"log_decay", "beta"}
    for name, seen in found.items():
        assert set(seen["table"]) <= set(seen["exact"]), name
        assert set(seen["gates"].values()) <= {"torch.float32"}, (name, seen["gates"])
        assert seen["memory"] == {"torch.float32"}, name
        assert seen["router"] == {"torch.float32"}, name
        assert seen["activations"] == "torch.bfloat16", name
