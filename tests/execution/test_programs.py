"""Random programs give what the definitions give: see `programs`."""

from __future__ import annotations

import pytest

from .programs.checking import check


@pytest.mark.parametrize("first", range(0, 200, 10), ids=lambda first: f"seeds {first} to {first + 9}")
def test_programs(first):
    messages = [message for seed in range(first, first + 10) if (message := check(seed))]
    assert not messages, "\n\n".join(["", *messages])
