"""Based and ReBased where the weights add up to little: the first tokens of a run, in bfloat16 and float32.

Their weights are small differences of products of features, which bfloat16 features get wrong, and everything is
divided by the sum of a few of them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.kernels import Segment
from linear_moe.lsm import Mixer, MixerState, Placement

WIDTH, HEADS = 16, 4
PLACE = Placement(num_heads=HEADS, layer=0, num_layers=1, layer_of_kind=0)
SCALE = {"rebased": 1.0, "based": 10.0}
"""Of q and k: ReBased norms them, and Based's weights, of at least 1/2, only get lost where its features are large."""


def make(name: str) -> Mixer:
    kind = lsm.get(name)
    return kind(kind.Config(hidden_size=64, num_heads=HEADS, head_dim=WIDTH, layers_of_kind=1))


def draw(
    name: str, mixer: Mixer, rows: int, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Fused projections and parameters as they start."""
    torch.manual_seed(0)
    x = torch.randn(rows, tokens, HEADS, mixer.fused_width)
    x[..., : 2 * WIDTH] *= SCALE[name]
    w = {p.name: torch.empty(p.shape) for p in mixer.all_parameters()}
    for p in mixer.all_parameters():
        p.init(w[p.name])
    return x.to(dtype), {key: y.to(dtype) for key, y in w.items()}


def read(mixer: Mixer, x: Tensor, w: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The output of the layer before its last projection, and the gradient of x."""
    x = x.detach().requires_grad_()
    o, _ = mixer.mix(x, {}, w, PLACE, **options)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(o, x, torch.randn(o.shape, dtype=torch.float64).bfloat16().to(o.dtype))
    assert o.dtype == grad.dtype == x.dtype
    return o.detach(), grad


def errors(found: Tensor, true: Tensor) -> Tensor:
    """``[B, T, H]``, relative to the true vector, or to the usual one where that is longer."""
    length = true.norm(dim=-1)
    return (found - true).norm(dim=-1) / torch.maximum(length, length.square().mean().sqrt())


CASES = [
    ("based", torch.bfloat16, 1e-2),
    ("based", torch.float32, 1e-5),
    ("rebased", torch.bfloat16, 1e-2),
    ("rebased", torch.float16, 2e-3),
    ("rebased", torch.float32, 1e-3),
]
"""And the largest error: roundings, but for ReBased's gradient of a first token that hardly counts."""


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("name", "dtype", "bound"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_first_tokens_are_as_exact_as_the_others(name, dtype, bound, packed):
    """Outputs and gradients against float64 on the same values: of rows; of many short documents, some empty."""
    mixer, cu_seqlens = make(name), None
    rows, tokens = (96, 24) if not packed else (1, 1024)
    if packed:
        lengths = torch.tensor([0, 1, 2, 3, 5, 16, 17, 0, 20]).repeat(16)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        assert cu_seqlens[-1] == tokens
    x, w = draw(name, mixer, rows, tokens, dtype)
    found = read(mixer, x, w, cu_seqlens=cu_seqlens)
    true = read(mixer, x.double(), {key: y.double() for key, y in w.items()}, cu_seqlens=cu_seqlens)
    for value, got, expected in zip(("o", "grad x"), found, true, strict=True):
        error = errors(got.double(), expected)
        assert error.max() < bound, (value, error.max(), error.argmax())


@pytest.mark.parametrize("name", ["based", "rebased"])
@pytest.mark.parametrize("steps", [[1] * 8, [3, 1, 2, 1, 1]], ids=str)
def test_decoding_starts_as_exactly(name, steps):
    """Also from a memory of few tokens, which bfloat16 features would have written. A token alone has float32 ones."""
    mixer = make(name)
    x, w = draw(name, mixer, 512, 8, torch.bfloat16)
    state, found = None, []
    with torch.no_grad():
        for part in x.split(steps, dim=1):
            o, state = mixer.mix(part, {}, w, PLACE, state=state)
            assert o.dtype == x.dtype
            found.append(o)
        true, _ = mixer.mix(x.double(), {}, {key: y.double() for key, y in w.items()}, PLACE)
    assert errors(torch.cat(found, 1).double(), true).max() < 3e-2


def test_few_tokens_are_a_segment_too():
    """Features of a short call are wider than its values."""
    mixer = make("rebased")
    x, w = draw("rebased", mixer, 2, 5, torch.bfloat16)
    told = []

    def memory_from(segments: list[Segment]) -> tuple[Tensor, ...]:
        told.extend(segments)
        return tuple(torch.zeros_like(segment.state) for segment in segments)

    _, after = mixer.mix(x, {}, w, PLACE, memory_from=memory_from)
    assert isinstance(after, MixerState)
    assert torch.equal(told[0].state, after.memory[0]) and after.memory[0].dtype == torch.float32


def test_what_is_replaced_has_no_gradient(monkeypatch):
    """Not even where a rounded sum of weights is -eps, and a value of 0 is divided by 0."""
    mixer = make("rebased")
    x, w = draw("rebased", mixer, 2, 24, torch.bfloat16)
    expected = read(mixer, x, w)

    def rounded(**given: Any) -> tuple[Tensor, Any]:
        sums, memory = type(mixer).sums(mixer, **given)
        weights = sums[..., -1:].clone()
        weights[:, 0] = -torch.tensor(mixer.normalizer_eps)
        return torch.cat([sums[..., :-1] * 0, weights], -1), memory

    monkeypatch.setattr(mixer, "sums", rounded)
    found = read(mixer, x, w)
    assert torch.equal(found[0][:, :16], expected[0][:, :16])
    assert found[1].isfinite().all()
