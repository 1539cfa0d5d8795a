"""The strict rule: math-verify, on the part of the answer that lm-eval looks at."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# Of lm-eval's task `gsm8k`, filter `flexible-extract`: the last match counts.
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def right(suite: str, answer: str, gold: str) -> bool:
    """Whether `answer` gives what `gold`, the dataset's worked solution, does: `#### 72` in GSM8K, `\\boxed{2}` in MATH."""
    return _same_number(answer, gold) if suite == "gsm8k" else _same_expression(answer, gold)


def final(suite: str, answer: str) -> str | None:
    """The final answer in one way of writing, for votes; None where there is none."""
    if suite == "gsm8k":
        text = last_number(answer)
        parsed = parsed_text(text) if text else []
    else:
        parsed = parsed_text(answer)
    return str(parsed[0]) if parsed else None


def last_number(answer: str) -> str | None:
    """The last number of a text without `$`, thousands separators and a final full stop: "cost $1,200." -> "1200"."""
    found = NUMBER.findall(answer)
    if not found:
        return None
    text = next(part for part in found[-1] if part)
    return text.replace(",", "").replace("$", "").removesuffix(".")


def _same_number(answer: str, gold: str) -> bool:
    from math_verify import verify

    found, wanted = last_number(answer), gold.rsplit("#### ", 1)[-1].replace(",", "").replace("$", "").strip()
    if not found:
        return False
    return found == wanted or verify(parsed_text(wanted), parsed_text(found))


def _same_expression(answer: str, gold: str) -> bool:
    from math_verify import verify

    return verify(parsed_gold(gold), parsed_text(answer))


def parsed_text(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text)


parsed_gold = lru_cache(maxsize=4096)(parsed_text)  # of k answers to one problem
