"""What the command line of conversions hands on; and which options a linearised layer gets beside the user's."""

import sys
from unittest.mock import patch

import pytest

from linear_moe.checkpoint.__main__ import words_of

IMPORT = "import --hf a --save b"
EXPORT = "export --load a --hf b"


def handed_on(rank, world, commands):
    """Of each command line: the folders and the options that the conversion is called with."""
    from linear_moe.checkpoint import __main__ as tool
    from linear_moe.checkpoint import exporting, importing

    calls = []

    def convert(*folders, progress, **options):
        calls.append((folders, options))
        raise ValueError("that will do")

    for command in commands:
        with (
            patch.object(importing, "import_model", convert),
            patch.object(exporting, "export_model", convert),
            patch.object(sys, "argv", ["convert.py", *command.split()]),
        ):
            assert tool.main() == 2
    return calls


def stopped(rank, world, error):
    from linear_moe.checkpoint import __main__ as tool
    from linear_moe.checkpoint import exporting

    said = []
    with (
        patch.object(exporting, "export_model", side_effect=error),
        patch.object(tool, "_write", lambda stream, text: said.append(text)),
        patch.object(sys, "argv", ["convert.py", *EXPORT.split()]),
    ):
        return tool.main(), said


def test_a_conversion_stopped_by_hand_says_how_to_go_on(gloo):
    code, (said,) = gloo(1, stopped, KeyboardInterrupt)[0]
    assert code == 130 and "the same command goes on" in said


def test_a_full_disk_is_a_message(gloo):
    """A write names no file."""
    code, (said,) = gloo(1, stopped, OSError(28, "No space left on device"))[0]
    assert code == 2 and said.startswith("linear_moe: b cannot be used: No space left on device\n  why: ")


def test_every_option_arrives(gloo):
    more = "--la-module gla --layer-type-list LN --layer-kinds gla,softmax --allow-pickle --extra-args=--x"
    out = "--step 7 --tokenizer t --shard-gb 0.25 --remote-code"
    calls = gloo(1, handed_on, [IMPORT, f"{IMPORT} {more}", EXPORT, f"{EXPORT} {out}"])[0]
    assert all(folders == ("a", "b") for folders, _ in calls)
    names = ["la_module", "layer_type_list", "kinds", "extra_args", "allow_pickle"]
    assert calls[0][1] == dict(zip(names, [None, None, None, [], False], strict=True))
    assert calls[1][1] == dict(zip(names, ["gla", "LN", ["gla", "softmax"], ["--x"], True], strict=True))
    names = ["step", "tokenizer", "native", "shard_bytes"]
    assert calls[2][1] == dict(zip(names, [None, None, True, 5_000_000_000], strict=True))
    assert calls[3][1] == dict(zip(names, [7, "t", False, 250_000_000], strict=True))


def test_options_of_mixers_are_split_as_a_shell_does():
    assert words_of("--mixer-module 'a b' --gla-gate-rank=32") == [
        "--mixer-module",
        "a b",
        "--gla-gate-rank=32",
    ]
    with pytest.raises(
        ValueError, match=r"--extra-args '--x cannot be read: No closing .*\n  why: .*\n  try: "
    ):
        words_of("'--x")


def options(rank, world, kind, given):
    from linear_moe.checkpoint.options import linear_options

    return linear_options({kind, "softmax"}, given)


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        ("gla", [], "--gla-expand-k 1.0 --gla-output-gate sigmoid"),
        ("gla", ["--gla-gate-rank", "32"], "--gla-expand-k 1.0 --gla-output-gate sigmoid"),
        ("gla", ["--gla-expand-k=0.5"], "--gla-output-gate sigmoid"),
        ("gla", ["--la-gate-fn", "swish"], "--gla-expand-k 1.0"),
        ("gla", ["--expand-k", "1", "--gla-output-gate", "swish"], ""),
        ("based", [], ""),
        ("deltanet", [], ""),
    ],
)
def test_whole_heads_unless_the_user_says_otherwise(gloo, kind, given, wanted):
    """Each option of its own; the keys of a map that squares their width stay as narrow as they are."""
    assert " ".join(gloo(1, options, kind, given)[0]) == wanted
