"""Samples from JSONL: which tokens they have and which are learned, against transformers; and every way to be wrong."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_moe.data.instructions import prepare as preparing
from linear_moe.data.instructions.packing import Schedule, pack
from linear_moe.data.instructions.prepare import Prepared
from linear_moe.data.instructions.records import read_conversations
from tests.finetune.chat import CHATML, chat_tokenizer, mixed_messages, prepared, write_lines

# The same text as CHATML, with the marks from which transformers itself finds what an assistant says.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "Peru"}]
CHAT = {"messages": [{"role": "user", "content": "Peru"}, {"role": "assistant", "content": "Lima"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As Qwen2's base models: a template, but texts end with another token than turns."""
    return chat_tokenizer(tmp_path_factory.mktemp("base"), eos="<|endoftext|>")


@pytest.fixture(scope="module")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_tokenizer(tmp_path_factory.mktemp("bare"), eos="<|endoftext|>", template=None)


def opened(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def of_lines(
    folder: Path, tokenizer: str, records: list[Any], seq_length: int = 256, **options: Any
) -> Prepared:
    lines = write_lines(folder / "lines.jsonl", records)
    return prepared(tokenizer, lines, folder / "cache", seq_length, **options)


def learned_text(samples: Prepared, tokenizer: str, index: int = 0) -> list[str]:
    """Stretches of learned tokens, as text."""
    sample, text = samples.sample(index), opened(tokenizer)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.learned, [0]])))
    return [text.decode(sample.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_tokens_and_answers_are_those_of_transformers(tokenizer, tmp_path):
    """All but the line break behind the last turn, which nobody reads."""
    records = mixed_messages(12)
    samples = of_lines(tmp_path, tokenizer, records)
    assert samples.report.samples == 12
    for i, record in enumerate(records):
        expected = opened(tokenizer).apply_chat_template(
            record["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert samples.sample(i).tokens.tolist() == expected["input_ids"][:-1]
        assert samples.sample(i).learned.tolist() == [bool(m) for m in expected["assistant_masks"][:-1]]


def test_the_end_of_a_text_is_learned_where_it_is_not_the_end_of_a_turn(base_tokenizer, tmp_path):
    rounds = [*CHAT["messages"], *CHAT["messages"]]
    samples = of_lines(tmp_path, base_tokenizer, [{"messages": rounds}])
    assert learned_text(samples, base_tokenizer) == ["Lima<|im_end|>", "Lima<|im_end|>\n<|endoftext|>"]
    assert samples.report.learned_tokens == int(samples.learned.sum())


def test_what_follows_the_last_answer_is_left_out(tokenizer, tmp_path):
    more = [*CHAT["messages"], {"role": "user", "content": "Thanks"}]
    samples = of_lines(tmp_path, tokenizer, [CHAT, {"messages": more}])
    assert samples.sample(0).tokens.tolist() == samples.sample(1).tokens.tolist()


WITH_TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' + tools[0].name + '<|im_end|>\n' }}{% endif %}" + CHATML


def test_tools_are_in_the_prompt(tokenizer, tmp_path):
    """Calls and what they return, too: the one is learned, the other not."""
    call = {"role": "assistant", "content": "Lima?", "tool_calls": [{"name": "capital"}]}
    messages = [CHAT["messages"][0], call, {"role": "tool", "content": "yes"}, CHAT["messages"][1]]
    record = {"messages": messages, "tools": [{"name": "capital"}]}
    samples = of_lines(tmp_path, tokenizer, [record, {"messages": messages}], template=WITH_TOOLS)
    texts = [opened(tokenizer).decode(samples.sample(i).tokens) for i in range(2)]
    assert texts[0] == "<|im_start|>tools\ncapital<|im_end|>\n" + texts[1]
    for i in range(2):
        assert learned_text(samples, tokenizer, i) == ["Lima?<|im_end|>", "Lima<|im_end|>"]
    with pytest.raises(
        ValueError, match=r"lines.jsonl:1 has tools, and the chat template does not write them"
    ):
        of_lines(tmp_path, tokenizer, [record])


def test_a_call_without_words_is_an_answer(tokenizer, tmp_path):
    """Its content is null in what OpenAI's interface writes; nothing to learn and no call is an empty answer."""
    template = WITH_TOOLS.replace(
        "message['content']",
        "message['content'] + (message.tool_calls[0].name if message.tool_calls else '')",
    )
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "capital"}]}
    samples = of_lines(
        tmp_path, tokenizer, [{"messages": [*USER, calls], "tools": [{"name": "capital"}]}], template=template
    )
    assert learned_text(samples, tokenizer) == ["capital<|im_end|>"] and samples.report.empty_answers == 0
    silent = {"role": "assistant", "content": "", "tool_calls": []}
    assert of_lines(tmp_path, tokenizer, [CHAT, {"messages": [*USER, silent]}]).report.empty_answers == 1


def test_answers_one_behind_the_other_are_one_sample(tokenizer, tmp_path):
    """By a template without marks the second one's prompt ends where the first answer does; and nobody has to ask."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    answers = [{"role": "assistant", "content": text} for text in ("Lima", "Rome")]
    samples = of_lines(tmp_path, tokenizer, [{"messages": [*USER, *answers]}], template=template)
    assert (samples.report.samples, samples.report.split) == (1, 0)
    assert learned_text(samples, tokenizer) == ["LimaRome<|im_end|>"]
    samples = of_lines(tmp_path, tokenizer, [{"messages": [answers[0], *USER, answers[1]]}])
    first, second = learned_text(samples, tokenizer)
    assert first.endswith("Lima<|im_end|>") and second == "Rome<|im_end|>"


def test_an_instruction_is_a_question_and_its_answer(tokenizer, tmp_path):
    same = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"messages": [{"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"}]},
        {"instruction": "Add.\n\n2 2", "input": "", "output": "4"},
        {"instruction": "Add.\n\n2 2", "input": None, "output": "4"},
    ]
    samples = of_lines(tmp_path, tokenizer, same)
    assert len({tuple(samples.sample(i).tokens.tolist()) for i in range(4)}) == 1
    assert learned_text(samples, tokenizer) == ["4<|im_end|>"] and samples.report.template is None


def test_the_plain_template(bare_tokenizer, tmp_path):
    """Of instructions without a chat template; of messages when it is asked for."""
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    samples = of_lines(tmp_path, bare_tokenizer, [record])
    text = opened(bare_tokenizer).decode(samples.sample(0).tokens)
    assert text == "### Instruction:\nAdd.\n\n2 2\n\n### Response:\n4<|endoftext|>"
    assert learned_text(samples, bare_tokenizer) == ["4<|endoftext|>"]
    assert samples.report.template == preparing.ChatTemplate(opened(bare_tokenizer)).source
    rounds = [{"role": "system", "content": "Be brief."}, *CHAT["messages"], *CHAT["messages"]]
    samples = of_lines(tmp_path, bare_tokenizer, [{"messages": rounds}], template=samples.report.template)
    assert opened(bare_tokenizer).decode(samples.sample(0).tokens) == "Be brief." + 2 * (
        "\n\n### Instruction:\nPeru\n\n### Response:\nLima<|endoftext|>"
    )


def test_a_prompt_has_the_tokens_that_it_has_alone(tokenizer, tmp_path):
    """Where a token of the whole text would reach from the prompt into the answer."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    halves = [{"role": "user", "content": "Pa"}, {"role": "assistant", "content": "ris"}]
    text = opened(tokenizer)
    alone, whole = (text(part, add_special_tokens=False)["input_ids"] for part in ("Pa", "Paris"))
    assert whole[: len(alone)] != alone, "the border is inside a token"
    sample = of_lines(tmp_path, tokenizer, [{"messages": halves}], template=template).sample(0)
    assert sample.tokens[: len(alone)].tolist() == alone
    assert sample.learned.tolist() == [False] * len(alone) + [True] * (len(sample.tokens) - len(alone))


def test_over_long_samples_are_counted_and_never_cut_unless_asked(tokenizer, tmp_path):
    long = {"messages": [{"role": "user", "content": "Peru"}, {"role": "assistant", "content": "Lima " * 40}]}
    late = {"messages": [{"role": "user", "content": "Peru " * 40}, {"role": "assistant", "content": "Lima"}]}
    samples = of_lines(tmp_path, tokenizer, [CHAT, long, late], 64)
    report = samples.report
    assert (report.samples, report.over_long, report.cut) == (1, 2, 0) and report.longest > 64
    (note,) = report.notes(64)
    assert note.startswith(
        "lines.jsonl: 2 of 3 samples are longer than SEQ_LEN=64 and are left out; SEQ_LEN="
    )
    everything = of_lines(tmp_path, tokenizer, [CHAT, long, late], report.longest)
    assert everything.report.samples == 3 and everything.report.notes(report.longest) == []
    cut = of_lines(tmp_path, tokenizer, [CHAT, long, late], 64, over_long="truncate")
    assert (cut.report.samples, cut.report.over_long, cut.report.cut) == (2, 2, 1), "one has no answer left"
    assert cut.lengths.tolist()[1] == 64
    assert cut.sample(1).tokens.tolist() == everything.sample(1).tokens[:65].tolist()


def test_empty_answers_are_counted(tokenizer, tmp_path):
    empty = {"instruction": "Say nothing.", "output": " "}
    samples = of_lines(tmp_path, tokenizer, [CHAT, empty])
    assert (samples.report.samples, samples.report.empty_answers) == (1, 1)
    assert samples.report.notes(256) == ["lines.jsonl: 1 of 2 samples have an empty answer and are left out."]
    asked = {"messages": [{"role": "system", "content": ""}, *CHAT["messages"]]}
    report = of_lines(tmp_path, tokenizer, [asked, "", CHAT]).report
    assert (report.samples, report.empty_answers) == (2, 0), "nor is an empty line a sample"


BAD = {
    "not JSON": ('{"messages": ', "lines.jsonl:2 is not JSON"),
    "no object": ("[1]", "lines.jsonl:2 is no sample"),
    "other fields": ({"text": "Peru"}, "lines.jsonl:2 has neither messages nor instruction and output"),
    "messages no list": ({"messages": "Peru"}, "lines.jsonl:2 has messages that are no list"),
    "messages of texts": ({"messages": ["Peru", "Lima"]}, "lines.jsonl:2 has messages that are no list"),
    "no output": ({"instruction": "Peru"}, "lines.jsonl:2 has neither messages nor instruction and output"),
    "no instruction": ({"output": "Lima"}, "lines.jsonl:2 has neither messages nor instruction and output"),
    "no role": (
        {"messages": [{"content": "Peru"}, *CHAT["messages"]]},
        "has no text under 'role' in message 1\n  why: it holds content\n",
    ),
    "no assistant": ({"messages": USER}, "lines.jsonl:2 has no turn of the assistant\n"),
    "no turns": ({"messages": []}, "lines.jsonl:2 has no turn of the user and none of the assistant"),
    "no content": (
        {"messages": [*USER, {"role": "assistant"}]},
        "has no text under 'content' in message 2\n  why: it holds role\n",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, *CHAT["messages"]]},
        "has no text under 'content' in message 1\n  why: it is a list, and each is a string\n",
    ),
    "content null": (
        {"messages": [*USER, {"role": "assistant", "content": None}]},
        "has no text under 'content' in message 2\n  why: it is null, and each is a string\n",
    ),
    "half a pair": ('{"instruction": "x", "output": "\\ud83d"}', "lines.jsonl:2 holds what is no text"),
    "tools no list": ({**CHAT, "tools": "capital"}, "lines.jsonl:2 has tools that are no list of objects"),
    "tools some": (
        {**CHAT, "tools": [{"name": "capital"}, "sum"]},
        "lines.jsonl:2 has tools that are no list of objects",
    ),
    "no question": ({"instruction": None, "output": "x"}, "lines.jsonl:2 has no text under 'instruction'"),
    "no text": ({"instruction": 3, "output": "x"}, "lines.jsonl:2 has no text under 'instruction'"),
}


