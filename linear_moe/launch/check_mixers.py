"""Whether the mixers of a run take their options and its layout: what the trainer would find ten seconds later.

The mixers have to be imported, and torch with them (2 s): the last check, of runs that ask something of a mixer.
"""

import argparse
import difflib
from typing import NoReturn

from linear_moe.launch.plan import SHARED_PREFIXES, RunPlan, mixer_prefixes
from linear_moe.model.pattern import SOFTMAX


def check_mixers(plan: RunPlan) -> None:
    """EXTRA_ARGS, TP, CP and AC are such that every mixer of the model can be made."""
    s = plan.settings
    prefixes = (*SHARED_PREFIXES, *mixer_prefixes(s.mixer_modules))
    has_options = any(word.startswith(prefixes) for word in plan.extra_args)
    asks = has_options or s.mixer_modules or s.tp > 1 or s.cp > 1 or s.ac == "full"
    if asks and {*plan.kinds} != {SOFTMAX}:
        _check(plan, prefixes)


def _check(plan: RunPlan, prefixes: tuple[str, ...]) -> None:
    from linear_moe import lsm
    from linear_moe.lsm.registry import import_mixers
    from linear_moe.model.mixer_options import (
        add_mixer_options,
        check_layout,
        check_supported,
        config_of,
        take_mixer_options,
    )

    size, s = plan.size, plan.settings
    import_mixers(s.mixer_modules or "")
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_mixer_options(parser)
    args, others = parser.parse_known_args(list(plan.extra_args))
    for word in others:
        if word.startswith(prefixes) and word.partition("=")[0] != "--la-module":
            parser.error(f"no mixer has the option {word.partition('=')[0]}{parser.nearest(word)}")
    options = take_mixer_options(args, plan.kinds)
    typed = {word.partition("=")[0] for word in plan.extra_args}
    layouts = {
        "TP": s.tp > 1,
        "SP": plan.sequence_parallel,
        "CP": s.cp > 1,
        "PP": s.pp > 1,
        "VPP": s.vpp > 1,
        "EP": s.ep > 1,
        "packed": s.pack or plan.instructions is not None,
        "recompute": s.ac == "full" or (s.ac == "sel" and "--no-lsm-recompute" not in typed),
    }
    for kind in sorted({*plan.kinds} - {SOFTMAX}):
        config = config_of(
            kind,
            options.get(kind, {}),
            typed=typed,
            hidden_size=size.hidden_size,
            num_heads=size.num_attention_heads,
            head_dim=size.kv_channels,
            layers_of_kind=plan.kinds.count(kind),
            qkv_bias=plan.family.add_qkv_bias or "--add-qkv-bias" in plan.extra_args,
            norm_eps=size.norm_epsilon,
        )
        mixer = lsm.get(kind)(config)
        check_supported(mixer, layouts)
        check_layout(mixer, kind, plan.kinds, tp=s.tp, cp=s.cp, recomputes_layers=s.ac == "full")


class _Parser(argparse.ArgumentParser):
    """Its mistakes are errors, and leave no usage of several pages."""

    def nearest(self, word: str) -> str:
        """The option that is spelt most like it, in words; nothing without one."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0], flags, n=1, cutoff=0.9)
        return f"; the nearest is {near[0]}" if near else ""

    def error(self, message: str) -> NoReturn:
        raise ValueError(
            f"EXTRA_ARGS: {message}.\n"
            f"  why: options of mixers go to the mixers, and have their types.\n"
            f"  try: python -m linear_moe.lsm <mixer>, which lists its options"
        )
