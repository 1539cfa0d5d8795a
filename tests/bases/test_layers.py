"""Generated layers are adapted and merged as defined, or refused: see `layers`."""

from __future__ import annotations

import pytest

from .layers import check


@pytest.mark.parametrize("first", range(0, 100, 10), ids=lambda first: f"seeds {first} to {first + 9}")
def test_generated_layers(first: int) -> None:
    messages = [message for seed in range(first, first + 10) if (message := check(seed)[1])]
    assert not messages, "\n".join(["", *messages])
