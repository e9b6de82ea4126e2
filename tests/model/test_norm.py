"""Norms against their formulas, and their weight gradients under sequence parallelism."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from linear_moe.model.backend import make_backend
from linear_moe.model.config import LinearMoEConfig
from linear_moe.model.norm import LayerNorm, ResidualRMSNorm, RMSNorm
from linear_moe.model.specs import layer_spec
from tests.workers import with_model_parallel

SIZE, EPS = 6, 1e-3
NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def config(**kwargs) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=SIZE, num_attention_heads=2, use_cpu_initialization=True, **kwargs
    )


def by_definition(name: str, x, weight, bias=None):
    if name == "RMSNorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_formula_and_gradients(name, zero_centered):
    options = config(params_dtype=torch.float64, layernorm_zero_centered_gamma=zero_centered)
    norm = NORMS[name](config=options, hidden_size=SIZE, eps=EPS)
    assert list(norm.state_dict()) == ["weight", "bias"][: len(list(norm.parameters()))]
    assert torch.equal(norm.weight, torch.full((SIZE,), 0.0 if zero_centered else 1.0))
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 2, SIZE, dtype=torch.float64, requires_grad=True)
    parameters = dict(norm.named_parameters())
    weight = parameters["weight"] + 1 if zero_centered else parameters["weight"]
    found, true = norm(x), by_definition(name, x, weight, parameters.get("bias"))
    torch.testing.assert_close(found, true, atol=1e-12, rtol=1e-12)
    leaves, direction = [x, *norm.parameters()], torch.randn_like(true)
    grads = [torch.autograd.grad((y * direction).sum(), leaves) for y in (found, true)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_float32(name):
    norm = NORMS[name](config(params_dtype=torch.bfloat16), SIZE, EPS)
    x = (torch.randn(64, SIZE) * 300 + 100).bfloat16()
    true = by_definition(name, x.double(), 1.0, 0.0)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), true, atol=1e-2, rtol=2**-8)
    assert norm(x.float()).dtype == torch.float32
    norm = NORMS[name](config(params_dtype=torch.bfloat16, fp32_residual_connection=True), SIZE, EPS)
    assert norm(x.float()).dtype == norm(x).dtype == torch.bfloat16  # what the projections behind it take
    torch.testing.assert_close(norm(x.float()).double(), true, atol=1e-2, rtol=2**-8)


def test_small_offsets_from_one_are_kept():
    """1 + 1/500 is 1 in bfloat16: over all tokens, the sizes must still be those of the offsets."""
    norm = RMSNorm(config(params_dtype=torch.bfloat16, layernorm_zero_centered_gamma=True), SIZE, EPS)
    norm.weight.data.fill_(1 / 500)
    x = torch.randn(4096, SIZE).bfloat16()
    ratio = norm(x).double() / by_definition("RMSNorm", x.double(), 1.0)
    assert ratio.mean().item() == pytest.approx(1 + 1 / 500, abs=5e-4)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_residual_goes_by_the_norm(zero_centered):
    """Its gradient is added to the norm's, and nothing is copied."""
    options = config(params_dtype=torch.float64, layernorm_zero_centered_gamma=zero_centered)
    norm, plain = ResidualRMSNorm(options, SIZE, EPS), RMSNorm(options, SIZE, EPS)
    assert list(norm.state_dict()) == list(plain.state_dict())
    x = torch.randn(5, 2, SIZE, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    y, residual = norm(x)
    assert residual.data_ptr() == x.data_ptr() and torch.equal(residual, x) and torch.equal(y, plain(x))
    found, true = ((a + b.cos() * direction).square().sum() for a, b in ((y, residual), (plain(x), x)))
    torch.testing.assert_close(*(torch.autograd.grad(z, x) for z in (found, true)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_pass_their_residual_on(recomputed):
    """But for norms that are recomputed: what those give is freed."""
    chosen = dict(recompute_granularity="selective", recompute_modules=["layernorm"]) if recomputed else {}
    options = LinearMoEConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        layer_kinds=["gla"],
        normalization="RMSNorm",
        **chosen,
    )
    layer = layer_spec(options, make_backend("local"), "gla", False).submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is (RMSNorm if recomputed else ResidualRMSNorm)


def weight_gradients(rank: int, world_size: int, sequence_parallel: bool) -> list[torch.Tensor]:
    """Gradients after Megatron's finalizer, each rank having seen its share of the tokens."""
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    with with_model_parallel(tp=world_size):
        options = config(
            params_dtype=torch.float64,
            tensor_model_parallel_size=world_size,
            sequence_parallel=sequence_parallel,
        )
        norm = LayerNorm(options, SIZE, EPS)
        x, direction = tokens()
        if sequence_parallel:
            x, direction = (y.chunk(world_size)[rank] for y in (x, direction))
        (norm(x) * direction).sum().backward()
        for parameter in norm.parameters():
            parameter.main_grad = parameter.grad
        norm.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
        _allreduce_non_tensor_model_parallel_grads([norm], options)
        return [parameter.main_grad for parameter in norm.parameters()]


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 8, 3, SIZE, dtype=torch.float64, generator=generator)
    return x, direction


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_gradients_under_tensor_parallelism(gloo, sequence_parallel):
    norm = LayerNorm(config(params_dtype=torch.float64), SIZE, EPS)
    x, direction = tokens()
    (norm(x) * direction).sum().backward()
    for found in gloo(2, weight_gradients, sequence_parallel):
        for got, parameter in zip(found, norm.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, atol=1e-12, rtol=1e-12)
