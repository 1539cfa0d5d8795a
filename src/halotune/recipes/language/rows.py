"""Rows of training data, from a file or the hub, as conversations or as text.

A row is one of

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}      or ShareGPT's "conversations"
    {"prompt": "…", "response": "…"}       other names are known (PAIRS), and Alpaca's "input"; or two lists of messages
    {"text": "…"}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ..common.rows import READERS, Row, read_rows, text_of, usable

# What a prompt and its response are called: MetaMathQA, Alpaca, TRL, GSM8K …
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
SPLIT_SEED = 0
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's


@dataclass(frozen=True)
class Conversation:
    """Messages of alternating roles, of which the model learns to write some.

    Attributes:
        learned: numbers of the messages that count in the loss.
    """

    messages: list[dict[str, Any]]
    learned: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """Text all of which is learned."""

    text: str


Example = Conversation | Text


@dataclass(frozen=True)
class Columns:
    """What the columns are called; None finds the name among the known ones."""

    prompt: str | None = None
    response: str | None = None
    text: str | None = None


def read_examples(
    source: str, convert: Callable[[dict[str, Any]], Example], *, skip_bad: bool = False
) -> tuple[list[Example], list[str]]:
    """The examples of a source, and what was wrong with rows that were left out.

    Args:
        source: a file (jsonl, json, parquet, csv, tsv), a data set on the hub (`user/name`, `user/name:split`,
            `user/name:configuration:split`), or several of these, separated by commas.
        convert: what a row means; ValueError where it means nothing.

    Raises:
        HalotuneError: there is no such file, or a row cannot be used and `skip_bad` is off.
    """
    sources = [source] if Path(source).exists() else source.split(",")  # a comma may be part of a file's name
    rows = (row for part in sources for row in find_rows(part.strip()))
    return usable(rows, convert, skip_bad)


def find_rows(source: str) -> Iterator[Row]:
    """The rows of a file, or of a data set on the hub."""
    path = Path(source)
    file = path.suffix.lower() in READERS or path.exists()  # a data set's name may have a full stop, too: OpenHermes-2.5
    if file or source.startswith((".", "/", "~")) or source.count("/") != 1:
        return read_rows(path)
    return (Row(path, number, dict(values)) for number, values in enumerate(_from_hub(source), 1))


def _from_hub(source: str) -> Any:
    from datasets import load_dataset

    name, *more = source.split(":")
    configuration, split = (more[0], more[1]) if len(more) == 2 else (None, more[0] if more else "train")
    try:
        return load_dataset(name, configuration, split=split)
    except Exception as e:  # the hub's, the network's and the reader's have no common class
        reason = next(iter(str(e).strip().splitlines()), "") or type(e).__name__
        raise HalotuneError(
            f"{source}: could not be had from the hub: {reason.rstrip('.')}. Check the name (user/name:configuration:split) "
            "and the network, or give a file."
        ) from e


# -- what a row means


def understood(values: dict[str, Any], columns: Columns) -> Example:
    """The conversation or text of a row.

    Raises:
        ValueError: it is neither.
    """
    if columns == Columns():
        turns = values.get("messages") or values.get("conversations")
        if turns is not None:
            return _conversation(_messages(turns), 0)
    pair = _pair(values, columns)
    if pair is not None:
        return _prompted(values, *pair)
    name = columns.text or "text"
    if name in values:
        return Text(text_of(values, name))
    wanted = " and ".join(n for n in (columns.prompt, columns.response, columns.text) if n)
    raise ValueError(
        f"expected {wanted or 'messages, prompt and response, or text'}; the columns are {', '.join(map(str, values))}: name "
        "them with --prompt-column and --response-column, or --text-column"
    )


def _pair(values: dict[str, Any], columns: Columns) -> tuple[str, str] | None:
    if columns.text is not None:
        return None
    pairs = ((columns.prompt or prompt, columns.response or response) for prompt, response in PAIRS)
    return next(((p, r) for p, r in pairs if p in values and r in values), None)


def _prompted(values: dict[str, Any], prompt: str, response: str) -> Conversation:
    asked, answered = values[prompt], values[response]
    if isinstance(asked, list) and isinstance(answered, list):
        before = _messages(asked)
        return _conversation([*before, *_messages(answered)], len(before))
    text = text_of(values, prompt)
    if prompt == "instruction" and values.get("input"):
        text = f"{text}\n\n{text_of(values, 'input')}"
    system = [{"role": "system", "content": text_of(values, "system")}] if values.get("system") else []
    messages = [*system, {"role": "user", "content": text}, {"role": "assistant", "content": text_of(values, response)}]
    return _conversation(messages, 0)


def _messages(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise ValueError("messages are no list of objects with role and content")
    out = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not (isinstance(content, str) or turn.get("tool_calls")):
            raise ValueError(f"message {number} has no role or no content")
        rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value") and v is not None}
        out.append({"role": ROLES.get(role, role), "content": content, **rest})
    return out


def _conversation(messages: list[dict[str, Any]], first: int) -> Conversation:
    learned = tuple(i for i, m in enumerate(messages) if i >= max(first, 1) and m["role"] == "assistant")
    if not learned:  # one that begins the conversation answers nothing
        raise ValueError("holds no answer of the assistant, so there is nothing to learn")
    return Conversation(messages, learned)


def split(rows: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Training and evaluation rows: a share of them, drawn at random, for the second; the same ones for all seeds of a run.

    Raises:
        HalotuneError: nothing is left for the first.
    """
    n = max(1, round(share * len(rows)))
    if n >= len(rows):
        raise HalotuneError(
            f"evaluation: {share:g} of {len(rows)} rows leaves nothing to learn from. Use a smaller share, or a file."
        )
    held = set(random.Random(SPLIT_SEED).sample(range(len(rows)), n))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
