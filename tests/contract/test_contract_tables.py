"""What every mixer says about itself: source, family, options, projections, parameters, memory shapes and dtypes."""

import ast
import dataclasses
import inspect
import json
import math
import re
import textwrap
import typing

import pytest
import torch

from linear_moe import lsm
from linear_moe.lsm import Mixer, MixerState
from tests.contract.cases import (
    DISTINCT,
    EVERY_CASE,
    MIXERS,
    SHAPE,
    error,
    make,
    mixer_class,
    options,
    outputs,
)

THREE_PARTS = r"(?s)^[^\n]+\n  why: [^\n]+\n  try: [^\n]+$"

BAD = {
    "hidden_size": (0, -8),
    "num_heads": (0,),
    "head_dim": (0,),
    "layers_of_kind": (0,),
    "expand_k": (0.0, -1.0, 0.3),
    "expand_v": (0.0, -1.0, 0.3),
    "conv_size": (-1, 1),
    "norm_eps": (0.0, -1e-5),
    "gate_rank": (0, -1),
    "decay_rank": (0, -1),
    "iclr_rank": (0, -1),
    "value_rank": (0, -1),
    "shift_rank": (0, -1),
    "gate_logit_normalizer": (0.0, -16.0),
    "gate_clamp_min": (0.5,),
    "expand": (0.0, -2.0),
    "ssm_head_dim": (0, -64),
    "state_size": (0, -1, 257),
    "num_groups": (0, -1, 3),
    "dt_limit_min": (-0.1,),
    "dt_limit_max": (0.0, -1.0),
    "rotary_base": (0.0, -1.0),
    "num_slots": (0, -1, 257),
    "expand_ratio": (0, -1),
    "feature_dim": (0, -1, 24),
    "eps": (0.0, -1e-6),
    "lower_bound": (0.0, 0.5, -6.0),
    "values_per_key": (0, -1),
    "num_memories": (0, -1, 1),
    "topk": (0, -1, 5),
    "capacity": (0.0, -0.5),
    "aux_loss_coeff": (-1e-3,),
}
"""Values of the right type that cannot work; others are made from the type."""

OF_TYPE = {
    int: (1.5, "3", None, True),
    float: (math.nan, math.inf, "0.5", True),
    bool: (1, "true"),
    str: (7,),
}


def fields(name: str) -> list[tuple[str, typing.Any]]:
    config = mixer_class(name).Config
    hints = typing.get_type_hints(config)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(config)]


@pytest.mark.parametrize("name", MIXERS)
def test_says_what_it_is(name):
    mixer = mixer_class(name)
    assert mixer.name == name
    assert mixer.family in ("diagonal decay", "delta rule", "diagonal plus low rank")
    assert mixer.source and mixer.__doc__
    if mixer.__module__.startswith("linear_moe."):
        assert re.search(r"arXiv:\d{4}\.\d{5}", mixer.source)
        module = inspect.getdoc(inspect.getmodule(mixer))
        assert "_t" in module, "the module docstring shows the recurrence"
        assert "Letters:" in module


def test_registry():
    assert lsm.names() == tuple(sorted(lsm.names()))
    assert all(lsm.get(name).name == name for name in lsm.names())
    with pytest.raises(ValueError, match=THREE_PARTS) as error:
        lsm.get("gated_deltanets")
    assert str(error.value).endswith("try: gated_deltanet")


@pytest.mark.parametrize("name", MIXERS)
def test_every_option_is_documented(name):
    for config in (mixer_class(name).Config, Mixer.Config):
        body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
        for i, statement in enumerate(body):
            if isinstance(statement, ast.AnnAssign):
                following = body[i + 1].value if isinstance(body[i + 1], ast.Expr) else None
                assert isinstance(getattr(following, "value", None), str), ast.unparse(statement)


@pytest.mark.parametrize("name", MIXERS)
def test_bad_options_are_refused_with_what_to_do(name):
    config = mixer_class(name).Config
    for field, kind in fields(name):
        kinds = typing.get_args(kind) or (kind,)
        if config.__module__.startswith("linear_moe."):  # others' options are theirs to try
            assert field in BAD or not {int, float} & set(kinds), (
                f"no value of {field} is known that cannot work"
            )
        wrong = [v for k in kinds for v in OF_TYPE.get(k, ()) if type(None) not in kinds or v is not None]
        values = [*BAD.get(field, ()), *(wrong if kinds[0] in OF_TYPE else ())]
        values += ["nonsense"] if str in kinds else []
        for value in values:
            with pytest.raises(ValueError, match=THREE_PARTS) as refused:
                config(**(SHAPE | {field: value}))
            assert field in str(refused.value)


@pytest.mark.parametrize("name, case", EVERY_CASE)
def test_config_survives_json(name, case):
    config = mixer_class(name).Config(**SHAPE, **options(name)[case])
    assert mixer_class(name).Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name, case", EVERY_CASE)
def test_projections(name, case):
    mixer = make(name, case).mixer
    table = mixer.all_projections()
    names = [p.name for p in table]
    assert len(set(names)) == len(names)
    assert all(p.width >= 1 and re.fullmatch(r"[a-z]\w*", p.name) for p in table)
    for fused in (mixer.fused_projections(), mixer.grouped_projections()):
        convolved = [p.conv for p in fused]
        assert convolved == sorted(convolved, reverse=True), "projections of the convolution come first"
    assert not any(p.bias or p.rank for p in mixer.grouped_projections())
    assert mixer.cfg.num_heads % mixer.num_groups == 0 and mixer.cfg.num_heads % mixer.num_norm_groups == 0
    assert not any(p.conv for p in mixer.low_rank_projections())
    assert (mixer.conv_channels + mixer.group_conv_channels > 0) == any(p.conv for p in table)
    assert mixer.conv_channels == 0 or mixer.cfg.conv_size > 1
    assert mixer.fused_width == sum(p.width for p in table if p.rank is None and not p.grouped)
    assert mixer.scan_flops_per_token() > 0
    if case == "bias":
        assert {p.name for p in table if p.bias} >= {"q", "k", "v"} & set(names)


