"""What a person reads about a mistake in the mixers: their names, the pattern of layers, their options."""

import pytest

from linear_moe.launch import check_mixers
from linear_moe.launch.plan import registered_mixers
from linear_moe.launch.preflight import preflight
from linear_moe.lsm.gla import GatedLinearAttention
from tests.launch.plans import case, make_plan, message

CASES = [
    case(
        "mixer_misspelt",
        """unknown mixer 'gatd_deltanet'; the nearest name is 'gated_deltanet'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gated_deltanet""",
        LA_MODULE="gatd_deltanet",
    ),
    case(
        "mixer_of_another_version",
        """unknown mixer 'mega'; the nearest name is 'gsa'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gsa""",
        LA_MODULE="mega",
    ),
    case(
        "second_mixer_unknown",
        """unknown mixer 'glaa'; the nearest name is 'gla'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gla""",
        LA_MODULE="gla,glaa",
    ),
    case(
        "symbol_unknown",
        """unknown layer symbol 'x' at position 3 of LAYER_TYPE_LIST=LLxN.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLxN",
    ),
    case(
        "symbol_lower_case",
        """unknown layer symbol 'n' at position 4 of LAYER_TYPE_LIST=LLLn.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLLn",
    ),
    case(
        "symbols_with_spaces",
        """unknown layer symbol ' ' at position 2 of LAYER_TYPE_LIST=L L L N.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="L L L N",
    ),
    case(
        "symbol_of_the_other_pattern",
        """unknown layer symbol '*' at position 4 of LAYER_TYPE_LIST=LLL*.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLL*",
    ),
    case(
        "symbol_without_its_mixer",
        """layer symbol '2' at position 2 of LAYER_TYPE_LIST=L2LN names no mixer.
  why: it stands for mixer 2 of LA_MODULE=gated_deltanet.
  try: LA_MODULE=gated_deltanet,another""",
        LAYER_TYPE_LIST="L2LN",
    ),
    case(
        "pattern_does_not_divide",
        """LAYER_TYPE_LIST=LLN (3 symbols) does not fit 4 layers.
  why: a shorter pattern is repeated, but 3 symbols do not divide 4 layers.
  try: LAYER_TYPE_LIST='LLNL' (4 symbols), or LAYER_TYPE_LIST='LL' (repeated 2 x)""",
        LAYER_TYPE_LIST="LLN",
    ),
    case(
        "pattern_too_long",
        """LAYER_TYPE_LIST=LLLLLLLN (8 symbols) does not fit 4 layers.
  why: the pattern has 8 symbols and the model 4 layers; it needs one symbol per layer.
  try: LAYER_TYPE_LIST='LLLL' (4 symbols)""",
        LAYER_TYPE_LIST="LLLLLLLN",
    ),
    case(
        "pattern_against_changed_layers",
        """LAYER_TYPE_LIST=LLLN (4 symbols) does not fit 6 layers.
  why: a shorter pattern is repeated, but 4 symbols do not divide 6 layers.
  try: LAYER_TYPE_LIST='LLLNLL' (6 symbols), or LAYER_TYPE_LIST='LLL' (repeated 2 x)""",
        LAYER_TYPE_LIST="LLLN",
        EXTRA_ARGS="--num-layers 6",
    ),
    case(
        "hybrid_dash",
        """unknown layer symbol '-' at position 2 of HYBRID_OVERRIDE_PATTERN=M-M*.
  why: a symbol is a whole layer with its feed-forward block; the symbols are M = mamba2, * = softmax.
  try: HYBRID_OVERRIDE_PATTERN='MM*'""",
        HYBRID_OVERRIDE_PATTERN="M-M*",
    ),
    case(
        "two_patterns",
        """LAYER_TYPE_LIST=LLLN and HYBRID_OVERRIDE_PATTERN=**** describe two different models.
  why: the first gives 3 gated_deltanet + 1 softmax, the second 4 softmax.
  try: HYBRID_OVERRIDE_PATTERN= (empty), or LAYER_TYPE_LIST= (empty)""",
        LAYER_TYPE_LIST="LLLN",
        HYBRID_OVERRIDE_PATTERN="****",
    ),
    case(
        "extra_args_of_another_mixer",
        """EXTRA_ARGS holds --gla-gate-rank, but no layer is gla.
  why: the layers are mom_gla, softmax; the option would change nothing.
  try: leave it out, or --mom-gla-gate-rank if there is such an option""",
        EXTRA_ARGS="--mom-gla-expand-k 1 --mom-topk 2 --gla-gate-rank=32",
        LA_MODULE="mom_gla",
        LAYER_TYPE_LIST="LN",
    ),
]


@pytest.mark.parametrize(("cuda", "variables", "text"), CASES)
def test_message(cuda: int, variables: dict[str, str], text: str):
    mixers = ", ".join(sorted((*registered_mixers(), "softmax")))
    assert message(cuda, **variables) == text.replace("<mixers>", mixers)


