"""Stacked experts against a loop over tokens, and against Megatron's ``SequentialMLP`` inside its MoE layer."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from linear_moe.kernels import grouped_linear
from linear_moe.model import experts
from linear_moe.model.backend import make_backend
from linear_moe.model.experts import GroupedExperts
from tests.workers import with_model_parallel

E, D, FFN = 4, 16, 24
COUNTS = [[3, 0, 6, 1], [0, 0, 10, 0], [0, 0, 0, 0]]


def config(**kwargs) -> TransformerConfig:
    defaults = {
        "num_layers": 1,
        "hidden_size": D,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": E,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.0,
        "hidden_dropout": 0.0,
    }
    return TransformerConfig(**(defaults | kwargs))


# ---- one rank ----

KINDS = {
    "swiglu": {},
    "plain": {"gated_linear_unit": False, "activation_func": F.gelu},
    "clamped": {"activation_func_clamp_value": 0.1, "glu_linear_offset": 0.5},
    "fused": {"bias_activation_fusion": True},
    "probs_on_input": {
        "moe_apply_probs_on_input": True,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
}


def by_definition(kind: str, fc1: torch.Tensor, fc2: torch.Tensor, x, counts, probs) -> torch.Tensor:
    rows, start = [], 0
    for e, count in enumerate(counts):
        for t in range(start, start + count):
            x_t = x[t] * (probs[t] if kind == "probs_on_input" else 1)
            inner = fc1[e] @ x_t
            if kind == "plain":
                inner = F.gelu(inner)
            else:
                gate, up = inner[:FFN], inner[FFN:]
                if kind == "clamped":
                    gate, up = gate.clamp(max=0.1), up.clamp(-0.1, 0.1) + 0.5
                inner = gate * torch.sigmoid(gate) * up
            rows.append(fc2[e] @ inner * (1 if kind == "probs_on_input" else probs[t]))
        start += count
    return torch.stack(rows) if rows else x.new_zeros(0, D) + 0 * fc1.sum() + 0 * fc2.sum()


def against_the_loop(rank: int, world_size: int, kind: str, counts: list[int], grouped: bool) -> None:
    dtype = torch.float32 if grouped else torch.float64  # PyTorch's grouped product knows no float64
    with with_model_parallel():
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups()
        module = GroupedExperts(E, config(params_dtype=dtype, **KINDS[kind]), pg_collection=groups)
    with pytest.MonkeyPatch.context() as patch:
        if grouped:
            patch.setattr(experts, "can_group", lambda *tensors: True)
            patch.setattr(experts, "looped_linear", None)
        x = torch.randn(sum(counts), D, dtype=dtype, requires_grad=True)
        probs = torch.rand(sum(counts), dtype=dtype, requires_grad=True)
        found, bias = module(x, torch.tensor(counts), probs)
        leaves = [x, probs, module.fc1_weight, module.fc2_weight]
        true = by_definition(kind, module.fc1_weight, module.fc2_weight, x, counts, probs)
        assert bias is None
        close = {"atol": 1e-6, "rtol": 1e-5} if grouped else {"atol": 1e-12, "rtol": 1e-12}
        if kind == "fused":
            close = {"atol": 1e-6, "rtol": 1e-5}  # Megatron's kernel computes in float32
        torch.testing.assert_close(found, true, **close)
        direction = torch.randn_like(true)
        grads = [
            torch.autograd.grad((y * direction).sum(), leaves, allow_unused=sum(counts) == 0)
            for y in (found, true)
        ]
        for got, expected in zip(*grads, strict=True):
            if expected is None:
                expected = torch.zeros_like(got)
            torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_their_formula(gloo, kind, grouped):
    for counts in COUNTS:
        gloo(1, against_the_loop, kind, counts, grouped)


@pytest.mark.parametrize("form", [grouped_linear.grouped_linear, grouped_linear.masked_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_other_forms_are_the_loop(dtype, counts, form):
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(counts), D).to(dtype).requires_grad_()
    weight = torch.randn(E, FFN, D).to(dtype).requires_grad_()
    pair = [
        form(x, weight, ends),
        grouped_linear.looped_linear(x, weight, counts),
    ]
    torch.testing.assert_close(*pair)
    with torch.no_grad():
        torch.testing.assert_close(form(x, weight, ends), pair[1])
    direction = torch.randn(1, FFN).to(dtype).expand(sum(counts), -1)  # a gradient that is not dense
    grads = [torch.autograd.grad(y, (x, weight), direction) for y in pair]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_of_experts_without_tokens_are_zero_whatever_the_kernel_leaves(monkeypatch):
    stock = F.grouped_mm

    def leaves_garbage(a, b, offs):
        out = stock(a, b, offs=offs)
        if out.ndim == 3:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", leaves_garbage)
    weight = torch.randn(E, 8, 8, requires_grad=True)
    ends = torch.tensor(COUNTS[0]).cumsum(0, dtype=torch.int32)
    grouped_linear.grouped_linear(torch.randn(10, 8), weight, ends).sum().backward()
    assert torch.isfinite(weight.grad).all() and not weight.grad[1].any() and weight.grad[0].any()


def test_torch_gives_no_float32_gradient_of_bf16_weights():
    """Once it does, they need no rounding before Megatron's float32 buffer: ask for it in _GroupedLinear.backward."""
    grad, x, ends = torch.ones(4, 8).bfloat16(), torch.ones(4, 16).bfloat16(), torch.tensor([1, 4]).int()
    with pytest.raises(RuntimeError, match="output dtype must match"):
        F.grouped_mm(grad.t(), x, offs=ends, out_dtype=torch.float32)


