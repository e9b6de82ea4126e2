"""FLOPs per token against a count of the products that a built model really makes, on one worker.

What has no product of its own in the fast kernels is replaced by its definition written with products: the recurrences
(one token at a time), the short convolution and softmax attention (one query at a time). All else is the real model.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.training.flops import FlopsPerToken
from tests.training.tiny import ARGUMENTS, EXPERTS
from tests.workers import with_model_parallel

SHARED = ["--moe-shared-expert-intermediate-size", "48", "--moe-shared-expert-gate"]
LATENT = [
    *("--multi-latent-attention", "--qk-layernorm", "--no-rope-fusion", "--kv-lora-rank", "24"),
    *("--qk-head-dim", "12", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "16", "--rope-type", "rope"),
]
SHORT = ["--seq-length", "16", "--max-position-embeddings", "16"]
CASES = {
    "gla": (["gla"], ["--gla-expand-k", "0.75"]),
    "linear_attention": (["linear_attention"], ["--expand-v", "2", "--linear-attention-normalize", "true"]),
    "learned map": (["linear_attention"], ["--la-feature-map", "elementwise_product"]),
    "normalized map": (
        ["linear_attention"],
        ["--la-feature-map", "dpfp", "--linear-attention-normalize", "true"],
    ),
    "gated_deltanet": (["gated_deltanet"], []),
    "softmax": (["softmax"], ["--num-query-groups", "2"]),
    "output gate": (["softmax"], ["--num-query-groups", "2", "--attention-output-gate"]),
    "two values for each key": (["gated_deltanet"], ["--gated-deltanet-values-per-key", "2"]),
    "first value": (["rwkv7", "gla", "rwkv7"], []),
    "experts": (["gla", "softmax"], EXPERTS),
    "no feed-forward blocks": (["mamba2", "softmax"], ["--ffn-hidden-size", "0"]),
    "no feed-forward blocks but experts": (["gla"], [*EXPERTS, "--ffn-hidden-size", "0"]),
    "latent attention": (["softmax", "gla"], LATENT),
    "compressed queries": (["softmax"], [*LATENT, "--q-lora-rank", "20"]),
    "shared expert": (["gated_deltanet", "gla"], [*EXPERTS, *SHARED, "--moe-layer-freq", "[0,1]"]),
}
EVERY = CASES | {name: ([name], []) for name in lsm.names() if name not in CASES}


def measure(rank: int, world: int, kinds: list[str], extra: list[str]) -> dict[str, Any]:
    """Operations by part of the model, in one forward pass and in a backward pass, and what our formulas say."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.utils.flop_counter import FlopCounterMode

    from linear_moe.model.builder import LinearMoEBuilder, padded_vocab_size
    from linear_moe.training import arguments
    from linear_moe.training.flops import flops_per_token
    from linear_moe.training.pretrain import prepare_arguments

    layers = ["--num-layers", str(len(kinds)), "--layer-kinds", ",".join(kinds)]
    usual = [word for word in ARGUMENTS if word != "--group-query-attention" or "--kv-lora-rank" not in extra]
    args = prepare_arguments([*usual, *SHORT, *layers, *extra])
    with with_model_parallel():
        config = arguments.model_config(args)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
        tokens = torch.randint(0, 127, (1, args.seq_length))
        with with_products(), FlopCounterMode(display=False, depth=None) as forward:
            loss = model(tokens, torch.arange(args.seq_length)[None], None, labels=tokens).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    parts = {"mixers": "self_attention", "feed_forward": "mlp", "head": "output_layer"}
    by_module = {module: sum(ops.values()) for module, ops in forward.get_flop_counts().items()}
    found = {
        part: sum(n for module, n in by_module.items() if module.endswith(f".{name}"))
        for part, name in parts.items()
    }
    flops = flops_per_token(config.transformer, padded_vocab_size(config))
    return {
        "tokens": args.seq_length,
        "found": found,
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
        "flops": flops,
    }


@contextlib.contextmanager
def with_products() -> Iterator[None]:
    """Replace what multiplies element by element, or more than its definition does."""
    from linear_moe import kernels
    from linear_moe.lsm import memories, quadratic, split
    from linear_moe.model.attention import CoreAttention

    with (
        mock.patch.multiple(
            kernels, diag_decay=diag_decay, delta_rule=delta_rule, dplr_delta_rule=dplr_delta_rule
        ),
        mock.patch.object(split, "conv_and_split", convolution),
        mock.patch.object(memories, "_biased", biased),
        mock.patch.object(quadratic.QuadraticAttention, "scan", quadratic_attention),
        mock.patch.object(CoreAttention, "forward", softmax),
    ):
        yield


