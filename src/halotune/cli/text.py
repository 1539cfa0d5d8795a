"""Text from a model, as it comes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from ..core.errors import HalotuneError
from .loading import BaseModel, Saved, find_device, load_tokenizer


def load(args: argparse.Namespace) -> tuple[Saved, BaseModel, Any, Sampling]:
    """What the flags name: the adapter, its base, the tokenizer, and how tokens are chosen."""
    device = find_device(args.device)
    saved = Saved.read(args.adapter)
    base = BaseModel.load(saved, args.base, args.dtype, device)
    if not (hasattr(base.model, "can_generate") and base.model.can_generate()):  # type: ignore[operator]
        kind = type(base.model).__name__
        raise HalotuneError(f"{base.name}: a {kind} cannot generate text. Give an adapter of a language model.")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return saved, base, load_tokenizer(saved, base.name), Sampling(args.max_new_tokens, args.temperature, args.top_p)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float  # 0 takes the likeliest token each time
    top_p: float  # sample from the likeliest tokens that together have this probability

    def arguments(self, most: float) -> dict[str, Any]:
        """For transformers' `generate`, `most` tokens at most; the model's own settings of the same have no say."""
        chosen = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        silent = {"temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": int(most), "do_sample": bool(self.temperature), **silent, **chosen}


def stream(model: Any, tokenizer: Any, inputs: Mapping[str, Tensor], sampling: Sampling) -> Generator[str, None, None]:
    """The continuation of `inputs`, piece by piece.

    The model runs in a thread of its own, and stops at the next token when the iterator is closed: by Ctrl-C, say, which then
    never strikes amid a forward pass. It stops at the end of its context, too.

    Raises:
        HalotuneError: no token, or as many as the model has positions for.
    """
    from transformers import TextIteratorStreamer

    tokens, room = inputs["input_ids"].shape[-1], _room(model)
    if not 0 < tokens < room:
        found = "is empty" if not tokens else f"has {tokens} tokens, and the model's context is {room:g}"
        raise HalotuneError(f"the prompt {found}. Give {'some text' if not tokens else 'less'}.")
    arguments = {k: inputs[k].to(model.device) for k in ("input_ids", "attention_mask") if k in inputs}
    arguments |= sampling.arguments(min(sampling.max_new_tokens, room - tokens))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = Event(), []

    def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

    def run() -> None:
        try:
            model.generate(**arguments, streamer=streamer, stopping_criteria=[stopped])
        except BaseException as e:  # raised again where the pieces are read
            failures.append(e)
        finally:
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _room(model: Any) -> float:
    """How many tokens, prompt and continuation, the model has positions for; an encoder's prompt takes none of them."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return math.inf if room is None or model.config.is_encoder_decoder else room
