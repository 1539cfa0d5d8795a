from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from halotune import HalotuneError
from halotune.demo.data import RatedWords, read_ratings, split
from halotune.demo.model import package_folder


@pytest.fixture(scope="module")
def ratings() -> list[tuple[str, float]]:
    return read_ratings(package_folder("vaderSentiment", "vaderSentiment") / "vader_lexicon.txt")


@pytest.fixture
def words() -> RatedWords:
    lengths = [3 + i * i % 5 for i in range(200)]
    return RatedWords([torch.full((n,), i) for i, n in enumerate(lengths)], torch.zeros(200))


def test_the_lexicon(ratings: list[tuple[str, float]]) -> None:
    assert len(ratings) == 7217
    assert ("great", 3.1) in ratings
    assert all(word.isalpha() and -4 <= mean <= 4 and mean != 0 for word, mean in ratings)


def test_no_word_is_on_both_sides(ratings: list[tuple[str, float]]) -> None:
    train, held_out = split(ratings)
    assert not {w for w, _ in train} & {w for w, _ in held_out}
    assert sorted(train + held_out) == sorted(ratings)
    assert len(held_out) / len(ratings) == pytest.approx(0.2, abs=1e-3)
    assert split(ratings) == (train, held_out)


def test_a_damaged_lexicon_is_named(tmp_path: Path) -> None:
    (tmp_path / "lexicon.txt").write_text("good\tvery\n")
    with pytest.raises(HalotuneError, match=r"lexicon.txt: cannot be read.*--force-reinstall"):
        read_ratings(tmp_path / "lexicon.txt")


def test_an_epoch_visits_every_word_once(words: RatedWords) -> None:
    batches = words.shuffled(size=16, seed=0)
    for _ in range(2):
        epoch = list(islice(batches, 13))
        assert sorted(chain(*epoch)) == list(range(200))


def test_batches_depend_on_the_seed_alone(words: RatedWords) -> None:
    first, again, other = (list(islice(words.shuffled(16, seed), 20)) for seed in (3, 3, 4))
    assert first == again != other


def test_padding_ends_with_the_longest_word(words: RatedWords) -> None:
    inputs = words.inputs([0, 1])  # of 3 and 4 tokens
    assert inputs["input_ids"].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    padding = sum(int((words.inputs(rows)["attention_mask"] == 0).sum()) for rows in islice(words.shuffled(16, 0), 13))
    assert padding < 0.1 * sum(map(len, words.tokens))
