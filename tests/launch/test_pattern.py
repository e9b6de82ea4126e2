"""Layer patterns: one mixer per layer from every spelling people use."""

import pytest

from linear_moe.launch.plan import registered_mixers
from linear_moe.model.pattern import ALIASES, canonical_mixer, layer_kinds, pattern_of

KNOWN = ("deltanet", "gated_deltanet", "gla", "linear_attention", "mamba2")
G, A, D, M, S = "gla", "linear_attention", "gated_deltanet", "mamba2", "softmax"


@pytest.mark.parametrize(
    ("pattern", "la_module", "hybrid", "layers", "kinds"),
    [
        (None, "gla", None, 3, (G, G, G)),
        ("", "gla", "", 1, (G,)),
        ("LLLN", "gla", None, 4, (G, G, G, S)),
        ("LLLN", "gla", None, 8, (G, G, G, S) * 2),  # a short pattern repeats
        ("LN", "softmax", None, 2, (S, S)),  # the softmax baseline, without touching the pattern
        ("N", "gla", None, 2, (S, S)),
        ("L12N", "gla,gated_deltanet", None, 4, (G, G, D, S)),
        ("2N", " gla , gdn", None, 4, (D, S, D, S)),
        ("N", "gla,gdn", None, 2, (S, S)),  # the softmax baseline, without touching LA_MODULE
        (None, "gated_deltanet", "MM*M", 4, (M, M, S, M)),
        (None, "gla", "M*", 4, (M, S, M, S)),
        ("LLN", "mamba2", "MM*", 3, (M, M, S)),  # both spellings, saying the same
    ],
)
def test_kinds(pattern: str | None, la_module: str, hybrid: str | None, layers: int, kinds: tuple[str, ...]):
    assert layer_kinds(pattern, la_module, layers, hybrid, known=KNOWN) == kinds


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("basic", A), ("GLA", G), ("GDN", D), ("gated-delta-net", D), ("Gated DeltaNet", "gated_deltanet"),
        ("delta_net", "deltanet"), ("deltanet", "deltanet"), ("softmax_attention", S), ("Mamba-2", M),
    ],
)  # fmt: skip
def test_spellings(spelling: str, name: str):
    assert canonical_mixer(spelling, KNOWN) == name


@pytest.mark.parametrize(
    ("name", "end"), [("rwkv8", "rwkv7"), ("x", "MIXER_MODULES=<your module that registers it>")]
)
def test_no_mixer_of_that_name(name: str, end: str):
    """A typing error, or a mixer of another package."""
    with pytest.raises(ValueError) as error:
        canonical_mixer(name, {*KNOWN, "rwkv7"})
    assert str(error.value).endswith(end)


def test_aliases_lead_to_names_not_to_aliases():
    assert not set(ALIASES.values()) & set(ALIASES)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (
            "layer symbol 'L' at position 1 of LAYER_TYPE_LIST=LN names no mixer.\n"
            "  why: it stands for mixer 1 of LA_MODULE=.\n"
            "  try: LA_MODULE=gated_deltanet",
            ("LN", None, 2),
        ),
        (
            "layer symbol '3' at position 2 of LAYER_TYPE_LIST=23 names no mixer.\n"
            "  why: it stands for mixer 3 of LA_MODULE=gla,deltanet.\n"
            "  try: LA_MODULE=gla,deltanet,another",
            ("23", "gla,deltanet", 2),
        ),
        (
            "unknown layer symbol 'l' at position 1 of LAYER_TYPE_LIST=lxn.\n"
            "  why: the symbols are L = gla, N = softmax.\n"
            "  try: LAYER_TYPE_LIST='LLN'",
            ("lxn", "gla", 3),
        ),
        (
            "unknown layer symbol 'L' at position 1 of HYBRID_OVERRIDE_PATTERN=LN.\n"
            "  why: the symbols are M = mamba2, * = softmax.\n"
            "  try: HYBRID_OVERRIDE_PATTERN='M*'",
            (None, "gla", 2, "LN"),
        ),
        (
            "no layer is deltanet, which LA_MODULE=gla,deltanet names.\n"
            "  why: LAYER_TYPE_LIST=LLN gives 2 gla + 1 softmax: L is the first mixer, and digits choose.\n"
            "  try: LAYER_TYPE_LIST=12N, or LA_MODULE=gla",
            ("LLN", "gla,deltanet", 3),
        ),
        (
            "no layer is deltanet or gated_deltanet, which LA_MODULE=gla,deltanet,gated_deltanet names.\n"
            "  why: without LAYER_TYPE_LIST there are 3 gla: L is the first mixer, and digits choose.\n"
            "  try: LAYER_TYPE_LIST=123, or LA_MODULE=gla",
            (None, "gla,deltanet,gdn", 3),
        ),
    ],
)
def test_messages(text: str, arguments: tuple):
    with pytest.raises(ValueError) as error:
        layer_kinds(*arguments, known=KNOWN)
    assert str(error.value) == text


def test_m_needs_mamba2():
    with pytest.raises(ValueError) as error:
        layer_kinds(None, "gla", 2, "M*", known=("gla",))
    assert str(error.value) == (
        "HYBRID_OVERRIDE_PATTERN=M* asks for mamba2, which is not registered.\n"
        "  why: M always means mamba2; the registered mixers are gla, softmax.\n"
        "  try: LAYER_TYPE_LIST=LN with one of them as LA_MODULE"
    )


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ((G, G), "L"),
        ((G, G, G, S), "LLLN"),
        ((G, S) * 3, "LN"),
        ((S, S), "N"),
        ((S, G, D, G), "NL2L"),
        ((G, D, S), "L2N"),
    ],
)
def test_pattern_of(kinds: tuple[str, ...], pattern: str):
    assert pattern_of(kinds) == pattern


def test_the_sources_name_the_registered_mixers():
    from linear_moe import lsm

    assert registered_mixers() == lsm.names()
