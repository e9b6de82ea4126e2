"""Counts against models that are really built, against published ones, and the tool that prints them."""

import contextlib
import io
import json
from typing import Any

import pytest

from linear_moe import lsm
from linear_moe.bench.plans import plan_model
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.model.families import FAMILIES, estimate_parameters
from linear_moe.model.pattern import SOFTMAX
from tools import count_parameters as tool

SMALL = 5_000_000
"""Parameters of a size that a test may build."""


EVERY = list(lsm.names())


def small_sizes() -> list[tuple[str, str]]:
    kinds = {name: (SOFTMAX,) * 4 for name in FAMILIES}
    return [
        (family.name, name)
        for family in FAMILIES.values()
        for name, size in family.sizes.items()
        if size.num_layers == 4 and estimate_parameters(size, kinds[family.name], size.vocab_size)[0] < SMALL
    ]


def every_mixer() -> list[tuple[str, str]]:
    """Three at a time, with softmax."""
    return [(",".join((EVERY * 2)[i : i + 3]), "123N") for i in range(0, len(EVERY), 3)]


def both(rank: int, world: int, models: list[tuple[str, str, str | None, str | None]]) -> list[Any]:
    """What is counted without memory, and what training builds, with each expert a module of its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.bench.counting import count
    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import arguments
    from linear_moe.training.pretrain import prepare_arguments
    from tests.workers import leave_model_parallel, with_model_parallel

    found = []
    for model in models:
        counted = count(plan_model(*model))
        leave_model_parallel()
        plan = plan_model(*model, extra_args="--sequential-experts")
        config = arguments.model_config(prepare_arguments(training_arguments(plan)))
        with with_model_parallel():
            groups = ProcessGroupCollection.use_mpu_process_groups()
            built = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
        sizes = {key: p.numel() for key, p in built.named_parameters()}
        assert all(p.device.type == "cpu" for p in built.parameters())
        leave_model_parallel()
        found.append((counted.parameters, sizes, plan.size.moe_router_topk))
    return found


def visited(key: str, topk: int) -> bool:
    """Whether a token that goes to the first experts of each layer uses this weight."""
    _, is_expert, rest = key.partition(".local_experts.")
    return not is_expert or int(rest.split(".")[0]) < topk


MODELS = {
    **{f"{family} {size}": [(family, size, None, None)] for family, size in small_sizes()},
    **{
        f"{family} hybrid": [(family, "tiny", "gla", "LLLN"), (family, "tiny", "mom_gated_deltanet", "L")]
        for family in FAMILIES
    },
    "every mixer": [("qwen2", "tiny", *mixers) for mixers in every_mixer()],
}


@pytest.mark.parametrize("case", MODELS)
def test_counts_are_those_of_the_built_model(case: str, gloo):
    for model, (counts, sizes, topk) in zip(MODELS[case], gloo(1, both, MODELS[case])[0], strict=True):
        assert counts.total == sum(sizes.values()), model
        assert counts.active == sum(n for key, n in sizes.items() if visited(key, topk)), model
        tables = [n for key, n in sizes.items() if "word_embeddings" in key or "output_layer" in key]
        assert counts.embedding == sum(tables), model


PUBLISHED = {
    # huggingface.co's count of the weights of each checkpoint
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "7B"): 7_615_616_512,
    ("qwen2", "72B"): 72_706_203_648,
    ("mixtral", "8x7B"): 46_702_792_704,
    ("deepseek_v2", "A2.4B"): 15_706_484_224,
    ("deepseek_v2", "A21B"): 235_741_434_880,
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "8B"): 8_030_261_248,
    # rounded in the names of the checkpoints
    ("mamba2", "130M"): 128_989_632,
    ("mamba2", "370M"): 368_346_624,
    ("mamba2", "780M"): 780_161_280,
    ("mamba2", "1.3B"): 1_343_757_312,
    ("mamba2", "2.7B"): 2_702_599_680,
    # of the earlier system
    ("qwen2", "A0.3B"): 2.48e9,
    ("qwen2", "A1B"): 7.34e9,
    ("qwen2", "A14B"): 57.41e9,
}
ACTIVE = {  # of the reports, in billions
    ("qwen2", "A14B"): 14.2,
    ("mixtral", "8x7B"): 12.9,
    ("deepseek_v2", "A2.4B"): 2.66,
    ("deepseek_v2", "A21B"): 21.4,
}


def counted(rank: int, world: int, models: list[tuple[str, str]]) -> list[Any]:
    from linear_moe.bench.counting import count

    return [(c.parameters, c.flops) for c in (count(plan_model(*model)) for model in models)]


@pytest.mark.parametrize("family", FAMILIES)
def test_published_counts(family: str, gloo):
    sizes = [model for model in PUBLISHED if model[0] == family]
    for model, (counts, flops) in zip(sizes, gloo(1, counted, sizes)[0], strict=True):
        # rows of the vocabulary are rounded up here
        tolerance = 2e-3 if isinstance(PUBLISHED[model], int) else 5e-3
        assert counts.total == pytest.approx(PUBLISHED[model], rel=tolerance), model
        if model in ACTIVE:
            assert counts.active / 1e9 == pytest.approx(ACTIVE[model], rel=0.01), model
        if FAMILIES[family].mixer is not None:
            continue  # a recurrence has products without weights
        # without scores: a product for each weight that a token meets, forward and twice backward
        size = FAMILIES[family].sizes[model[1]]
        met = counts.active - (0 if size.tie_embeddings else counts.embedding / 2)
        assert flops.training(1, squared_lengths=0) == pytest.approx(6 * met, rel=1e-3), model


def measured_estimates(rank: int, world: int, models: list[Any]) -> list[Any]:
    from linear_moe.bench.counting import count

    return [count(plan_model(*model)).parameters for model in models]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_launchers_estimate(family: str, gloo):
    """Within a few percent for every published size, with every mixer of the package.

    Narrow waists, which it leaves out, count for more where there is no feed-forward block.
    """
    sizes = [name for name, size in FAMILIES[family].sizes.items() if size.hidden_size >= 512]
    # heads of softmax are wider together than the residual stream in Qwen3-Next
    mixers = EVERY if family == "qwen2" else ["gla", "mamba2", "rwkv6", "rwkv7", "hgrn2", "mom_hgrn2"]
    models = [(family, size, None, None) for size in sizes]
    models += [(family, FAMILIES[family].default_size, mixer, None) for mixer in mixers]
    for model, counts in zip(models, gloo(1, measured_estimates, models)[0], strict=True):
        plan = plan_model(*model)
        total, active = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
        tolerance = 0.03 if plan.size.has_feed_forward else 0.06
        assert total == pytest.approx(counts.total, rel=tolerance), model
        assert active == pytest.approx(counts.active, rel=tolerance), model


def printed(rank: int, world: int, *argv: str) -> tuple[int, str, str]:
    """Exit code and output of the tool."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool.main([*argv])
    return code, out.getvalue(), err.getvalue()


