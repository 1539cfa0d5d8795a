"""Rows of training data, from a file or the hub, as conversations or as text.

A row is one of

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}      or ShareGPT's "conversations"
    {"prompt": "…", "response": "…"}       other names are known (PAIRS), and Alpaca's "input"; or two lists of messages
    {"text": "…"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError

# What a prompt and its response are called: MetaMathQA, Alpaca, TRL, GSM8K …
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's
SUFFIXES = (".jsonl", ".json", ".parquet")


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


@dataclass(frozen=True)
class Columns:
    """What the columns are called; None finds the name among the known ones."""

    prompt: str | None = None
    response: str | None = None
    text: str | None = None


@dataclass
class Rows:
    """Usable rows, and what was wrong with the others."""

    kept: list[Conversation | Text] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # where, and what is wrong


def read_rows(source: str, columns: Columns, *, skip_bad: bool = False, limit: int | None = None) -> Rows:
    """The rows of a file (jsonl, json, parquet) or of a data set on the hub (`user/name`, `user/name:split`,
    `user/name:configuration:split`).

    Args:
        limit: read no more rows than this.

    Raises:
        HalotuneError: there is no such file, or a row cannot be used and `skip_bad` is off.
    """
    rows = Rows()
    for where, row in raw_rows(source):
        if limit is not None and len(rows.kept) >= limit:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            rows.kept.append(understood(row, columns))
        except BadRow as e:
            if not skip_bad:
                raise HalotuneError(f"{where}: {e} Correct the row, or leave such rows out with --skip-bad-rows.") from None
            rows.bad.append(f"{where}: {e}")
    if not rows.kept:
        raise HalotuneError(f"{source}: holds no row that can be used. {'; '.join(rows.bad[:3]) or 'It is empty.'}")
    return rows


class BadRow(Exception):
    """What is wrong with a row."""


def raw_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row; a `BadRow` in its place where it cannot be read."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.suffix == ".json":
            yield from _list(path)
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.read_table(path)
            except (OSError, ValueError) as e:
                raise HalotuneError(f"{source}: cannot be read as parquet: {e}. The file is damaged: get it again.") from e
            yield from ((f"{source}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1))
        else:
            raise HalotuneError(f"{source}: files end with {', '.join(SUFFIXES)}. Convert it, or rename it.")
    elif path.suffix in SUFFIXES or path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise HalotuneError(f"{source}: there is no such file. Give a file ({', '.join(SUFFIXES)}) or a hub id 'user/name'.")
    else:
        yield from ((f"{source}, row {i}", row) for i, row in enumerate(_from_hub(source), 1))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except ValueError as e:
                    yield f"{path}, line {number}", BadRow(f"is no JSON ({e}).")


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise HalotuneError(f"{path}: cannot be read as JSON: {e}. A file with an object on each line is called .jsonl.") from e
    if isinstance(content, dict):  # {"data": [...]}
        content = next((v for v in content.values() if isinstance(v, list)), content)
    if not isinstance(content, list):
        raise HalotuneError(f"{path}: expected a list of rows; found a {type(content).__name__}. Write the rows as a list.")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(content, 1))


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


def understood(row: Any, columns: Columns) -> Conversation | Text:
    """The conversation or text of a row.

    Raises:
        BadRow: it is neither.
    """
    if not isinstance(row, dict):
        raise BadRow(f"expected an object; found a {type(row).__name__}.")
    if columns.text is None and columns.prompt is None and columns.response is None:
        turns = row.get("messages") or row.get("conversations")
        if turns is not None:
            messages = _messages(turns)
            return _conversation(messages, 0)
    pair = _pair(row, columns)
    if pair is not None:
        return _prompted(row, *pair)
    name = columns.text or "text"
    if name in row:
        return Text(_string(row[name], name))
    named = [n for n in (columns.prompt, columns.response, columns.text) if n]
    wanted = " and ".join(named) or "messages, prompt and response, or text"
    raise BadRow(f"expected {wanted}; found {', '.join(map(str, row)) or 'nothing'}. Name its columns with --prompt-column …")


def _pair(row: dict[str, Any], columns: Columns) -> tuple[str, str] | None:
    if columns.text is not None:
        return None
    for prompt, response in PAIRS:
        prompt, response = columns.prompt or prompt, columns.response or response
        if prompt in row and response in row:
            return prompt, response
    return None


def _prompted(row: dict[str, Any], prompt: str, response: str) -> Conversation:
    asked, answered = row[prompt], row[response]
    if isinstance(asked, list) and isinstance(answered, list):
        before = _messages(asked)
        return _conversation([*before, *_messages(answered)], len(before))
    text = _string(asked, prompt)
    more = row.get("input") if prompt == "instruction" else None
    if more:
        text = f"{text}\n\n{_string(more, 'input')}"
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    messages = [*system, {"role": "user", "content": text}, {"role": "assistant", "content": _string(answered, response)}]
    return _conversation(messages, 0)


def _messages(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise BadRow("messages are no list of objects with role and content.")
    out = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not (isinstance(content, str) or turn.get("tool_calls")):
            raise BadRow(f"message {number} has no role or no content.")
        rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value") and v is not None}
        out.append({"role": ROLES.get(role, role), "content": content, **rest})
    return out


def _conversation(messages: list[dict[str, Any]], first: int) -> Conversation:
    learned = tuple(i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant")
    if not learned:
        raise BadRow("holds no message of the assistant, so there is nothing to learn.")
    return Conversation(messages, learned)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None or value == "" else repr(value)[:40]
        raise BadRow(f"{name}: expected text; found {found}.")
    return value


def split(rows: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Training and evaluation rows: a share of them, drawn at random, for the second."""
    import random

    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = set(order[: max(1, round(share * len(rows)))])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