@pytest.mark.parametrize("record,expected", BAD.values(), ids=BAD)
def test_a_broken_line_is_named(tokenizer, tmp_path, record, expected):
    with pytest.raises(ValueError) as error:
        of_lines(tmp_path, tokenizer, [CHAT, record])
    text = str(error.value)
    assert expected in text and "\n  why: " in text and "\n  try: " in text
    assert not (tmp_path / "cache").exists(), "nothing is written"


def test_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    with pytest.raises(ValueError, match=r"lines.jsonl:1 is compressed\n  why: .*\n  try: gzip -dc, "):
        list(read_conversations(str(path)))


def test_bytes_that_are_no_text_are_named(tokenizer, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"lines.jsonl:2 is not JSON \(not UTF-8"):
        prepared(tokenizer, str(path), tmp_path / "cache")


def test_messages_need_a_chat_template(bare_tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"lines.jsonl:1 has messages, but the tokenizer has no chat template"
    ):
        of_lines(tmp_path, bare_tokenizer, [CHAT])


def test_where_earlier_turns_are_rewritten_each_answer_is_a_sample(tokenizer, tmp_path):
    """As templates of models that think: thoughts are in the last turn only."""
    template = CHATML.replace(
        "message['content']", "('- ' if loop.last and loop.index % 2 == 0 else '') + message['content']"
    )
    rounds = [*CHAT["messages"], *CHAT["messages"]]
    samples = of_lines(tmp_path, tokenizer, [{"messages": rounds}, CHAT], template=template)
    assert samples.report.samples == 3 and samples.report.split == 1
    assert "1 conversation(s) became one sample for each answer" in samples.report.notes(256)[0]
    assert [learned_text(samples, tokenizer, i) for i in range(3)] == [["- Lima<|im_end|>"]] * 3
    for i, messages in ((0, rounds[:2]), (1, rounds), (2, rounds[:2])):
        text = opened(tokenizer).apply_chat_template(messages, chat_template=template, tokenize=False)
        assert opened(tokenizer).decode(samples.sample(i).tokens) == text.rstrip()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + CHATML,
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    ],
    ids=["the number of turns", "no answers"],
)
def test_a_template_that_rewrites_prompts_is_refused(tokenizer, tmp_path, template):
    with pytest.raises(ValueError, match="cannot be split into prompts and answers"):
        of_lines(tmp_path, tokenizer, [CHAT], template=template)


