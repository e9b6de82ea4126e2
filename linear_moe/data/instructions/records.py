"""Conversations of a JSONL file: ``messages``, or ``instruction``, ``input`` and ``output``; a broken line is named.

{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
{"instruction": "Add the numbers.", "input": "2 2", "output": "4"}         the same as user and assistant

Beside ``messages`` a line may have ``tools``, which the chat template writes into the prompt.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from linear_moe.data.corpus import COMPRESSED

EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Conversation:
    """One sample."""

    where: str
    """File and line."""
    messages: list[dict[str, Any]]
    """As the chat template takes them: ``role``, ``content`` and what else the line has."""
    has_roles: bool
    """Whether the line held ``messages``; else it was an instruction."""
    tools: list[dict[str, Any]] | None = None
    """What the assistant may call, for the chat template."""

    @property
    def has_empty_answer(self) -> bool:
        """Whether an assistant turn says nothing."""
        return any(
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
            for message in self.messages
        )


def read_conversations(path: str) -> Iterator[Conversation]:
    """The samples of a file, in order; empty lines are left out.

    Raises:
        ValueError: a line that is no sample, with its file and number.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _conversation(line, f"{path}:{number}")


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # fails for half of an escaped pair
    except UnicodeEncodeError as error:
        why = "JSON allows half of an escaped pair of characters, and no tokenizer takes it"
        raise _problem(where, f"holds what is no text ({error.reason})", why) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if line.startswith(tuple(COMPRESSED)):
            instead = "gzip -dc, zstd -dc or xz -dc of it, into a .jsonl file"
            raise _problem(where, "is compressed", "samples are JSONL, as text", instead) from None
        reason = error.msg if isinstance(error, json.JSONDecodeError) else f"not UTF-8: {error.reason}"
        raise _problem(where, f"is not JSON ({reason})", "every line is one JSON object") from None
    if not isinstance(record, dict):
        why = f"every line is one JSON object, and this one is a {type(record).__name__}"
        raise _problem(where, "is no sample", why)
    if "messages" in record:
        messages = _messages(record["messages"], where)
        return Conversation(where, messages, has_roles=True, tools=_tools(record.get("tools"), where))
    if "instruction" in record and "output" in record:
        return Conversation(where, _turns(record, where), has_roles=False)
    raise _problem(
        where,
        "has neither messages nor instruction and output",
        f"the line holds {', '.join(record) or 'nothing'}",
    )


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _problem(where, "has messages that are no list of objects", "each is one turn")
    turns = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            name = "content" if isinstance(message.get("role"), str) else "role"
            kinds = {dict: "an object", list: "a list", type(None): "null"}
            held = kinds.get(type(message.get(name)), "a number")
            without = f"it holds {', '.join(message) or 'nothing'}"
            why = f"it is {held}, and each is a string" if name in message else without
            raise _problem(where, f"has no text under {name!r} in message {i + 1}", why)
        turns.append({**message, "content": content})
    roles = [turn["role"] for turn in turns]
    absent = [role for role in ("user", "assistant") if role not in roles]
    if absent:
        what = f"has no turn of the {' and none of the '.join(absent)}"
        why = (
            f"answers of the assistant to a user are learned; the roles here are {', '.join(roles) or 'none'}"
        )
        raise _problem(where, what, why)
    return turns


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        why = "each describes a function, as JSON schema"
        raise _problem(where, "has tools that are no list of objects", why)
    return tools or None


def _turns(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    fields = {name: record.get(name, "") for name in ("instruction", "input", "output")}
    for name, value in fields.items():
        if not isinstance(value, str) and not (name == "input" and value is None):
            raise _problem(where, f"has no text under {name!r}", f"it is a {type(value).__name__}")
    question = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]


def _problem(where: str, what: str, why: str, instead: str = EXAMPLE) -> ValueError:
    return ValueError(f"{where} {what}\n  why: {why}\n  try: {instead}")