def biased(table: Any, x_MHW: Tensor, w: dict[str, Tensor], slots: Any) -> Tensor:
    """Biases of a slot's memory, which are added."""
    parts = list(x_MHW.split([p.width for p in table], -1))
    for i, p in enumerate(table):
        if p.bias:
            bias_EHw = w[f"memory_{p.name}_bias"].transpose(0, 1)
            parts[i] = parts[i] + bias_EHw[slots.memory.clamp(max=len(bias_EHw) - 1)]
    return torch.cat(parts, -1)


def diag_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Two products a token: what is written and what is read. Some decay and bonus, for their gradients."""
    batch, _, heads, width = v.shape
    if (bonus := options.get("bonus")) is not None:
        v = v * bonus.mean(-1)[:, None]
    fade = _fade(v, log_decay, options.get("log_decay_v"))
    S, outputs = torch.zeros(batch * heads, k.shape[3], width), []
    for q_t, k_t, v_t, a_t in zip(*(_rows(x, heads) for x in (q, k, v, fade)), strict=True):
        S = S * a_t + torch.bmm(k_t.mT, v_t)
        outputs.append(torch.bmm(q_t, S))
    return _result(outputs, S, v, options)


def quadratic_attention(mixer: Any, *, state: Any, cu_seqlens: Any, **gated: Tensor) -> tuple[Tensor, Any]:
    """The first tokens as all others."""
    taken = {name: gated[name] for name in "qkv"}
    sums, memory = mixer.sums(state=state, cu_seqlens=cu_seqlens, **taken)
    return mixer.divided(sums[..., :-1], sums[..., -1:]), memory


def _result(outputs: list[Tensor], S: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``[B, T, H, V]``, and a memory of the right shape."""
    batch, _, heads, _ = v.shape
    cu_seqlens = options.get("cu_seqlens")
    runs = batch if cu_seqlens is None else len(cu_seqlens) - 1
    o = torch.stack(outputs).squeeze(2).unflatten(1, (batch, heads)).transpose(0, 1)
    return o, S.new_zeros(runs, heads, *S.shape[1:])


def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Four products a token: what is held under ``a``, its write under ``b``, what is written and what is read."""
    batch, _, heads, width = v.shape
    fade = _fade(v, log_decay, None)
    S, outputs = torch.zeros(batch * heads, k.shape[3], width), []
    rows = (_rows(x, heads) for x in (q, k, v, a, b, fade))
    for q_t, k_t, v_t, a_t, b_t, fade_t in zip(*rows, strict=True):
        S = S * fade_t + torch.bmm(b_t.mT, torch.bmm(a_t, S)) + torch.bmm(k_t.mT, v_t)
        outputs.append(torch.bmm(q_t, S))
    return _result(outputs, S, v, options)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Three products a token: what the key held, what is written and what is read."""
    batch, _, heads, width = v.shape
    fade = _fade(v, log_decay, None)
    S, outputs = torch.zeros(batch * heads, k.shape[3], width), []
    rows = (_rows(x, heads) for x in (q, k, v, fade, beta[..., None]))
    for q_t, k_t, v_t, a_t, b_t in zip(*rows, strict=True):
        S = S * a_t
        S = S + torch.bmm(k_t.mT, b_t * (v_t - torch.bmm(k_t, S)))
        outputs.append(torch.bmm(q_t, S))
    return _result(outputs, S, v, options)


def _fade(v: Tensor, *logs: Tensor | None) -> Tensor:
    """A factor for each token and head, ``[B, T, H, 1]``, that every decay has a gradient through."""
    fade = torch.ones_like(v[..., :1])
    for log in logs:
        if log is not None:
            fade = fade * (log.mean(-1, keepdim=True) if log.ndim == 4 else log[..., None]).exp()
    return fade


def _rows(x_BTGK: Tensor, heads: int) -> Tensor:
    """``[T, B * H, 1, K]``."""
    x = x_BTGK.repeat_interleave(heads // x_BTGK.shape[2], dim=2)
    return x.permute(1, 0, 2, 3).flatten(1, 2).unsqueeze(2)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, widths: tuple[int, ...], **options: Any
) -> tuple[Tensor, ...]:
    """One product of each channel's window with its taps."""
    _, channels, width = weight.shape
    padded = torch.nn.functional.pad(x[..., :channels], (0, 0, 0, 0, width - 1, 0))
    windows_BTHCW = padded.unfold(1, width, 1)
    B, T, H, C, _ = windows_BTHCW.shape
    windows = windows_BTHCW.permute(2, 3, 0, 1, 4).reshape(H * C, B * T, width)
    y = torch.bmm(windows, weight.reshape(H * C, width, 1)).view(H, C, B, T).permute(2, 3, 0, 1)
    cu_seqlens = options.get("cu_seqlens")
    runs = B if cu_seqlens is None else len(cu_seqlens) - 1
    parts = torch.cat([y, x[..., channels:]], -1).split(widths, dim=-1)
    return *parts, x.new_zeros(runs, width - 1, H, C)


