"""What several mixers are made of: parameters that stay float32, the router, biases of the convolution, limits."""

import math
import re

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Placement, Projection, gating, split
from linear_moe.lsm.flags import options_of
from linear_moe.lsm.gla import GatedLinearAttention
from linear_moe.lsm.mom import excluded
from linear_moe.model.mixer_options import check_layout
from tests.contract.cases import EVERY_CASE, SHAPE, make

FLOAT32 = {"A_log", "dt_bias", "lower_bounds", "D", "bonus", "router", "rate"}
"""What rates, steps, bounds, skips and choices come from: half precision would move them for all tokens alike."""


@pytest.mark.parametrize("name, case", EVERY_CASE)
def test_what_stays_float32(name: str, case: str) -> None:
    tables = make(name, case, tokens=1).mixer.all_parameters()
    kept = {table.name for table in tables if table.keep_float32}
    assert kept == {table.name for table in tables} & FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memories_are_chosen_in_float32_or_wider(dtype: torch.dtype) -> None:
    """Also under autocast, whose rounding would change which memory comes first."""
    mixer = make("mom_gla", tokens=1).mixer
    hidden = torch.randn(2, 50, SHAPE["hidden_size"]).to(dtype)
    router = torch.randn(mixer.cfg.num_memories, SHAPE["hidden_size"])
    probs, weight, choice = mixer.route(hidden, {"router": router})
    truth = (hidden.double() @ router.double().T).softmax(-1)
    assert probs.dtype == weight.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(probs.double(), truth, rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = mixer.route(hidden, {"router": router})
    assert all(torch.equal(found, x) for found, x in zip(again, (probs, weight, choice), strict=True))


def test_biases_of_some_of_the_convolved_projections() -> None:
    """The mixers here give all of them one, or none; a new one may not. Later projections are not read."""
    table = [
        Projection("a", 2, conv=True),
        Projection("b", 3, bias=True, conv=True),
        Projection("c", 4, bias=True),
    ]
    x = torch.randn(2, 5, 3, 5)
    w = {"b_bias": torch.randn(3, 3), "c_bias": torch.randn(3, 4)}
    found = split.conv_input(table, x, w)
    assert torch.equal(found[..., :2], x[..., :2]) and torch.equal(found[..., 2:], x[..., 2:] + w["b_bias"])
    assert torch.equal(split.conv_input([table[0], table[2]], x[..., :2], w), x[..., :2])


def test_steps_start_where_softplus_gives_them() -> None:
    def drawn() -> Tensor:
        torch.manual_seed(0)
        return torch.empty(1000, dtype=torch.float64)

    gating.init_dt_bias(bias := drawn())
    step = drawn().uniform_(math.log(1e-3), math.log(1e-1)).exp()
    torch.testing.assert_close(torch.nn.functional.softplus(bias), step, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, options",
    [
        ("mom_gla", {"aux_loss_coeff": 0.0, "topk": 4}),
        ("mom_gla", {"num_memories": 1, "topk": 1, "capacity": 0.01}),
        ("gla", {"gate_clamp_min": 0.0, "conv_size": 2}),
        ("kda", {"lower_bound": -5.0}),
        ("mamba2", {"state_size": 256, "dt_limit_min": 0.0}),
        ("gsa", {"num_slots": 256}),
        ("gated_deltanet", {"output_norm": "groupnorm"}),
        ("retention", {"expand_k": 0.375, "rotary": "none"}),
    ],
)
def test_limits_themselves_work(name: str, options: dict) -> None:
    """The values that messages call right."""
    lsm.get(name).Config(**SHAPE, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "gla",
            {"gate_clamp_min": "x"},
            "gate_clamp_min is 'x'\n  why: it is float or None, and finite\n  try: None",
        ),
        ("gla", {"gate_rank": 2.5}, "gate_rank is 2.5\n  why: it is int\n  try: 16"),
        ("gla", {"num_heads": 2.5}, "num_heads is 2.5\n  why: it is int\n  try: a number"),
        (
            "gla",
            {"output_gate": "no"},
            "output_gate is 'no'\n  why: known are swish, sigmoid, none\n  try: swish",
        ),
        (
            "mom_gla",
            {"topk": 5},
            "topk is 5\n  why: a token chooses among 4 memories (num_memories)\n  try: 4 or less",
        ),
    ],
)
def test_messages_of_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lsm.get(name).Config(**(SHAPE | options))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("rwkv7", "its tokens also read their neighbours, who may be in another memory"),
        ("mamba2", "its keys belong to groups of heads, which memories cannot have their own of"),
    ],
)
def test_why_a_mixer_has_no_mixture(name: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"^unknown mixer .*\n  why: {name} has no mixture of memories: {reason}\n"
    ):
        lsm.get(f"mom_{name}")


def test_a_mixer_that_sets_how_it_starts_has_no_mixture() -> None:
    """The mixture would not call it: memories have projections of their own, which it does not know."""

    class Started(GatedLinearAttention):
        def initialize(self, found: dict[str, torch.Tensor], place: Placement) -> None:
            found["in_proj.k"].zero_()

    assert excluded(GatedLinearAttention) is None
    assert (
        excluded(Started)
        == "it sets how its projections start, and not those of which every memory has its own"
    )


def test_a_table_that_is_none() -> None:
    class Mine(lsm.get("gla")):  # type: ignore[misc]
        table: tuple[Projection, ...] = ()

        def projections(self) -> tuple[Projection, ...]:
            return self.table

    mixer = Mine(Mine.Config(hidden_size=64, num_heads=4, head_dim=16))
    mixer.table = Projection("a", 1)  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"projections\(\) of Mine is the projection 'a' alone\n  why: .*\n  try: "
    ):
        mixer.all_projections()
    mixer.table = (*mixer.qkv(), Projection("k", 1))
    with pytest.raises(
        ValueError, match=r"two projections of the name 'k'\n  why: gates finds each by its name\n"
    ):
        mixer.all_projections()
    mixer.table = (Projection("g", 1),)
    with pytest.raises(
        ValueError, match=r"of the name 'g'\n  why: .*, and is that of the output gate unless"
    ):
        mixer.all_projections()
    mixer.table = [Projection("a", 1)]  # type: ignore[assignment]
    assert [p.name for p in mixer.all_projections()] == ["a", "g"]


def test_flags_say_true_or_false() -> None:
    parse = {name: parser for name, parser, _ in options_of(lsm.get("gla").Config)}["conv_bias"]
    assert parse("True") is True and parse("false") is False
    with pytest.raises(ValueError, match="expected true or false, got 'maybe'"):
        parse("maybe")


def test_layouts_that_just_work() -> None:
    """Memories as wide as kernels take, and a capacity where a rank has whole sequences."""
    layout = {"layer_kinds": ["gla", "mom_gla"], "tp": 1, "recomputes_layers": True}
    wide = lsm.get("gla")(lsm.get("gla").Config(hidden_size=512, num_heads=1, head_dim=256, expand_k=1.0))
    assert wide.memory_shapes() == ((256, 256),)
    check_layout(wide, "gla", cp=2, **layout)
    limited = lsm.get("mom_gla")(lsm.get("mom_gla").Config(**SHAPE, capacity=1.0))
    check_layout(limited, "mom_gla", cp=1, **layout)
    with pytest.raises(ValueError, match="CP=1"):
        check_layout(limited, "mom_gla", cp=2, **layout)
