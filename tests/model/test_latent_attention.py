"""Multi-head latent attention on our core attention: packed documents are as if alone, over ranks too."""

import itertools
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules

from linear_moe.model.backend import make_backend
from linear_moe.model.latent_attention import LatentAttention
from linear_moe.parallel.layout import SequenceLayout
from tests.workers import with_model_parallel

S, D = 16, 32
DOCUMENTS = [0, 5, 6, 16]


def layer(kind: type, rope_type: str, cp_size: int = 1, **parallel: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    blocks = make_backend("local")
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=4,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        rope_type=rope_type,
        original_max_position_embeddings=8,  # YaRN stretches it
        apply_rope_fusion=False,
        attention_dropout=0.0,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        params_dtype=torch.float64,
        context_parallel_size=cp_size,
        **parallel,
    )
    return kind(
        config,
        MLASelfAttentionSubmodules(
            linear_q_proj=blocks.column_parallel_linear(),
            linear_q_down_proj=blocks.column_parallel_linear(),
            linear_q_up_proj=blocks.column_parallel_linear(),
            linear_kv_down_proj=blocks.column_parallel_linear(),
            linear_kv_up_proj=blocks.column_parallel_linear(),
            core_attention=blocks.core_attention(),
            linear_proj=blocks.row_parallel_linear(),
            q_layernorm=blocks.layer_norm(rms_norm=True, for_qk=True),
            kv_layernorm=blocks.layer_norm(rms_norm=True, for_qk=True),
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def packed(batch: int) -> PackedSeqParams:
    cu_seqlens = torch.tensor([DOCUMENTS] * batch, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=S, max_seqlen_kv=S
    )


def tokens(batch: int) -> torch.Tensor:
    return torch.randn(S, batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def whole(rank: int, world_size: int, rope_type: str, batch: int) -> list[torch.Tensor]:
    """Outputs and gradients: documents packed, and one by one through Megatron's own class."""
    results = []
    for kind in (LatentAttention, MLASelfAttention):
        with with_model_parallel():
            module = layer(kind, rope_type)
            x = tokens(batch).requires_grad_()
            if kind is LatentAttention:
                out, _ = module(x, None, packed_seq_params=packed(batch))
            else:
                out = torch.cat([module(x[a:b], None)[0] for a, b in itertools.pairwise(DOCUMENTS)])
            (out * out.detach().cos()).sum().backward()
            results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    return results


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_as_if_alone(gloo, batch):
    [(found, true)] = gloo(1, whole, "rope", batch)
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-7)  # rotary tables are float32


def one_rank(rank: int, world_size: int, batch: int) -> list[torch.Tensor]:
    with with_model_parallel(cp=world_size):
        module = layer(LatentAttention, "yarn", world_size)
        layout = SequenceLayout(batch, S, world_size, rank)
        x = layout.take(tokens(batch), dim=0).requires_grad_()
        out, _ = module(x, None, packed_seq_params=packed(batch))
        (out * out.detach().cos()).sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("batch", [1, 2])
def test_context_parallel_is_one_process(gloo, batch):
    [true] = gloo(1, one_rank, batch)
    ranks = gloo(2, one_rank, batch)
    for rank, found in enumerate(ranks):
        layout = SequenceLayout(batch, S, 2, rank)
        for got, expected in zip(found[:2], true[:2], strict=True):
            torch.testing.assert_close(got, layout.take(expected, dim=0), atol=1e-10, rtol=1e-7)
    for *parts, expected in zip(*(found[2:] for found in ranks), true[2:], strict=True):
        torch.testing.assert_close(sum(parts), expected, atol=1e-10, rtol=1e-7)


def tensor_parallel(
    rank: int, world_size: int, sp: bool
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Output, gradient of the input and of every parameter, all whole, from a layer cut over the ranks."""
    import torch.distributed as dist

    def whole_of(x: torch.Tensor, dim: int) -> torch.Tensor:
        pieces = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(pieces, x.contiguous())
        return torch.cat(pieces, dim)

    with with_model_parallel(tp=world_size):
        module = layer(LatentAttention, "yarn", tensor_model_parallel_size=world_size, sequence_parallel=sp)
        draw, cuts = torch.Generator().manual_seed(3), {}
        for name, p in module.named_parameters():
            cut = getattr(p, "partition_dim", -1) if getattr(p, "tensor_model_parallel", False) else -1
            shape = [n * (world_size if i == cut else 1) for i, n in enumerate(p.shape)]
            value = torch.randn(shape, dtype=p.dtype, generator=draw) * 0.3
            p.data = value.chunk(world_size, cut)[rank].clone() if cut >= 0 else value
            cuts[name] = cut
        x = tokens(2)
        x = (x.chunk(world_size)[rank].clone() if sp else x).requires_grad_()
        out, _ = module(x, None)
        (out * out.detach().cos()).sum().backward()
        grads = {}
        for name, p in module.named_parameters():
            if cuts[name] < 0 and sp and world_size > 1:
                assert p.sequence_parallel, f"{name}: Megatron sums the gradient of what is so marked"
                dist.all_reduce(p.grad)
            grads[name] = whole_of(p.grad, cuts[name]) if cuts[name] >= 0 else p.grad
        results = [out.detach(), x.grad]
        return [whole_of(y, 0) for y in results] if sp else results, grads


@pytest.mark.parametrize("sp", [False, True])
def test_tensor_parallel_is_one_process(gloo, sp):
    """The gradient of the one rotary key counts the heads of all ranks."""
    [(true, true_grads)] = gloo(1, tensor_parallel, False)
    found, grads = gloo(2, tensor_parallel, sp)[0]
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-7)
    for name, expected in true_grads.items():
        torch.testing.assert_close(
            grads[name], expected, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
