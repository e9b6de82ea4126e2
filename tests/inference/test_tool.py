"""The command line of tools/generate.py on a tiny run with a byte-level tokenizer: text, batches, chats, processes."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.inference.models import argv
from tests.training.tiny import train

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|padding|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, _pool):
    """A run with text, whose tokenizer has a chat template: a turn ends with a token of its own."""
    from linear_moe.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tool")
    train_tokenizer(["import os\n" * 9, "user: assistant:"], 270, str(folder / "tokenizer"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    tokens = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    tokens += ["--padded-vocab-size", "384", "--vocab-size", "270"]
    save = ["--run-dir", str(folder / "run"), "--save", str(folder / "run" / "checkpoint")]
    fast = ["--train-iters", "1", "--lr-warmup-iters", "0", "--init-method-std", "0.3"]
    _pool.run(1, train, argv(["gated_deltanet", "mamba2", "softmax"], *save, *fast, *tokens))
    return folder / "run"


def tool_of():
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools" / "generate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def command(rank, world, run, options, typed=""):
    """What the tool prints, and its exit code, in a worker: no second import of Megatron."""
    tool = tool_of()
    out, err = io.StringIO(), io.StringIO()
    words = ["generate.py", "--load", str(run), "--max-new-tokens", "12", *options]
    with (
        patch.object(sys, "argv", words),
        patch.object(sys, "stdin", io.StringIO(typed)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = tool.main()
    return code, out.getvalue(), err.getvalue()


def rows_of(gloo, world, run, file, *options):
    codes = [found[0] for found in gloo(world, command, run, [*options, "--output", str(file)])]
    assert codes == [0] * world
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_as_a_process_of_its_own(run):
    tool = [sys.executable, "tools/generate.py", "--load", str(run), "--prompt", "import \u00e9"]
    draw = ["--temperature", "1", "--seed", "5", "--max-new-tokens", "12", "--ignore-eos"]
    environment = {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}", "PATH": ""}
    done = subprocess.run([*tool, *draw], cwd=ROOT, capture_output=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    *text, last = done.stdout.decode().splitlines()
    assert "\n".join(text).startswith("import \u00e9")
    assert "+ 12 tokens" in last and "recurrent state" in last and "KV cache" in last


def test_prompts_from_a_file_in_batches_and_processes(gloo, run, tmp_path):
    prompts = ["import", "import os\nimport", "o", "os import os import"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    draw = ["--prompts", str(tmp_path / "prompts.jsonl"), "--temperature", "1", "--seed", "3", "--ignore-eos"]
    rows = rows_of(gloo, 1, run, tmp_path / "a", *draw)
    assert [row["prompt"] for row in rows] == prompts
    assert all(len(row["tokens"]) == 12 for row in rows)
    assert rows_of(gloo, 1, run, tmp_path / "b", *draw, "--batch-size", "3") == rows
    third = ["--prompt", prompts[2], "--temperature", "1", "--seed", "5", "--ignore-eos"]
    assert rows_of(gloo, 1, run, tmp_path / "c", *third) == rows[2:3]
    assert rows_of(gloo, 2, run, tmp_path / "d", *draw) == rows
    code, text, _ = gloo(1, command, run, draw)[0]
    assert code == 0 and text.startswith(f"--- 1\nimport{rows[0]['text']}\n--- 2\n")


def test_a_line_of_a_prompt_file_is_a_prompt(tmp_path):
    """Whatever else Unicode ends lines with; a mark of UTF-8 in front is none of the text."""
    texts = ["one\u2028line\x0c", "", "two\x85"]
    quoted = "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    for name, content in {
        "a.txt": "\r\n".join([*texts, ""]),
        "b.jsonl": quoted,
        "c.txt": "\ufeff" + "\n".join(texts),
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        words = ["generate.py", "--load", "run", "--prompts", str(tmp_path / name)]
        with patch.object(sys, "argv", words):
            assert tool_of().read_prompts(tool_of().parse()) == texts, name


@pytest.mark.parametrize("row", ['{"prompt": 5}', '{"prompt": null}', '{"text": "a"}', "5", '{"prompt": "a"'])
def test_a_row_without_a_text_is_told(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(f'"import"\n{row}\n')
    with (
        patch.object(sys, "argv", ["generate.py", "--load", "run", "--prompts", str(tmp_path / "a.jsonl")]),
        pytest.raises(ValueError, match=r"a.jsonl cannot be read: \w+: line 2 is .*\n  why: .*\n  try: "),
    ):
        tool_of().read_prompts(tool_of().parse())


def test_chat(gloo, run):
    once, typed = gloo(1, chat, run)[0]
    code, text, _ = once
    assert code == 0 and not text.startswith("What")
    code, lines, _ = typed
    assert code == 0
    assert lines.count("recurrent state") == 2
    assert lines.startswith(text), "the first turn of a conversation is the answer to its question alone"
    assert gloo(2, chat, run) == [(once, typed), ((0, "", ""), (0, "", ""))], "other ranks are silent"


def chat(rank, world, run):
    once = command(rank, world, run, ["--chat", "--prompt", "What is os?"])
    typed = command(rank, world, run, ["--chat"], "What is os?\n\nWhy?\n")
    return tuple((code, without_measures(text), err) for code, text, err in (once, typed))


LAST_ONLY = "{% for m in messages[-1:] %}" + TEMPLATE.partition("%}")[2]
"""A template that leaves out what was said before, as some do with thoughts."""


@pytest.mark.parametrize("template", [TEMPLATE, LAST_ONLY])
def test_a_chat_goes_on_from_what_it_has_read(gloo, run, tmp_path, template):
    """The same answers as when every turn reads all; that is said, once, where the template asks for it."""
    (tmp_path / "template").write_text(template)
    options = ["--chat", "--chat-template", str(tmp_path / "template"), "--temperature", "1", "--ignore-eos"]
    (kept, err, read), (anew, _, all_read) = gloo(1, chat_twice, run, options)[0]
    assert kept == anew and kept.count("recurrent state") == 3
    assert all_read[0] == read[0]
    if template is TEMPLATE:
        assert err == "" and all(0 < few < many for few, many in zip(read[1:], all_read[1:], strict=True))
    else:
        assert read == all_read and err.count("reads all of them anew") == 1


def chat_twice(rank, world, run, options):
    """Output, errors and the tokens that each turn reads: as it is, and without a memory of earlier turns."""
    from linear_moe.inference.conversation import Conversation
    from linear_moe.inference.decoder import Decoder

    found, stock = [], Decoder.read
    for places in (Conversation.note, lambda self, tokens: None):
        read: list[int] = []

        def counted(self, rows, chunk=None, read=read):
            read.append(len(rows[0]))
            return stock(self, rows, chunk)

        with patch.object(Decoder, "read", counted), patch.object(Conversation, "note", places):
            code, out, err = command(rank, world, run, options, "What is os?\nWhy?\nImport what?\n")
        assert code == 0, err
        found.append((without_measures(out), err, read))
    return found


def without_measures(text):
    return re.sub(r"[0-9.]+ (tokens/s|bytes)", "", text)


def test_ends_and_prompts_of_a_chat(run):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from linear_moe.inference.chat import ChatTemplate

    inner = AutoTokenizer.from_pretrained(str(run.parent / "tokenizer"))

    class Outer:
        eod = inner.eos_token_id
        _tokenizer = type("Inner", (), {"tokenizer": inner})

    chat = ChatTemplate(Outer())
    assert chat.ends() == sorted([inner.eos_token_id, inner.convert_tokens_to_ids("<|padding|>")])
    messages = [{"role": "user", "content": "os"}]
    assert inner.decode(chat.prompt(messages)) == "user:os<|padding|>\nassistant:"
    ends, mark = chat.ends(), inner.eos_token
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, inner.eos_token_id)]
    )
    assert inner.encode("os")[0] == inner.eos_token_id, (
        "a first token, as Llama has one: a template writes its own"
    )
    assert chat.ends() == ends and chat.prompt(messages)[0] != inner.eos_token_id
    inner.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template\n  why: .*\n  try: --chat-template"):
        ChatTemplate(Outer())
    plain = ChatTemplate(Outer(), "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain.ends() == [inner.eos_token_id]
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(Outer(), "{{ raise_exception('no system') }}").prompt(messages)


def test_options_of_drawing_that_change_nothing(gloo, run):
    """Greedy is the default, so that who asks for a nucleus without a temperature has to be told."""
    ask = ["--prompt", "import", "--top-k", "5", "--top-p", "0.9", "--max-new-tokens", "1"]
    told = "linear_moe: --temperature 0, the default, draws nothing, whatever --top-k and --top-p may be\n"
    assert gloo(1, command, run, ask)[0][2] == told
    assert gloo(1, command, run, [*ask, "--temperature", "1"])[0][2] == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "", "--step", "9"], "no checkpoint of step 9"),
        (["--prompt", "a", "--output", "/nowhere/x.jsonl"], "--output /nowhere/x.jsonl cannot be written"),
        (["--prompt", "a", "--output", "/tmp"], "--output /tmp cannot be written\n  why: it is a folder"),
        (["--prompt", "a", "--system", "be brief"], "--system says how a chat goes, and there is none"),
        ([], "there is no prompt"),
    ],
)
def test_errors_are_three_lines(gloo, run, options, text):
    code, out, err = gloo(1, command, run, options)[0]
    assert code == 2 and out == "" and text in err
    assert len(err.strip().splitlines()) == 3 and "\n  why: " in err and "\n  try: " in err


def exported(rank, world, run, target, tokenizer):
    from linear_moe.checkpoint.exporting import export_model

    try:
        return export_model(run, target, tokenizer=tokenizer).warnings
    except ValueError as error:
        return str(error)


def test_another_tokenizer_is_refused_a_moved_or_longer_one_is_not(gloo, run, tmp_path):
    """The same tokens, from an earlier version of the library; two more; one more than rows; other tokens."""
    from linear_moe.data.tokenizer import train_tokenizer

    own = json.loads((run.parent / "tokenizer" / "tokenizer.json").read_text())
    for name, ids in {"moved": [], "longer": [270, 271], "too-long": [384]}.items():
        shutil.copytree(run.parent / "tokenizer", tmp_path / name)
        more = [{**own["added_tokens"][0], "id": id, "content": f"<|{id}|>"} for id in ids]
        merges = [" ".join(pair) for pair in own["model"]["merges"]]
        content = {"added_tokens": own["added_tokens"] + more, "model": own["model"] | {"merges": merges}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(own | content))
    train_tokenizer(["def main():\n" * 9], 270, str(tmp_path / "other"))

    text = gloo(1, command, run, ["--prompt", "import"])[0][1]
    expected = {"moved": "", "longer": "has 2 tokens more than"}
    for name, warning in expected.items():
        code, out, err = gloo(1, command, run, ["--prompt", "import", "--tokenizer", str(tmp_path / name)])[0]
        assert code == 0 and out.splitlines()[0] == text.splitlines()[0]
        assert warning in err and err.count("\n") == bool(warning), err
        (told,) = gloo(1, exported, run, tmp_path / f"{name}-hf", tmp_path / name)
        assert len(told) == bool(warning) and all(warning in line for line in told)
    for name, problem in {
        "other": "is another one than",
        "too-long": "has 385 tokens, and the model 384",
    }.items():
        code, _, err = gloo(1, command, run, ["--prompt", "import", "--tokenizer", str(tmp_path / name)])[0]
        assert code == 2 and problem in err and err.count("\n") == 3, err
        (told,) = gloo(1, exported, run, tmp_path / "hf", tmp_path / name)
        assert problem in told and not list(tmp_path.glob("hf*"))


def test_a_tokenizer_of_a_run_without_one(gloo, run, tmp_path):
    """Trained on numbers: text with `--tokenizer`, numbers without."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer", ignore_errors=True)
    config = json.loads((run / "config.json").read_text())
    words = config["arguments"]
    words[words.index("HuggingFaceTokenizer")] = "NullTokenizer"
    del words[words.index("--tokenizer-model") :][:2]
    config["tokenizer"] |= {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    given = ["--tokenizer", str(run.parent / "tokenizer")]
    (code, out, err), (_, text, _) = (
        gloo(1, command, folder, ["--prompt", "import", *given])[0] for folder in (tmp_path / "run", run)
    )
    assert code == 0 and err == "" and out.splitlines()[0] == text.splitlines()[0]
    code, _, err = gloo(1, command, tmp_path / "run", ["--prompt", "import"])[0]
    assert code == 2 and "is not a row of numbers" in err and "--tokenizer" in err


def test_options_in_the_documentation_exist():
    text = (ROOT / "docs" / "generate.md").read_text()
    sources = [(ROOT / name).read_text() for name in ("tools/generate.py", "linear_moe/bench/decode.py")]
    known = set(re.findall(r'"(--[a-z-]+)"', "".join(sources))) | {"--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
    assert set(re.findall(r'"(--[a-z-]+)"', sources[0])) <= set(re.findall(r"--[a-z-]+", text)) | {
        "--tokenizer"
    }
