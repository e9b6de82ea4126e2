"""Layer patterns: which mixer each layer has, from the strings people type.

LAYER_TYPE_LIST: `L` is the mixer named by LA_MODULE, `N` softmax attention. LA_MODULE may name several mixers,
"gla,gated_deltanet": then `L` is the first one and the digits `1`, `2`, ... choose by position, so "112N" is two gla
layers, one gated_deltanet and one softmax layer.
HYBRID_OVERRIDE_PATTERN: `M` is mamba2, `*` softmax attention. A symbol is a whole layer with its feed-forward block.
A pattern shorter than the model repeats when its length divides the number of layers: "LLLN" is enough for 12 layers.
Both spellings come from the earlier Linear-MoE system. Needs neither torch nor Megatron.
"""

import difflib
from collections.abc import Collection

SOFTMAX = "softmax"
"""Kind of a softmax attention layer; every other kind is the name of a linear mixer."""

ALIASES = {
    "basic": "linear_attention",
    "basic_linear_attention": "linear_attention",
    "gated_linear_attention": "gla",
    "gdn": "gated_deltanet",
    "gated_delta_net": "gated_deltanet",
    "gated_delta_rule": "gated_deltanet",
    "delta_net": "deltanet",
    "delta_rule": "deltanet",
    "lightning": "lightning_attention",
    "lightning_attn": "lightning_attention",
    "retnet": "retention",
    "mamba": "mamba2",
    "mamba_2": "mamba2",
    "kimi_delta_attention": "kda",
    "attention": SOFTMAX,
    "softmax_attention": SOFTMAX,
}
"""Other spellings of mixer names -> the registered name. Case, `-` and spaces do not matter."""


def canonical_mixer(name: str, known: Collection[str]) -> str:
    """The registered spelling of a mixer name.

    Raises ValueError, with the nearest name and the list, when no mixer of `known` (softmax included) has that name.
    """
    known = sorted({*known, SOFTMAX})
    spelling = name.strip().lower().replace("-", "_").replace(" ", "_")
    canonical = ALIASES.get(spelling, spelling)
    if canonical in known:
        return canonical
    spellings = known + [alias for alias, target in ALIASES.items() if target in known]
    near = difflib.get_close_matches(canonical, spellings, n=1, cutoff=0.5)
    nearest = ALIASES.get(near[0], near[0]) if near else known[0]
    raise ValueError(
        f"unknown mixer {name!r}{f'; the nearest name is {nearest!r}' if near else ''}.\n"
        f"  why: the registered mixers are {', '.join(known)}.\n"
        f"  try: LA_MODULE={nearest}{'' if near else ', or MIXER_MODULES=<your module that registers it>'}"
    )


def layer_kinds(
    pattern: str | None,
    la_module: str | None,
    num_layers: int,
    hybrid_override_pattern: str | None = None,
    *,
    known: Collection[str],
) -> tuple[str, ...]:
    """Mixer of each layer, first layer first: `num_layers` registered names, `softmax` among them.

    No pattern means the LA_MODULE mixer everywhere. Both patterns may be given as long as they say the same.
    Raises ValueError for an unknown mixer or symbol, a pattern that does not fit the layers, two patterns that differ,
    and for several mixers under a pattern that chooses by `L` alone.
    """
    assert num_layers > 0
    pattern, hybrid = _clean(pattern), _clean(hybrid_override_pattern)
    names = [name for name in (la_module or "").split(",") if name.strip()]
    kinds = None
    if pattern is not None or hybrid is None:
        mixers = tuple(canonical_mixer(name, known) for name in names)
        kinds = _expand("LAYER_TYPE_LIST", pattern or "L", _layer_symbols(mixers), num_layers)
        if len(set(mixers)) > 1 and set(pattern or "L") <= {"L", "N"} and SOFTMAX != mixers[0] in kinds:
            raise ValueError(_never_chosen(mixers, kinds, pattern))
    if hybrid is None:
        assert kinds is not None
        return kinds
    hybrid_kinds = _expand("HYBRID_OVERRIDE_PATTERN", hybrid, {"M": "mamba2", "*": SOFTMAX}, num_layers)
    if "mamba2" in hybrid_kinds and "mamba2" not in known:
        raise ValueError(
            f"HYBRID_OVERRIDE_PATTERN={hybrid} asks for mamba2, which is not registered.\n"
            f"  why: M always means mamba2; the registered mixers are {', '.join(sorted({*known, SOFTMAX}))}.\n"
            f"  try: LAYER_TYPE_LIST={hybrid.translate(str.maketrans('M*', 'LN'))} with one of them as LA_MODULE"
        )
    if kinds is not None and kinds != hybrid_kinds:
        raise ValueError(
            f"LAYER_TYPE_LIST={pattern} and HYBRID_OVERRIDE_PATTERN={hybrid} describe two different models.\n"
            f"  why: the first gives {_summary(kinds)}, the second {_summary(hybrid_kinds)}.\n"
            f"  try: HYBRID_OVERRIDE_PATTERN= (empty), or LAYER_TYPE_LIST= (empty)"
        )
    return hybrid_kinds


