"""Softmax attention against loops over queries and keys, in float64."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from linear_moe.model import attention
from linear_moe.model.attention import CoreAttention
from linear_moe.parallel.layout import SequenceLayout
from tests.workers import with_model_parallel

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
B, S, H, G, K, V = 2, 16, 4, 2, 6, 5
DOCUMENTS = [[0, 5, 6, 16, 16], [0, 0, 8, 9, 16]]


def core_attention(cp_group=ALONE, attn_mask_type=AttnMaskType.causal, **kwargs) -> CoreAttention:
    names = {"softmax_scale", "attention_type"} & set(kwargs)
    options = {name: kwargs.pop(name) for name in names}
    kwargs = {"attention_dropout": 0.0, **kwargs}
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=H, **kwargs)
    groups = SimpleNamespace(tp=ALONE, cp=cp_group)
    return CoreAttention(config, 1, attn_mask_type, pg_collection=groups, **options)


def inputs(queries: int = S, groups: int = G, value_dim: int = V, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, B, H, K), (S, B, groups, K), (S, B, groups, value_dim)]
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes
    ]


def packed(rows) -> PackedSeqParams:
    cu_seqlens = torch.tensor(rows, dtype=torch.int32)
    return PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def by_definition(q, k, v, scale=None, documents=None, masked=None) -> torch.Tensor:
    """One query at a time; the queries are the last tokens of the keys."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    owner = [[sum(t >= end for end in row[1:]) for t in range(S)] for row in (documents or [[0, S]] * B)]
    offset = k.shape[0] - q.shape[0]
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, h, i in itertools.product(range(B), range(H), range(q.shape[0])):
        t, g = i + offset, h // (H // k.shape[2])
        seen = [
            s
            for s in range(t + 1)
            if owner[b][s] == owner[b][t] and (masked is None or not masked[b, 0, i, s])
        ]
        if seen:
            weights = (k[seen, b, g] @ q[i, b, h] * scale).softmax(0)
            out[i, b, h] = weights @ v[seen, b, g]
    return out.flatten(2)


def same_with_gradients(got: torch.Tensor, true: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, true, atol=1e-12, rtol=1e-10)
    weight = torch.randn_like(true)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (got, true)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "packed"])
@pytest.mark.parametrize("groups", [H, G, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_training(documents, groups, scale):
    leaves = inputs(groups=groups)
    params = None if documents is None else packed(documents)
    got = core_attention(softmax_scale=scale)(*leaves, None, packed_seq_params=params)
    assert got.shape == (S, B, H * V) and got.is_contiguous()
    same_with_gradients(got, by_definition(*leaves, scale, documents), leaves)


def test_thd():
    q, k, v = inputs()
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 5, 6, 16], dtype=torch.int32))
    got = core_attention()(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=params)
    assert got.shape == (S, H * V)
    true = by_definition(q, k, v, documents=[DOCUMENTS[0], [0, S]])[:, 0]
    same_with_gradients(got, true, [q, k, v])


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("attn_mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_decoding_queries_are_the_last_tokens(queries, attn_mask_type):
    leaves = inputs(queries=queries)
    got = core_attention().eval()(*leaves, None, attn_mask_type=attn_mask_type)
    same_with_gradients(got, by_definition(*leaves), leaves)


@pytest.mark.parametrize("queries", [S, 3])
def test_left_padding_mask(queries):
    leaves = inputs(queries=queries)
    padded = torch.tensor([[True] * 4 + [False] * 12, [False] * 16])[:, None, None]
    masked = padded | torch.ones(queries, S, dtype=torch.bool).triu(S - queries + 1)
    got = core_attention()(*leaves, masked)
    assert torch.isfinite(got).all()
    same_with_gradients(got, by_definition(*leaves, masked=masked.expand(B, 1, queries, S)), leaves)
    assert torch.equal(core_attention()(*leaves, padded.expand(B, 1, queries, S)), got)


def test_multi_latent_attention_head_sizes():
    leaves = inputs(groups=H, value_dim=3)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=H, attention_dropout=0.0)
    core = CoreAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=0.3,
        k_channels=K,
        v_channels=3,
        cp_comm_type=None,
        pg_collection=SimpleNamespace(tp=ALONE, cp=ALONE),
    )
    same_with_gradients(core(*leaves, None), by_definition(*leaves, 0.3), leaves)