OF_MIXERS = {
    "--la-conv-size is -1": {"EXTRA_ARGS": "--la-conv-size -1"},
    "--gated-deltanet-conv-size is -1": {"EXTRA_ARGS": "--gated-deltanet-conv-size -1 --la-conv-size 4"},
    "--la-conv-size is '2.5'": {"EXTRA_ARGS": "--la-conv-size=2.5"},
    "EXTRA_ARGS: argument --gated-deltanet-conv-size: invalid int value: 'x'.": {
        "EXTRA_ARGS": "--weight-decay 0.2 --gated-deltanet-conv-size x"
    },
    "EXTRA_ARGS: no mixer has the option --gated-deltanet-foo.": {"EXTRA_ARGS": "--gated-deltanet-foo 3"},
    "EXTRA_ARGS: no mixer has the option --gla-gate-rnak; the nearest is --gla-gate-rank.": {
        "EXTRA_ARGS": "--gla-gate-rnak=3", "LA_MODULE": "gla",
    },
    "MIXER_MODULES=my package/decay.py is the path of a file.": {"MIXER_MODULES": "my package/decay.py"},
    "--expand-v 1.7 gives a head of 54.4 channels": {"EXTRA_ARGS": "--expand-v 1.7"},
    "a memory of gated_deltanet is 1024 channels wide": {"EXTRA_ARGS": "--expand-v 32"},
    "--la-feature-map is set, but no layer of this model has feature_map": {
        "EXTRA_ARGS": "--la-feature-map elu"
    },
    "rwkv7 does not train with full recomputation of layers": {"LA_MODULE": "rwkv7", "AC": "full"},
    "the 1 heads of mamba2 cannot be divided over tensor parallel size 2": {
        "LA_MODULE": "mamba2", "EXTRA_ARGS": "--mamba2-ssm-head-dim 256", "TP": "2", "GPUS_PER_NODE": "2",
    },
    "the 1 heads of hgrn2 cannot be divided over tensor parallel size 2": {
        "LA_MODULE": "hgrn2", "TP": "2", "GPUS_PER_NODE": "2",
    },
    "mom_gla has a capacity, which context parallelism does not know": {
        "LA_MODULE": "mom_gla", "EXTRA_ARGS": "--mom-capacity 1.5", "CP": "2", "GPUS_PER_NODE": "2",
    },
}  # fmt: skip


@pytest.mark.parametrize("what", OF_MIXERS)
def test_message_of_a_mixer(what: str):
    lines = message(**OF_MIXERS[what]).splitlines()
    assert lines[0] == what and lines[1].startswith("  why: ") and lines[2].startswith("  try: ")


def test_a_file_is_imported_by_its_name():
    told = message(MIXER_MODULES="/my package/decay.py", LA_MODULE="decay").splitlines()[2]
    assert told == "  try: PYTHONPATH='/my package' MIXER_MODULES=decay"


def test_what_to_type_about_an_option_is_its_flag():
    assert message(EXTRA_ARGS="--la-conv-size=-1") == (
        "--la-conv-size is -1\n"
        "  why: it is the number of tokens that the short convolution sees, itself included\n"
        "  try: --la-conv-size 4, or 0 for none"
    )
    assert message(LA_MODULE="mamba2", EXTRA_ARGS="--mamba2-dt-limit-min 3 --mamba2-dt-limit-max 1") == (
        "--mamba2-dt-limit-max is 1.0\n"
        "  why: it must be above --mamba2-dt-limit-min 3.0, or dt would not depend on the token\n"
        "  try: --mamba2-dt-limit-max 0.1, or leave it out"
    )


def test_mixers_that_can_be_made_have_no_message():
    divided = {"TP": "2", "CP": "2", "GPUS_PER_NODE": "4", "AC": "full"}
    options = "--gla-gate-rank 8 --weight-decay 0 --la-conv-size 4 --mom-shared-memory --log-params-norm"
    assert message(LA_MODULE="gla,mom_deltanet", LAYER_TYPE_LIST="12N1", EXTRA_ARGS=options, **divided) == ""
    assert message(LA_MODULE="rwkv7", LAYER_TYPE_LIST="LNNN", AC="full") == "", "nobody needs its first value"


def test_a_defect_of_a_mixer_is_no_mistake_of_the_variables(monkeypatch: pytest.MonkeyPatch):
    """It is shown with its traceback, and nothing starts."""

    def broken(*arguments: object) -> None:
        raise ValueError("math domain error")

    monkeypatch.setattr(check_mixers, "_check", broken)
    with pytest.raises(ValueError, match=r"^math domain error$"):
        preflight(make_plan(AC="full"))


@pytest.mark.parametrize(
    ("layout", "variables"),
    [
        ("TP", {"TP": "2", "GPUS_PER_NODE": "2"}),
        ("SP", {"TP": "2", "SP": "true", "GPUS_PER_NODE": "2"}),
        ("CP", {"CP": "2", "GPUS_PER_NODE": "2"}),
        ("PP", {"PP": "2", "GPUS_PER_NODE": "2"}),
        ("VPP", {"PP": "2", "VPP": "2", "GPUS_PER_NODE": "2"}),
        ("EP", {"EP": "2", "GPUS_PER_NODE": "2", "MODEL_SIZE": "A0.3B"}),
        ("packed", {"PACK": "true"}),
        ("recompute", {}),
        ("recompute", {"AC": "full"}),
    ],
)
def test_a_layout_that_a_mixer_cannot_take(layout: str, variables: dict[str, str], monkeypatch):
    mine = {"LA_MODULE": "gla", "MIXER_MODULES": "tests.launch.plans"}
    if layout != "recompute":
        mine["AC"] = "none"
    monkeypatch.setattr(GatedLinearAttention, "unsupported", {layout: "it looks at the future"})
    assert message(**(mine | {"AC": "none"})) == ""
    what, why, attempt = message(**(mine | variables)).splitlines()
    assert what.startswith("mixer gla does not support ") and what.endswith(f"({layout})")
    assert why == "  why: it looks at the future" and attempt.startswith("  try: ")


def test_layers_that_are_not_recomputed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GatedLinearAttention, "unsupported", {"recompute": "it draws numbers"})
    assert message(LA_MODULE="gla", MIXER_MODULES="tests.launch.plans", EXTRA_ARGS="--no-lsm-recompute") == ""
