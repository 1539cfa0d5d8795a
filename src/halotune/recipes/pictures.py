"""Pictures as recipes take them: read, checked, brought to a size that a model can take; and a cache of what was computed."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import HalotuneError
from ..core.files import write_atomically

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_picture(file: Path) -> Image.Image:
    """A picture as it is stored, turned as its EXIF says.

    Raises:
        HalotuneError: it cannot be read, or is animated.
    """
    try:
        with Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as e:  # Pillow's own are among these
        reason = str(e).rstrip(".")
        raise HalotuneError(f"{file}: cannot be read as a picture: {reason}. Save it again, or take it out.") from e
    if frames > 1 and turned.format != "MPO":  # a camera's JPEG, which has previews or depth behind the picture
        raise HalotuneError(f"{file}: is animated, of {frames} frames. Save the one that you mean.")
    return turned


def read_picture(file: Path, background: str = "white") -> Image.Image:
    """A picture as RGB, turned as its EXIF says; of 16 bits the upper 8 are kept.

    Args:
        background: the colour of what is transparent.

    Raises:
        HalotuneError: it cannot be read, or is animated.
    """
    turned = open_picture(file)
    if turned.mode.startswith("I"):
        turned = Image.fromarray((np.array(turned).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        own = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", own.size, background), own)
    return turned.convert("RGB")


def buckets(resolution: int, divisor: int, aspect: bool) -> list[tuple[int, int]]:
    """The (height, width) that pictures are brought to: a square, or one for each usual ratio, of about as many pixels."""
    if resolution % divisor:
        near = max(round(resolution / divisor), 1) * divisor
        raise HalotuneError(f"resolution: this model needs a multiple of {divisor}; got {resolution}. Use {near}.")
    return generate_aspect_ratio_buckets(resolution, divisor) if aspect else [(resolution, resolution)]


def fitted(image: Image.Image, sizes: list[tuple[int, int]], how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture in the size nearest to its shape: scaled to cover it, the rest cut off on both sides alike."""
    height, width = sizes[find_nearest_bucket(image.height, image.width, sizes) or 0]
    return ImageOps.fit(image, (width, height), how)


def pixels(image: Image.Image) -> Tensor:
    """`(1, 3, height, width)` in [−1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def file_name(prompt: str) -> str:
    """A prompt's words as the beginning of a file's name, and a mark where these do not say all of it."""
    words = re.sub(r"\W+", "_", prompt)[:60]  # at most 240 bytes
    said_all = words.replace("_", " ") == prompt
    return words if said_all else f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


class Cache:
    """Tensors under the SHA-256 of all that they were computed from: what has changed is computed again."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    def has(self, key: Mapping[str, Any]) -> bool:
        return self.file(key).is_file()

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self.file(key)
        if file.is_file():
            try:
                return load_file(file)
            except SafetensorError:  # damaged
                file.unlink()
        made = {k: v.detach().to("cpu").contiguous() for k, v in make().items()}
        write_atomically(file, lambda out: save_file(made, out))
        return made


def fingerprint(*models: nn.Module) -> str:
    """The SHA-256 of models' weights and configurations."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(str(model.config).encode())
        for name, p in model.state_dict().items():
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