@pytest.mark.parametrize(
    ("training", "masked", "with_cudnn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_cudnn_is_for_training_without_a_mask(monkeypatch, training, masked, with_cudnn):
    """On a GPU, whose tensors these pretend to be: gradients behind a mask may be NaN, and every length is planned."""
    seen, real, kernels = [], attention.F.scaled_dot_product_attention, attention._kernels

    def noted(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(attention, "_kernels", lambda is_cuda, *others: kernels(True, *others))
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    core, mask = core_attention().train(training), torch.zeros(1, 1, S, S, dtype=torch.bool)
    core(*(torch.randn(S, B, H, 8) for _ in range(3)), mask if masked else None)
    assert seen == [with_cudnn] and torch.backends.cuda.cudnn_sdp_enabled()


def test_dropout_only_in_training(monkeypatch):
    leaves = inputs()
    core = core_attention(attention_dropout=0.5, sequence_parallel=False)
    forks = []
    monkeypatch.setattr(
        attention.tensor_parallel,
        "get_cuda_rng_tracker",
        lambda: SimpleNamespace(fork=lambda: forks.append(1) or attention.nullcontext()),
    )
    torch.testing.assert_close(core.eval()(*leaves, None), by_definition(*leaves))
    assert not forks
    core.train()
    many = torch.stack([core(*leaves, None) for _ in range(100)])
    assert forks and not torch.equal(many[0], many[1])
    expected = by_definition(*leaves)
    assert ((many.mean(0) - expected).abs() < 6 * many.std(0) / 10 + 1e-9).all()  # unbiased
    forks.clear()
    core.config.sequence_parallel = True  # Megatron has switched to the generator of the rank
    core(*leaves, None)
    assert not forks


@pytest.mark.parametrize(
    "problem",
    [
        {"window_size": (4, 0)},
        {"softmax_type": "learnable"},
        {"apply_query_key_layer_scaling": True},
        {"qk_clip": True},
        {"log_max_attention_logit": True},
        {"attention_type": "cross"},
        {"attn_mask_type": AttnMaskType.padding},
    ],
)
def test_what_is_not_here_is_refused(problem):
    with pytest.raises(ValueError, match=r"\n  why: .*\n  try: "):
        core_attention(**problem)


def test_what_cannot_be_combined_is_refused():
    q, k, v = inputs()
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    refused = [
        lambda: core_attention(two)(q, k, v, mask),
        lambda: core_attention(two)(q[:4], k, v, None),
        lambda: core_attention()(q[:1], k, v, None, packed_seq_params=packed([[0, 1]] * B)),
        lambda: core_attention()(q, k, v, None, attention_bias=mask),
        lambda: core_attention()(q, k, v, mask.double()),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"\n  why: .*\n  try: "):
            call()


def test_ragged_batch_of_documents(monkeypatch):
    """What the packed CUDA path hands to PyTorch, run by a loop over its rows."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert cu_seq_q.diff().max() <= max_q and cu_seq_k.diff().max() <= max_k
        assert cu_seq_q[-1] == len(q) and cu_seq_k[-1] == len(k)
        out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        rows = zip(cu_seq_q.tolist(), cu_seq_q[1:], cu_seq_k.tolist(), cu_seq_k[1:], strict=False)
        for q0, q1, k0, k1 in rows:
            for i, h in itertools.product(range(q0, q1), range(H)):
                seen = slice(k0, k1 - (q1 - 1 - i))
                weights = (k[seen, h // (H // G)] @ q[i, h] * scale).softmax(0)
                out[i, h] = weights @ v[seen, h // (H // G)]
        return out

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    q, k, v = (x.detach() for x in inputs())
    true = by_definition(q, k, v, documents=DOCUMENTS).unflatten(2, (H, V))
    layout = SequenceLayout(B, S, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))
    for start, end in ((0, 16), (0, 4), (4, 8), (8, 12), (12, 16)):
        got = attention._documents(q[start:end], k[:end], v[:end], layout, 1 / math.sqrt(K))
        torch.testing.assert_close(got, true[start:end])


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype", "ragged"),
    [
        (16, 16, torch.bfloat16, True),
        (16, 8, torch.float16, True),
        (256, 8, torch.bfloat16, True),
        (264, 8, torch.bfloat16, False),
        (12, 12, torch.bfloat16, False),
        (8, 16, torch.bfloat16, False),
        (16, 16, torch.float32, False),
    ],
)
def test_documents_need_no_mask_where_flash_attention_runs(monkeypatch, key_dim, value_dim, dtype, ragged):
    """On a GPU: values are as wide as keys there, by zeros that are cut off again."""
    true = [torch.randn(S, B, heads, width) for heads, width in ((H, key_dim), (G, key_dim), (G, value_dim))]
    q, k, v = (x.to(dtype).as_subclass(OnGpu) for x in true)
    rows = []

    def documents(q, k, v, layout, scale):
        rows.append(v.shape[-1])
        return core._sdpa(q, k, v, layout, None, scale)

    monkeypatch.setattr(attention, "_documents", documents)
    monkeypatch.setattr(attention, "_warn_of_mask_once", lambda is_cuda: None)
    core = core_attention().eval()
    expected = by_definition(*(x.to(dtype).double() for x in true), documents=DOCUMENTS)
    for mask in (None, torch.zeros(1, 1, S, S, dtype=torch.bool)):
        got = core(q, k, v, mask, packed_seq_params=packed(DOCUMENTS))
        assert got.shape == (S, B, H * value_dim)
        torch.testing.assert_close(got.as_subclass(torch.Tensor).double(), expected, atol=3e-2, rtol=2e-2)
    core.train().attention_dropout, core.config.sequence_parallel = 0.5, True
    core(q, k, v, None, packed_seq_params=packed(DOCUMENTS))
    assert rows == [key_dim] * ragged  # never with a mask, nor with dropout


def attend_in_parallel(rank: int, world_size: int, documents) -> list[torch.Tensor]:
    """Output and gradients of this rank's tokens, and of nobody else's."""
    from megatron.core import parallel_state

    with with_model_parallel(cp=world_size):
        layout = SequenceLayout(B, S, world_size, rank)
        whole = inputs()
        leaves = [layout.take(x.detach(), dim=0).requires_grad_() for x in whole]
        core = core_attention(parallel_state.get_context_parallel_group())
        params = None if documents is None else packed(documents)
        out = core(*leaves, None, packed_seq_params=params)
        weight = torch.randn(S, B, H * V, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        grads = torch.autograd.grad((out * layout.take(weight, dim=0)).sum(), leaves)
        return [out.detach(), *grads]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "packed"])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_is_one_process(gloo, cp_size, documents):
    leaves = inputs()
    out = by_definition(*leaves, documents=documents)
    weight = torch.randn(S, B, H * V, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    true = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    for rank, found in enumerate(gloo(cp_size, attend_in_parallel, documents)):
        layout = SequenceLayout(B, S, cp_size, rank)
        for got, whole in zip(found, true, strict=True):
            torch.testing.assert_close(got, layout.take(whole, dim=0), atol=1e-12, rtol=1e-10)
