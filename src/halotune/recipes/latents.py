"""Pictures and prompts as a diffusion model takes them: latents and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .diffusion import Family
from .pictures import Cache, fingerprint


class LatentEncoder:
    """A pipeline's VAE and text encoders, and the cache of what they gave.

    Attributes:
        sizes: the (height, width) that pictures are brought to.
        vae_print: the SHA-256 of the VAE, which latents depend on.
    """

    def __init__(self, family: Family, config: Any, device: torch.device) -> None:
        self.family, self.config, self.device = family, config, device
        self.cache = Cache(config.cache)
        self.sizes = family.sizes(config.resolution, config.aspect)
        self.encoders = [m for name in family.text_encoders if (m := getattr(family.pipe, name, None)) is not None]
        self.vae_print, self.text_print = fingerprint(family.pipe.vae), fingerprint(*self.encoders)

    def text_key(self, prompt: str) -> dict[str, Any]:
        """All that a prompt's embeddings depend on."""
        tokenizers = {k: v for k, v in self.family.pipe.components.items() if k.startswith("tokenizer") and v is not None}
        tokens = {k: [v(prompt, verbose=False).input_ids, v.model_max_length] for k, v in tokenizers.items()}
        return {"text": prompt, "tokens": tokens, "encoders": self.text_print, "kind": type(self.family).__name__}

    def text(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's embeddings, from the cache where they are there."""

        def make() -> dict[str, Tensor]:
            for encoder in self.encoders:
                encoder.to(self.device)
            with torch.no_grad():
                return self.family.text(prompt, self.device)

        return self.cache.get(self.text_key(prompt), make)

    def latents(self, x: Tensor) -> dict[str, Tensor]:
        """mean and deviation `(1, c, h, w)` of pixels `(1, 3, height, width)` in [−1, 1], before they are normalized."""
        vae = self.family.pipe.vae
        usual = vae.dtype
        nn.Module.to(vae, self.device, torch.float32)  # half precision overflows in some
        with torch.no_grad():
            found = vae.encode(x.to(self.device)).latent_dist
        nn.Module.to(vae, usual)
        return {"mean": found.mean, "deviation": found.std}
