"""Several examples in a row of fixed length, none of which sees another.

TRL's best-fit decreasing packing, and a collator for attention that takes a mask: transformers makes the block-diagonal
causal mask itself from position ids that begin anew at each example, and no flash-attn is needed. TRL's own collator joins
all rows to one, whose mask grows with the square of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.errors import HalotuneError
from .tokens import IGNORED


@dataclass(frozen=True)
class PackedCollator:
    """Rows of `input_ids`, `labels` and `seq_lengths` as a batch `(rows, tokens)`.

    `position_ids` count from 0 in every example. The first token of an example is predicted from nothing: its label is −100.
    Padding is an example of its own.

    Attributes:
        length: of the rows; None is that of the longest.
    """

    pad_token_id: int
    length: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = self.length or max(len(r["input_ids"]) for r in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "labels": torch.full((len(rows), length), IGNORED),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.long),
        }
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            lengths = [*row["seq_lengths"], length - n]
            batch["input_ids"][i, :n] = torch.as_tensor(row["input_ids"])
            batch["labels"][i, :n] = torch.as_tensor(row["labels"])
            batch["position_ids"][i] = torch.cat([torch.arange(k) for k in lengths])
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch


ADDED = "sdpa_added_mask"  # to transformers, an implementation of attention


def share_mask(model: Any) -> None:
    """Have sdpa get the mask as the numbers that it adds, made once for all layers.

    Of a mask of booleans every layer makes them anew, and keeps them for backward: 32 MiB each, of 4096 tokens in bf16.
    """
    if model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        AttentionInterface.register(ADDED, ALL_ATTENTION_FUNCTIONS["sdpa"])
        AttentionMaskInterface.register(ADDED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation(ADDED)


def fill(dataset: Any, length: int) -> float:
    """The share of a packed data set's tokens that are real."""
    used = sum(sum(lengths) for lengths in dataset["seq_lengths"])
    return used / (len(dataset) * length)


@torch.no_grad()
def check_isolation(model: Any) -> None:
    """Raise an error where an example of a packed row changes what the model says of its neighbour.

    Attention keeps them apart by their position ids; a recurrent model, or code of a model's own, may not.
    """
    n, training = 8, model.training
    ids = torch.arange(2 * n, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(n, device=model.device).repeat(2)[None]
    changed = torch.cat([ids[:, :n].flip(1), ids[:, n:]], 1)
    model.eval()
    try:
        before, after = (model(input_ids=i, position_ids=positions, use_cache=False).logits[0, n:] for i in (ids, changed))
    finally:
        model.train(training)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
        raise HalotuneError(
            f"{type(model).__name__}: packed examples see each other in this model. Train one example a "
            "row, with --packing false."
        )