@pytest.mark.parametrize("name, case", EVERY_CASE)
def test_parameters(name, case):
    """Names differ from each other and from projections; each initialisation fills its tensor, and a shard of it."""
    mixer = make(name, case).mixer
    tables = mixer.all_parameters()
    names = [table.name for table in tables] + [f"low_rank.{p.name}" for p in mixer.low_rank_projections()]
    assert len(set(names)) == len(names)
    own = {"in_proj", "out_proj", "low_rank", "group_proj", "model_tables"}
    assert not set(names) & own, "keys of the layer's own modules"
    for table in tables:
        shapes = [table.shape]
        if table.per_head:
            assert table.shape[0] == mixer.cfg.num_heads
            shapes.append((1, *table.shape[1:]))
        for shape in shapes:
            x = torch.full(shape, math.nan)
            if table.init is None:  # as the model's projections
                continue
            table.init(x)
            assert x.isfinite().all(), table.name
            if table.per_head and not is_drawn(table.init, shape):
                assert (x == x[:1]).all(), (
                    f"{table.name} counts heads: every rank would start with the first ones"
                )
    assert ("norm_weight" in names) == (mixer.cfg.output_norm != "identity")
    assert ("norm_bias" in names) == (mixer.cfg.output_norm == "groupnorm")
    assert ("conv_weight" in names) == (mixer.conv_channels > 0)
    assert ("group_conv_weight" in names) == (mixer.group_conv_channels > 0)


def is_drawn(init, shape: tuple[int, ...]) -> bool:
    """Whether two initialisations differ."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(torch.zeros(shape))
        init(found[-1])
    return not torch.equal(*found)


def test_gated_delta_net_starts_as_published():
    """The decay's rate in (0, 16], its step between 0.001 and 0.1."""
    table = {p.name: p for p in make("gated_deltanet").mixer.all_parameters()}
    rate, step = torch.empty(4096), torch.empty(4096)
    table["A_log"].init(rate)
    table["dt_bias"].init(step)
    rate, step = rate.exp(), torch.nn.functional.softplus(step)
    assert 0 < rate.min() < 0.1 and 15.9 < rate.max() <= 16.001
    assert 0.99e-3 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.1001
    assert abs(step.log().mean().item() - math.log(1e-2)) < 0.1  # log-uniform


@pytest.mark.parametrize(
    "name, case, dtype",
    [(*pair, torch.bfloat16) for pair in EVERY_CASE]
    + [(name, "defaults", dtype) for name in MIXERS for dtype in (torch.float32, torch.float64)],
    ids=str,
)
def test_dtypes_and_shapes(name, case, dtype):
    """Outputs have the model's dtype; memories and log decays are float32, or float64, whatever it is."""
    exact = torch.promote_types(dtype, torch.float32)
    inputs = make(name, case, tokens=5, dtype=dtype)
    mixer, decays = inputs.mixer, []
    inner = getattr(mixer, "core", mixer)  # of a mixture

    def gates(*arguments):
        gated = type(inner).gates(inner, *arguments)
        decays.extend(x for key, x in gated.items() if key.startswith("log_decay"))
        assert {x.dtype for x in gated.values()} <= {dtype, exact}
        return gated

    inner.gates = gates
    o, state = inputs.mix()
    assert o.dtype == dtype and o.shape == (2, 5, mixer.cfg.num_heads, mixer.cfg.head_v_dim)
    assert {x.dtype for x in decays} <= {exact}
    half = {table.name: inputs.w[table.name] for table in inner.parameters() if not table.keep_float32}
    learned = [x.sum() for x in decays if x.requires_grad]
    if half and learned and dtype != exact:
        found = torch.autograd.grad(sum(learned), [*half.values()], allow_unused=True, retain_graph=True)
        assert not any(x is not None for x in found), f"what a decay comes from stays float32: {list(half)}"
    shapes = [(2, mixer.cfg.num_heads, *shape) for shape in mixer.memory_shapes()]
    assert [tuple(memory.shape) for memory in state.memory] == shapes
    assert all(memory.dtype == exact for memory in state.memory)
    assert isinstance(state, MixerState) and (state.conv is not None) == (mixer.conv_channels > 0)
    o.sum().backward()
    for key, x in inputs.tensors().items():
        assert x.grad is None or x.grad.dtype == x.dtype, key


@pytest.mark.parametrize("name", DISTINCT)
def test_half_precision_loses_no_more_than_its_inputs(name):
    """bfloat16 against float64 on the same rounded values: long sums and decays must not run in half precision.

    Of the mixtures two: with few tokens in a memory, ReBased divides by small sums, which the rounding of keys changes.
    """
    inputs = make(name, batch=1, tokens=300, dtype=torch.bfloat16)
    exact = dataclasses.replace(
        inputs,
        x=inputs.x.double(),
        others={key: x.double() if x.is_floating_point() else x for key, x in inputs.others.items()},
        w={key: x.double() for key, x in inputs.w.items()},
    )
    found, truth = outputs(inputs.mix()), outputs(exact.mix())
    errors = {key: error(found[key], truth[key]) for key in truth}
    assert all(e < 2e-2 for e in errors.values()), errors