def test_json(gloo):
    model = ("--family", "qwen2", "--size", "A0.3B", "--la-module", "gla", "--layer-type-list", "LLLN")
    code, out, _ = gloo(1, printed, *model, "--json")[0]
    short = json.loads(out)
    assert code == 0 and short["seq_len"] == 2048 and (short["pattern"], short["layers"]) == ("LLLN", 12)
    assert short["flops_per_token"] == sum(short["flops_split"].values())
    assert set(short["flops_split"]) == {"mixer", "experts", "head"}
    # a product for each active weight but the embedding's, forward and twice backward, and the scores of three layers
    weights = 6 * (short["active"] - short["embedding"] / 2)
    assert short["flops_per_token"] == pytest.approx(weights + 3 * 6 * 2048 * 1024, rel=0.01)
    long = json.loads(gloo(1, printed, *model, "--json", "--seq-len", "65536")[0][1])
    assert {name: long[name] for name in ("total", "active")} == {
        name: short[name] for name in ("total", "active")
    }
    assert long["flops_per_token"] - short["flops_per_token"] == 3 * 6 * (65536 - 2048) * 1024


def test_a_family_with_its_own_mixer(gloo):
    """It is the L of a pattern, and the whole model without one."""
    patterns = [[], ["--layer-type-list", "LLLN"], ["--layer-type-list", "N"]]
    found = [
        gloo(1, printed, "--family", "mamba2", "--size", "tiny", "--json", *words)[0] for words in patterns
    ]
    counts = [json.loads(out) for _, out, _ in found]
    assert [c["pattern"] for c in counts] == ["L", "LLLN", "N"] and counts[1]["mixers"] == [
        "mamba2",
        "softmax",
    ]
    assert [c["flops_split"]["feed_forward"] for c in counts] == [0, 0, 0]


def test_table(gloo):
    code, out, _ = gloo(1, printed, "--family", "qwen2", "--size", "tiny-dense", "--la-module", "mamba2")[0]
    assert code == 0
    words = out.split()
    assert {"total", "active", "embedding", "mixer", "feed_forward", "head"} <= set(words)
    assert "(mamba2)" in words and "262,144" in words


@pytest.mark.parametrize(
    "argv,what",
    {
        "family": ("--family qwn", "unknown family 'qwn'"),
        "size": ("--family qwen2 --size A9", "unknown --size A9"),
        "mixer": ("--family qwen2 --la-module gal", "unknown mixer 'gal'"),
        "pattern": ("--family qwen2 --la-module gla --layer-type-list LLLNN", "--layer-type-list LLLNN"),
        "no mixer": ("--family qwen2 --layer-type-list LLLN", "layer symbol 'L'"),
    }.values(),
)
def test_one_kind_error(argv: str, what: str):
    """Before torch is needed: this process does not build anything."""
    code, out, err = printed(0, 1, *argv.split())
    lines = err.splitlines()
    assert code == 2 and not out and len(lines) == 3
    assert lines[0].startswith(f"count_parameters: {what}")
    assert lines[1].startswith("  why: ") and lines[2].startswith("  try: --"), err