def softmax(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every query with the keys up to its own."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (
        x.permute(1, 2, 0, 3).flatten(0, 1)
        for x in (query, *(x.repeat_interleave(group, 2) for x in (key, value)))
    )
    outputs = []
    for t in range(q.shape[1]):
        weights = torch.bmm(q[:, t : t + 1], k[:, : t + 1].mT).softmax(-1)
        outputs.append(torch.bmm(weights, v[:, : t + 1]))
    out_BHTV = torch.cat(outputs, 1).unflatten(0, (query.shape[1], query.shape[2]))
    return out_BHTV.permute(2, 0, 1, 3).flatten(2)


@pytest.fixture(scope="module")
def measured(_pool):
    cache: dict[str, dict[str, Any]] = {}

    def of(case: str) -> SimpleNamespace:
        if case not in cache:
            (cache[case],) = _pool.run(1, measure, *EVERY[case])
        return SimpleNamespace(**cache[case])

    return of


@pytest.mark.parametrize("case", EVERY)
def test_parts_of_a_forward_pass(measured, case):
    """Exactly, for mixers, softmax attention, dense feed-forward, router, experts, shared expert and logits."""
    m = measured(case)
    pairs = m.tokens * (m.tokens + 1) // 2
    assert m.found == {
        "mixers": m.flops.mixers * m.tokens + m.flops.per_pair * pairs,
        "feed_forward": m.flops.feed_forward * m.tokens,
        "head": m.flops.head * m.tokens,
    }


@pytest.mark.parametrize("case", EVERY)
def test_a_training_step(measured, case):
    """Three times a forward pass, but for the diagonal of the scores and gradients that nobody needs."""
    m = measured(case)
    assert m.forward == pytest.approx(sum(m.found.values()), rel=1e-3)  # rotary angles are a product too
    found = m.flops.training(m.tokens, m.tokens**2)
    assert found == pytest.approx(m.forward + m.backward, rel=0.02)


def test_softmax_is_quadratic_and_linear_layers_are_linear():
    linear = FlopsPerToken(mixers=100, feed_forward=50, head=10, per_pair=0)
    hybrid = FlopsPerToken(mixers=100, feed_forward=50, head=10, per_pair=8)
    assert linear.training(4096, 4096**2) == 4096 / 1024 * linear.training(1024, 1024**2)
    scores = [hybrid.training(n, n**2) - linear.training(n, n**2) for n in (1024, 4096)]
    assert scores[1] == 16 * scores[0] == 3 * 8 * 4096**2 / 2


def test_length_of_the_sequence_costs_softmax_layers_only(measured):
    """Of real configs: no mixer has a part per pair of tokens."""
    assert all(measured(name).flops.per_pair == 0 for name in lsm.names())
    assert measured("softmax").flops.per_pair == measured("experts").flops.per_pair > 0


def test_packed_documents_cost_less():
    flops = FlopsPerToken(mixers=100, feed_forward=50, head=10, per_pair=8)
    whole, halves = flops.training(1024, 1024**2), flops.training(1024, 2 * 512**2)
    assert whole - halves == 3 * 8 * 1024**2 / 4


def as_megatron_asks(rank: int, world: int) -> None:
    import inspect

    from megatron.training import training

    from linear_moe.training import engine
    from linear_moe.training.pretrain import step_flops

    stock = engine.stock(training, "num_floating_point_operations")
    assert [*inspect.signature(step_flops).parameters][1:] == [*inspect.signature(stock).parameters]
    flops, args = (
        FlopsPerToken(mixers=100, feed_forward=50, head=10, per_pair=8),
        SimpleNamespace(seq_length=16),
    )
    assert step_flops(flops, args, 4) == 4 * flops.training(16, 16**2)
    assert step_flops(flops, args, 4, 100.0, 30.0) == flops.training(30, 100)


def test_the_operations_of_a_step_as_megatron_asks_for_them(gloo):
    """Of whole sequences, or of the tokens and squared lengths that packed documents have."""
    gloo(1, as_megatron_asks)
