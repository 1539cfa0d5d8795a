"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(head: Sequence[str], *groups: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """The head, then groups of lines, a rule above each; columns that `left` names stand to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *(line for group in groups for line in group), strict=True)]
    rule = ["─" * width for width in widths]
    lines = [head, *(line for group in groups if group for line in (rule, *group))]
    return "\n".join(
        "  ".join(c.ljust(w) if h in left else c.rjust(w) for c, w, h in zip(line, widths, head, strict=True)).rstrip()
        for line in lines
    )
