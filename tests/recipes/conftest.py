"""A small text encoder with random weights on disk, and sentences made by rule, whose labels can be learned."""

from __future__ import annotations

import csv
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork

GOOD, BAD = ("fine", "lovely", "great", "warm"), ("dull", "awful", "broken", "cold")
NOUNS = ("film", "song", "house", "meal", "day", "book")
WORDS = ("the", "a", "is", "was", "very", "not", *GOOD, *BAD, *NOUNS)


def sentence(rng: random.Random) -> tuple[str, str]:
    """A sentence and its class."""
    positive = rng.random() < 0.5
    word = rng.choice(GOOD if positive else BAD)
    text = f"{rng.choice(('the', 'a'))} {rng.choice(NOUNS)} {rng.choice(('is', 'was'))} {rng.choice(('very ', ''))}{word}"
    return text, "positive" if positive else "negative"


def write_table(file: Path, rows: int, seed: int = 0) -> Path:
    """A csv file with the columns text and label."""
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label"])
        writer.writerows(sentence(rng) for _ in range(rows))
    return file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT of two layers of 64, dropout included."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "rows.csv", 60)