def test_a_template_that_refuses_is_quoted(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"lines.jsonl:1 does not fit the chat template: only users"):
        of_lines(tmp_path, tokenizer, [CHAT], template="{{ raise_exception('only users') }}")


def test_a_tokenizer_that_does_not_open_is_told(tmp_path):
    folder = tmp_path / "tokenizer"
    chat_tokenizer(folder)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"cannot be opened by transformers: [^\n]+\n  why: "):
        preparing.prepare(
            [write_lines(tmp_path / "lines.jsonl", [CHAT])],
            str(folder),
            tmp_path / "cache",
            fingerprint="",
            seq_length=64,
        )


def test_a_folder_with_the_code_of_a_model_asks_nothing(tmp_path, monkeypatch):
    folder, asked = tmp_path / "model", []
    chat_tokenizer(folder)
    config = {"model_type": "linear_moe", "auto_map": {"AutoConfig": "configuration_linear_moe.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    assert preparing._open(str(folder)).chat_template
    assert not asked, "a run script would wait for an answer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Own: pass\n")
    with contextlib.suppress(ValueError):
        preparing._open(str(folder))
    assert not asked and not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "records,expected",
    [
        ([], "holds no sample"),
        ([{"instruction": "x", "output": ""}], "has no sample that can be learned"),
        ([{"instruction": "x " * 99, "output": "y"}], "SEQ_LEN=2"),
    ],
    ids=["empty file", "empty answers", "all too long"],
)
def test_nothing_left_is_an_error(tokenizer, tmp_path, records, expected):
    with pytest.raises(ValueError, match=expected):
        of_lines(tmp_path, tokenizer, records, 64)
    assert not (tmp_path / "cache").exists()


