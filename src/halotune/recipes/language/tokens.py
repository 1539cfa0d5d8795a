"""Conversations as tokens, with the labels of what counts in the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ...cli.loading import loadable
from ...core.errors import HalotuneError, closest
from .rows import Conversation, Example, Text

TEMPLATES = {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
IGNORED = -100  # the label of a token that does not count


def set_template(tokenizer: Any, name: str) -> None:
    """Give the tokenizer a chat template: its own ("auto"), one of `TEMPLATES`, a .jinja file, or another tokenizer's.

    Raises:
        HalotuneError: there is none.
    """
    if name == "auto":
        return
    if name in TEMPLATES:
        text = TEMPLATES[name].read_text(encoding="utf-8")
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token is not None
        tokenizer.chat_template = ("{{- bos_token -}}\n" if begins else "") + text
        if name == "chatml" and len(tokenizer.tokenize("<|im_start|>")) > 1:
            raise HalotuneError(
                "--template chatml: the tokenizer has no token <|im_start|>, so the marks of the turns would be cut into "
                "pieces. Use --template alpaca or plain."
            )
    elif Path(name).is_file():
        try:
            tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise HalotuneError(f"--template {name}: is not UTF-8 ({e.reason} at byte {e.start}). Save it as UTF-8.") from e
    elif Path(name).is_dir() or name.count("/") == 1:
        from transformers import AutoTokenizer

        with loadable("the template of", name):
            other = AutoTokenizer.from_pretrained(name)
        if other.chat_template is None:
            raise HalotuneError(
                f"--template {name}: that tokenizer has no chat template. Choose one of {', '.join(TEMPLATES)}."
            )
        tokenizer.chat_template = other.chat_template
    else:
        near = closest(name, list(TEMPLATES), 1)
        hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(TEMPLATES)}, a .jinja file or a tokenizer."
        raise HalotuneError(f"--template {name}: there is no such template. {hint}")


def set_pad_token(tokenizer: Any) -> str:
    """See that there is a token to pad with, one that the vocabulary has already: embeddings keep their size.

    It is the tokenizer's own, else a token that stands for nothing else, else the one that ends a text. Even then the end is
    learned: labels say what counts, not the token.
    """
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        used = {tokenizer.bos_token, tokenizer.eos_token, None}
        vocabulary = tokenizer.get_vocab()
        usual = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", tokenizer.unk_token)
        tokenizer.pad_token = next((t for t in usual if t in vocabulary and t not in used), tokenizer.eos_token)
    if tokenizer.pad_token is None:
        raise HalotuneError("the tokenizer has neither a token to pad with nor one that ends a text. Set its eos_token.")
    return tokenizer.pad_token


def encode(tokenizer: Any, row: Example) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row; tokens that do not count have the label −100.

    A token counts if it belongs to the text that the model itself writes: a learned message and the mark of its end.

    Raises:
        HalotuneError: the template does not show where the assistant's messages are.
    """
    if isinstance(row, Text):
        ids = tokenizer(row.text, verbose=False).input_ids
        ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": list(ids)}
    if tokenizer.chat_template is None:
        raise HalotuneError(
            f"the tokenizer has no chat template. Choose one with --template: {', '.join(TEMPLATES)}, a .jinja file, or "
            "another model's name."
        )
    text, spans = _rendered(tokenizer, row)
    return _encode_spans(tokenizer, text, spans)


def prompt_text(tokenizer: Any, question: str) -> str:
    """What a model sees before it answers: exactly what stood before the answers it was trained on."""
    return _render(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)


def _encode_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise HalotuneError(
            f"{type(tokenizer).__name__}: does not tell which characters a token stands for. Load the model's fast tokenizer."
        )
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)  # it is cut later
    labels = [IGNORED] * len(tokens.input_ids)
    for i, (first, last) in enumerate(tokens.offset_mapping):
        if any(last > start and first < end for start, end in spans if last > first):
            labels[i] = tokens.input_ids[i]
    return {"input_ids": tokens.input_ids, "labels": labels}


def _rendered(tokenizer: Any, row: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and from where to where its learned messages reach.

    A message begins where the conversation before it, with the words that ask for an answer, ends; so templates need no
    marks of their own.
    """
    template = None
    for attempt in ("own", "training"):
        if attempt == "training":
            template = _training_template(tokenizer)
        text = _render(tokenizer, row.messages, chat_template=template)
        spans = [_span(tokenizer, text, row.messages, i, template) for i in row.learned]
        found = [s for s in spans if s is not None]
        if len(found) == len(spans):
            return text, found
    raise AssertionError  # _training_template raises


def _span(tokenizer: Any, text: str, messages: list[dict], i: int, template: str | None) -> tuple[int, int] | None:
    """From where to where message i reaches in the text; None where the text does not begin as the shorter conversation."""
    before = _render(tokenizer, messages[:i], add_generation_prompt=True, chat_template=template)
    upto = _render(tokenizer, messages[: i + 1], chat_template=template)
    if not text.startswith(upto.rstrip()):
        return None
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, upto, strict=False)))
    content = messages[i]["content"]
    if content and content.strip() not in upto[start:]:
        return None
    return start, len(upto.rstrip())  # a line break after the end of a turn is the template's


def _training_template(tokenizer: Any) -> str:
    """TRL's version of a template that changes earlier turns when later ones come."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        found = get_training_chat_template(tokenizer)
    except ValueError:
        found = None
    if found is None:
        raise HalotuneError(
            "the chat template changes the assistant's earlier messages once others follow, so what was learned would not be "
            "what is asked for. Choose a template with --template, or give conversations with one answer."
        )
    return found


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    from jinja2 import TemplateError

    options = {k: v for k, v in options.items() if v is not None}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as e:
        raise HalotuneError(
            f"the chat template refuses a conversation: {str(e).rstrip('.')}. Correct the row, or choose a --template."
        ) from e


def encode_all(tokenizer: Any, rows: Iterable[Example], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """The rows as tokens, cut at `max_length`, without those of which nothing is left to learn; and how many were cut."""
    out, cut = [], 0
    for row in rows:
        tokens = encode(tokenizer, row)
        cut += len(tokens["input_ids"]) > max_length
        tokens = {name: values[:max_length] for name, values in tokens.items()}
        if any(label != IGNORED for label in tokens["labels"][1:]):
            out.append(tokens)
    return out, cut