def pattern_of(kinds: tuple[str, ...]) -> str:
    """The shortest string that describes the kinds: `LLLN`, with digits for the second and later linear mixers."""
    mixers = [kind for kind in dict.fromkeys(kinds) if kind != SOFTMAX]
    symbol = {kind: "L" if i == 0 else str(i + 1) for i, kind in enumerate(mixers)} | {SOFTMAX: "N"}
    full = "".join(symbol[kind] for kind in kinds)
    period = next(
        p for p in range(1, len(full) + 1) if len(full) % p == 0 and full[:p] * (len(full) // p) == full
    )
    return full[:period]


def _clean(pattern: str | None) -> str | None:
    return pattern.strip() if pattern and pattern.strip() else None


def _layer_symbols(mixers: tuple[str, ...]) -> dict[str, str]:
    linear = {"L": mixers[0]} if mixers else {}
    chosen = {str(i + 1): mixer for i, mixer in enumerate(mixers)} if len(mixers) > 1 else {}
    return linear | chosen | {"N": SOFTMAX}


def _expand(variable: str, pattern: str, symbols: dict[str, str], num_layers: int) -> tuple[str, ...]:
    for position, symbol in enumerate(pattern):
        if symbol not in symbols:
            raise ValueError(_unknown_symbol(variable, pattern, position, symbols))
    if len(pattern) > num_layers or num_layers % len(pattern):
        raise ValueError(_does_not_fit(variable, pattern, num_layers))
    return tuple(symbols[symbol] for symbol in pattern) * (num_layers // len(pattern))


def _never_chosen(mixers: tuple[str, ...], kinds: tuple[str, ...], pattern: str | None) -> str:
    symbols = "".join(str(i + 1) for i in range(len(mixers))) + ("N" if SOFTMAX in kinds else "")
    given = f"LAYER_TYPE_LIST={pattern} gives" if pattern else "without LAYER_TYPE_LIST there are"
    return (
        f"no layer is {' or '.join(mixers[1:])}, which LA_MODULE={','.join(mixers)} names.\n"
        f"  why: {given} {_summary(kinds)}: L is the first mixer, and digits choose.\n"
        f"  try: LAYER_TYPE_LIST={symbols}, or LA_MODULE={mixers[0]}"
    )


def _unknown_symbol(variable: str, pattern: str, position: int, symbols: dict[str, str]) -> str:
    symbol = pattern[position]
    where = f"{symbol!r} at position {position + 1} of {variable}={pattern}"
    if variable == "LAYER_TYPE_LIST" and (symbol == "L" or symbol.isdigit()):
        mixers = list(dict.fromkeys(kind for key, kind in symbols.items() if key != "N"))
        return (
            f"layer symbol {where} names no mixer.\n"
            f"  why: it stands for mixer {symbol.replace('L', '1')} of LA_MODULE={','.join(mixers)}.\n"
            f"  try: LA_MODULE={','.join([*mixers, 'gated_deltanet' if not mixers else 'another'])}"
        )
    legend = ", ".join(f"{key} = {kind}" for key, kind in symbols.items())
    layer = "a symbol is a whole layer with its feed-forward block; " if symbol == "-" else ""
    fixed = "".join(x if x in symbols else _nearest_symbol(x, symbols) for x in pattern)
    return (
        f"unknown layer symbol {where}.\n  why: {layer}the symbols are {legend}.\n  try: {variable}='{fixed}'"
    )


def _nearest_symbol(symbol: str, symbols: dict[str, str]) -> str:
    softmax = next(key for key, kind in symbols.items() if kind == SOFTMAX)
    linear = next((key for key, kind in symbols.items() if kind != SOFTMAX and not key.isdigit()), softmax)
    if symbol in "-, ":
        return ""
    if symbol.upper() in symbols:
        return symbol.upper()
    return softmax if symbol in "*NnAa" else linear


def _does_not_fit(variable: str, pattern: str, num_layers: int) -> str:
    length = len(pattern)
    if length > num_layers:
        why = f"the pattern has {length} symbols and the model {num_layers} layers; it needs one symbol per layer."
    else:
        why = f"a shorter pattern is repeated, but {length} symbols do not divide {num_layers} layers."
    near = max(p for p in range(1, min(length, num_layers) + 1) if num_layers % p == 0)
    one_each = (pattern * num_layers)[:num_layers]
    repeated = (
        f", or {variable}='{pattern[:near]}' (repeated {num_layers // near} x)" if near < num_layers else ""
    )
    return (
        f"{variable}={pattern} ({length} symbols) does not fit {num_layers} layers.\n"
        f"  why: {why}\n"
        f"  try: {variable}='{one_each}' ({num_layers} symbols){repeated}"
    )


def _summary(kinds: tuple[str, ...]) -> str:
    return " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
