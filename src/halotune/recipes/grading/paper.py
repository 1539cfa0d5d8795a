"""The rules of the HRA paper's evaluation of mathematics, which are MetaMath's, defects included.

The defects, each of which a test shows:

1. What raises an exception while two answers of MATH are compared counts as right: "x/2" for "7", "\\sqrt" for "2".
2. A number also equals a hundredth and a hundred times of itself: "50" for "5000".
3. On GSM8K an answer is rounded to a whole number: "17.6" for "18".
4. On GSM8K a number ends at its second separator: "1,234,567" is 1234.
5. An answer without the words "The answer is: " is wrong, whatever it says.

The sympy expression of a text in LaTeX is made by latex2sympy here (math-verify's), not by sympy's own parser.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

MARKER = "The answer is: "
NUMBER = re.compile(r"[+-]?(?:\d*[.,/])?\d+")  # at most one separator


def right(suite: str, answer: str, gold: str) -> bool:
    """Whether the authors count `answer` as right; `gold` is the dataset's worked solution."""
    if MARKER not in answer:
        return False
    said = answer.rsplit(MARKER, 1)[1]
    if suite == "gsm8k":
        wanted = int(gold.rsplit("#### ", 1)[-1].replace(",", ""))
        number = whole_number(said)
        return number is not None and (number == wanted or _close(str(number), str(wanted)))
    said = said.split(".\n")[0].strip().removesuffix(".").strip()
    return same_expression(said, boxed(gold) or "")


def whole_number(text: str) -> int | None:
    """The first number of a text, rounded: "7/2 eggs" -> 4."""
    found = NUMBER.search(text)
    if found is None:
        return None
    number = found[0].replace(",", "")
    try:
        return round(float(Fraction(number)))
    except ZeroDivisionError:
        return round(float(number.split("/")[0]))
    except (ValueError, OverflowError):  # "/5"; more digits than there is room for
        return None


def boxed(solution: str) -> str | None:
    """What the last `\\boxed{…}` (or `\\boxed …`, `\\fbox{…}`) of a solution holds."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    if solution.startswith("\\boxed ", start):
        return solution[start + len("\\boxed ") :].split("$")[0]
    opening = solution.find("{", start)
    depth = 0
    for i in range(opening, len(solution)) if opening >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[opening + 1 : i]
    return None


def same_expression(said: str, wanted: str) -> bool:
    try:
        a, b = normalized(said), normalized(wanted)
        return a == b or _equal(a, b)
    except Exception:  # defect 1: the authors then compare the answer with itself
        return True


# -- the normalization of the MATH dataset's authors, Hendrycks et al.


def normalized(text: str) -> str:
    """An answer in one way of writing.

    Raises:
        ValueError, IndexError: where the authors' rules do (defect 1).
    """
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    text = _without_unit(text)
    for old, new in (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "x = 5"
        text = sides[1]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise ValueError(f"more than one unit in {text!r}")
    return parts[0]


def _braced_roots(text: str) -> str:
    """`\\sqrt3` -> `\\sqrt{3}`; IndexError where nothing follows."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    """`\\frac12` -> `\\frac{1}{2}`; IndexError where nothing follows."""
    first, *rest = text.split("\\frac")
    out = first
    for part in rest:
        if part[0] == "{":
            out += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            out += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            out += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return out


def _as_fraction(text: str) -> str:
    """`3/4` -> `\\frac{3}{4}`; ValueError where the parts are not whole numbers."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = int(parts[0]), int(parts[1])
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


# -- equality


def _equal(a: str, b: str) -> bool:
    if a.lower() == b.lower():
        return True
    if _number(a) is not None and _number(b) is not None:
        return _close(a, b)
    if a[:1] in "([" and a[-1:] in ")]" and b[:1] in "([" and b[-1:] in ")]":
        ours, theirs = a[1:-1].split(","), b[1:-1].split(",")
        if len(ours) == len(theirs) and all(_equal(x.strip(), y.strip()) for x, y in zip(ours, theirs, strict=True)):
            return True
    return _symbolically_equal(a, b)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _close(a: str, b: str) -> bool:
    number, wanted = _number(a), _number(b)
    if number is None or wanted is None:
        return False
    return any(math.isclose(number, w, rel_tol=1e-4) for w in (wanted / 100, wanted, wanted * 100))  # defect 2


def _symbolically_equal(a: str, b: str) -> bool:
    import sympy

    x, y = _expression(a), _expression(b)
    if x is None or y is None:
        return False
    try:
        if sympy.simplify(x - y) == 0:
            return True
    except Exception:  # not something that can be subtracted: an interval, an equation
        pass
    try:
        return math.isclose(float(sympy.N(x)), float(sympy.N(y)), rel_tol=1e-3)
    except Exception:
        return False


def _expression(text: str) -> Any:
    from latex2sympy2_extended import latex2sympy

    try:
        return latex2sympy(text)
    except Exception:
        return None