def test_samples_are_tokenized_once(tokenizer, tmp_path, monkeypatch):
    """Until the file, the length, or the template changes; a damaged folder is told."""
    first = of_lines(tmp_path, tokenizer, [CHAT])
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_write", lambda *args: pytest.fail("tokenized again"))
        again = of_lines(tmp_path, tokenizer, [CHAT])
    assert again.folder == first.folder and again.report == first.report
    assert of_lines(tmp_path, tokenizer, [CHAT, CHAT]).folder != first.folder
    assert of_lines(tmp_path, tokenizer, [CHAT], 128).folder != first.folder
    assert of_lines(tmp_path, tokenizer, [CHAT], template=MARKED).folder != first.folder
    (first.folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no prepared samples"):
        of_lines(tmp_path, tokenizer, [CHAT])


def test_packs_hold_every_sample_once():
    lengths = np.random.default_rng(0).integers(1, 51, size=500)
    packs = pack(lengths, 100, seed=3)
    assert sorted(sample for one in packs for sample in one) == list(range(500))
    assert max(int(lengths[one].sum()) for one in packs) <= 100
    assert len(packs) <= 1.02 * lengths.sum() / 100 + 1
    assert packs == pack(lengths, 100, seed=3) != pack(lengths, 100, seed=4)


def test_an_epoch_takes_every_pack_once():
    schedule = Schedule(num_packs=10, per_step=4, seed=5)
    assert schedule.steps_per_epoch == 3
    for epoch in range(3):
        places = [schedule.place(slot) for slot in range(12 * epoch, 12 * (epoch + 1))]
        assert [place for _, place in places] == [*range(10), None, None]
        assert {number for number, _ in places} == {epoch}
        assert sorted(schedule.order(epoch)) == list(range(10))
    assert schedule.order(0).tolist() != schedule.order(1).tolist() == schedule.order(1).tolist()