def test_only_aligned_bf16_on_cuda_is_grouped():
    assert not grouped_linear.can_group(torch.zeros(1, 8, dtype=torch.bfloat16))

    def tensor(shape=(4, 8), dtype=torch.bfloat16, address=64, is_cuda=True):
        return SimpleNamespace(shape=shape, dtype=dtype, is_cuda=is_cuda, data_ptr=lambda: address)

    assert grouped_linear.can_group(tensor(), tensor())
    for odd in ({"shape": (4, 12)}, {"dtype": torch.float16}, {"address": 8}, {"is_cuda": False}):
        assert not grouped_linear.can_group(tensor(), tensor(**odd))


class OnCuda(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True


def test_groups_that_run_in_a_loop_on_a_gpu_say_so_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, weight, ends = torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([1, 4], dtype=torch.int32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [grouped_linear.linear_by_group(y, weight, ends) for y in (x, *[x.as_subclass(OnCuda)] * 2)]
    assert torch.equal(found[0], found[1].as_subclass(torch.Tensor))
    assert len(caught) == 1 and "one after the other, with a device sync per product" in str(
        caught[0].message
    )


@pytest.mark.parametrize("groups", [2, grouped_linear.FEW + 1])
def test_few_groups_are_not_waited_for_in_a_graph(monkeypatch, groups):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(grouped_linear, "_warn_of_loop_once", lambda *told: None)
    x, weight = torch.randn(12, 8), torch.randn(groups, 8, 8)
    ends = torch.tensor([1, *range(4, 2 + groups), 12], dtype=torch.int32)
    expected = grouped_linear.linear_by_group(x, weight, ends)
    monkeypatch.setattr(grouped_linear, "looped_linear", None)
    if groups > grouped_linear.FEW:
        with pytest.raises(TypeError):
            grouped_linear.linear_by_group(x.as_subclass(OnCuda), weight, ends)
        return
    found = grouped_linear.linear_by_group(x.as_subclass(OnCuda), weight, ends)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def test_rows_of_masked_products_fill_their_tiles_without_gradients(monkeypatch):
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(len(x)) or x @ weight.t())
    x, weight, ends = torch.ones(17, 8), torch.ones(2, 8, 8), torch.tensor([4, 17], dtype=torch.int32)
    assert len(grouped_linear.masked_linear(x, weight, ends)) == 17
    with torch.no_grad():
        assert len(grouped_linear.masked_linear(x, weight, ends)) == 17
    assert seen == [17, 17, 32, 32]


# ---- inside Megatron's MoE layer, over ranks ----


def moe_layer(rank: int, world_size: int, layout: dict[str, int], dispatcher: str, sequential: bool) -> dict:
    """Output and gradients of one MoE layer, experts put together in expert order."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection

    tp, ep, etp = layout.get("tp", 1), layout.get("ep", 1), layout.get("etp", 1)
    with with_model_parallel(tp=tp, ep=ep, etp=etp):
        options = config(
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            sequence_parallel=tp > 1,
            moe_token_dispatcher_type=dispatcher,
        )
        backend = make_backend("local", sequential_experts=sequential)
        spec = get_moe_module_spec_for_backend(backend, num_experts=E, moe_grouped_gemm=not sequential)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = spec(config=options, pg_collection=groups, is_mtp_layer=False)
        x = torch.randn(6, 2, D, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        out, _ = layer(x)
        (out * out.detach().cos()).sum().backward()
        kind = "SequentialExperts" if sequential else "GroupedExperts"
        assert type(layer.experts).__name__ == kind
        layer.experts.backward_dw()
        marks = {
            (p.allreduce, p.tensor_model_parallel, p.partition_stride)
            for name, p in layer.experts.named_parameters()
            if "fc1" in name
        }
        return {
            "marks": marks,
            "out": out.detach(),
            "x": x.grad,
            "router": layer.router.weight.grad,
            **{name: stacked(layer.experts, name).grad for name in ("fc1", "fc2")},
            **{f"{name} itself": stacked(layer.experts, name) for name in ("fc1", "fc2")},
        }


def stacked(module: torch.nn.Module, name: str) -> torch.Tensor:
    """``[E, out, in]`` weights of either kind of experts, detached, with ``grad``."""
    if isinstance(module, GroupedExperts):
        weight = getattr(module, f"{name}_weight")
        whole, grad = weight.detach(), weight.grad
    else:
        weights = [getattr(expert, f"linear_{name}").weight for expert in module.local_experts]
        whole = torch.stack([weight.detach() for weight in weights])
        grad = torch.stack([weight.grad for weight in weights]) if weights[0].grad is not None else None
    whole.grad = grad
    return whole


@pytest.mark.parametrize(
    "layout, dispatcher",
    [
        ({}, "alltoall"),
        ({"ep": 2}, "alltoall"),
        ({"ep": 2}, "allgather"),
        ({"tp": 2, "etp": 2}, "allgather"),
        ({"tp": 2, "ep": 2}, "alltoall"),
    ],
)
def test_moe_layer_does_not_notice(gloo, layout, dispatcher):
    world_size = 2 if layout else 1
    results = [gloo(world_size, moe_layer, layout, dispatcher, sequential) for sequential in (True, False)]
    for sequential, grouped in zip(*results, strict=True):
        assert sequential["marks"] == grouped["marks"]
        for name in sequential.keys() - {"marks"}:
            torch.testing.assert_close(sequential[name], grouped[name], msg=f"{layout} {name}: {{}}".format)
        assert torch.equal(sequential["fc1 itself"], grouped["fc1 itself"])
        assert torch.equal(sequential["fc2 itself"], grouped["fc2 itself"])


# ---- initialisation ----


def cpu_weights(rank: int, world_size: int, layout: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    with with_model_parallel(**layout):
        torch.manual_seed(3)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        options = config(
            use_cpu_initialization=True,
            expert_model_parallel_size=layout.get("ep", 1),
            tensor_model_parallel_size=layout.get("tp", 1),
            expert_tensor_parallel_size=layout.get("etp", 1),
        )
        module = GroupedExperts(E // groups.ep.size(), options, pg_collection=groups)
        return module.fc1_weight.detach(), module.fc2_weight.detach()


def test_cpu_initialisation_does_not_depend_on_the_layout(gloo):
    [(fc1, fc2)] = gloo(1, cpu_weights, {})
    assert len(torch.unique(fc1)) > 0.99 * fc1.numel()  # no two experts alike
    by_experts = gloo(2, cpu_weights, {"ep": 2, "etp": 1})
    assert torch.equal(torch.cat([w for w, _ in by_experts]), fc1)
    assert torch.equal(torch.cat([w for _, w in by_experts]), fc2)
    by_size = gloo(2, cpu_weights, {"tp": 2, "etp": 2})
    halves = [torch.cat([w.chunk(2, 1)[half] for w, _ in by_size], 1) for half in (0, 1)]
    assert torch.equal(torch.cat(halves, 1), fc1)
    assert torch.equal(torch.cat([w for _, w in by_size], 2), fc2)


# ---- refusals ----

PROBLEMS = [
    {"add_bias_linear": True},
    {"moe_ffn_hidden_size": 25},
    {"moe_mlp_glu_interleave_size": 4},
    {"fp8": "hybrid"},
    {"delay_wgrad_compute": True},
    {"use_te_activation_func": True},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]},
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: next(iter(problem)))
def test_what_is_refused_says_what_to_do(problem):
    one, two = (SimpleNamespace(size=lambda n=n: n, rank=lambda: 0) for n in (1, 2))
    options = config(use_cpu_initialization=True)
    for name, value in problem.items():  # some of these Megatron itself refuses without Transformer Engine
        setattr(options, name, value)
    with pytest.raises(ValueError, match=re.compile(r"\n  why: .*\n  try: ")):
        GroupedExperts(E, options, pg_collection=SimpleNamespace(ep=one, expt_tp=two, expt_dp=one))


def test_what_they_do_is_not_refused():
    """Recomputation of attention alone; experts on a narrower stream than the model's."""
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    options = config(use_cpu_initialization=True, recompute_granularity="selective")
    options.recompute_modules, options.moe_latent_size = ["core_attn"], 8
    module = GroupedExperts(E, options, pg_collection=SimpleNamespace(ep=one, expt_tp=one, expt_dp=one))
    assert module.fc1_weight.shape == (E, 2 * FFN, 8) and module.fc2_weight.shape == (E, 8, FFN)
