"""The data: VADER's lexicon, words with the mean of ten human ratings from −4 (bad) to 4 (good)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import HalotuneError

HELD_OUT = 0.2
SPLIT_SEED = 0  # fixed, so that runs of different seeds are scored on the same words
WINDOW = 8  # batches that are sorted by length together

Rating = tuple[str, float]


def read_ratings(lexicon: Path) -> list[Rating]:
    """The alphabetic words of a VADER lexicon and their mean ratings; emoticons and the like are left out."""
    ratings: list[Rating] = []
    try:
        for line in lexicon.read_text(encoding="utf-8").splitlines():
            word, mean, *_ = line.split("\t")
            if word.isalpha():
                ratings.append((word, float(mean)))
    except (OSError, ValueError) as e:
        raise HalotuneError(
            f"{lexicon}: cannot be read as VADER's lexicon: {e}. "
            "Install it again: pip install --force-reinstall vaderSentiment==3.3.2"
        ) from e
    return ratings


def split(ratings: list[Rating]) -> tuple[list[Rating], list[Rating]]:
    """Training and held-out ratings. A word that was rated twice (`lol`) has both ratings on one side."""
    words = sorted({word for word, _ in ratings})
    random.Random(SPLIT_SEED).shuffle(words)
    held_out = set(words[: round(HELD_OUT * len(words))])
    return [r for r in ratings if r[0] not in held_out], [r for r in ratings if r[0] in held_out]


@dataclass(frozen=True)
class RatedWords:
    """Words as token ids, and their ratings."""

    tokens: list[Tensor]
    ratings: Tensor

    @classmethod
    def of(cls, ratings: list[Rating], tokenizer: Any) -> RatedWords:
        ids = tokenizer([word for word, _ in ratings])["input_ids"]
        return cls([torch.tensor(i) for i in ids], torch.tensor([mean for _, mean in ratings]))

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch as the encoder takes it, padded to its own longest word."""
        tokens = [self.tokens[i] for i in rows]
        lengths = torch.tensor([len(t) for t in tokens])
        ids = pad_sequence(tokens, batch_first=True)  # what pads does not matter under the mask
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def by_length(self, rows: list[int], size: int) -> list[list[int]]:
        rows = sorted(rows, key=lambda i: len(self.tokens[i]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def shuffled(self, size: int, seed: int) -> Iterator[list[int]]:
        """Batches without end, epoch after epoch.

        Words of like length share a batch, which saves a third of the work in padding: each window of a few batches is
        sorted by length, then the batches are shuffled.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            windows = [order[i : i + WINDOW * size] for i in range(0, len(order), WINDOW * size)]
            batches = [batch for window in windows for batch in self.by_length(window, size)]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]
