"""Pictures of a subject: read and checked, brought to a size that the model can take, and their latents kept on the disk.

DIR/00.jpg          pictures: jpg, png, webp, bmp; turned as their EXIF says, CMYK and transparent ones made RGB
DIR/00.txt          its caption, where it has one of its own
DIR/masks/00.png    where the subject is: white; elsewhere black or transparent; of the picture's own size
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from .common import processes
from .common.run import said
from .diffusion import Family, draw
from .latents import LatentEncoder
from .pictures import ENDINGS, fitted, pixels, read_picture, sha256

if TYPE_CHECKING:
    from .subject import SubjectConfig


@dataclass(frozen=True)
class Picture:
    """A picture's file, what it is called, and where its mask lies."""

    file: Path
    caption: str
    mask: Path | None = None


def find_pictures(folder: str | Path, caption: str, identifier: str | None = None) -> list[Picture]:
    """The pictures of a folder, by name; those without a caption of their own get this one.

    Args:
        identifier: a word that every caption must have.

    Raises:
        HalotuneError: there is no such folder, no picture in it, a mask of none, or a caption without the identifier.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HalotuneError(f"{folder}: there is no such folder. Give a folder with pictures of the subject.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and f.name[0] != "." and not f.is_dir())
    if not files:
        raise HalotuneError(f"{folder}: holds no picture ({', '.join(ENDINGS)}). Give a folder with pictures of the subject.")
    masks = {f.stem: f for f in sorted((folder / "masks").glob("[!.]*")) if f.suffix.lower() in ENDINGS}
    for stem in masks.keys() - {f.stem for f in files}:
        raise HalotuneError(f"{masks[stem]}: there is no picture {stem} for this mask. Name it as its picture.")
    found = [Picture(f, own_caption(f) or caption, masks.get(f.stem)) for f in files]
    for picture in found:
        if identifier is not None and not has_word(picture.caption, identifier):
            raise HalotuneError(
                f"{picture.file.with_suffix('.txt')}: lacks the identifier {identifier!r}: {picture.caption!r}. Put it before "
                "the word of the class, or give another --identifier."
            )
    return found


def unused_files(folder: str | Path, pictures: Sequence[Picture]) -> list[str]:
    """Files of the folder that are neither a picture that is read nor a caption of one, such as a caption of another name."""
    used = {p.file for p in pictures} | {p.file.with_suffix(".txt") for p in pictures}
    return sorted(f.name for f in Path(folder).iterdir() if f.is_file() and f.name[0] != "." and f not in used)


def has_word(text: str | None, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text or "") is not None


def own_caption(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else None
    except ValueError as e:
        raise HalotuneError(f"{text}: cannot be read as UTF-8: {e}. Save it as UTF-8.") from e


def mask_of(picture: Picture, size: tuple[int, int], sizes: list[tuple[int, int]], background: float) -> Tensor | None:
    """The weight of the error in each latent, `(1, 1, h, w)`: 1 on the subject, `background` elsewhere.

    Args:
        size: of the picture as it is.
    """
    if picture.mask is None:
        return None
    mask = read_picture(picture.mask, background="black")
    if mask.size != size:
        raise HalotuneError(f"{picture.mask}: is of {mask.size}, its picture of {size} pixels. Save it in the picture's size.")
    weight = (pixels(fitted(mask, sizes))[:, :1] + 1) / 2
    if weight.max() < 0.5:
        raise HalotuneError(f"{picture.mask}: marks nothing. Paint the subject white, or delete the mask.")
    return background + (1 - background) * weight


def contents(pictures: Sequence[Picture]) -> list[tuple[str | None, ...]]:
    """The SHA-256 of each picture, its caption, and the SHA-256 of its mask."""
    return [(sha256(p.file), p.caption, p.mask and sha256(p.mask)) for p in pictures]


class Examples(Dataset[list[dict[str, Any]]]):
    """Pictures of the subject, each beside one of the class, if there are any; as many as the longer of the two lists."""

    def __init__(self, subject: Sequence[dict[str, Any]], prior: Sequence[dict[str, Any]] = ()) -> None:
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return max(len(self.subject), len(self.prior))

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        chosen = [self.subject[index % len(self.subject)]]
        return chosen + ([self.prior[index % len(self.prior)]] if self.prior else [])


def collate(rows: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Pictures may be of several sizes, so they stay a list."""
    return {"examples": [example for row in rows for example in row]}


def as_text(batch: dict[str, Any]) -> str:
    """A batch as text: of each picture what it is and its size; all of them count in the loss."""
    lines = [
        f"  {'class' if e['prior'] else 'subject'}  {' × '.join(map(str, e['mean'].shape[1:]))} latents, "
        f"{e['mask'].mean():.0%} of them in the loss  {e['caption']}"
        for e in batch["examples"]
    ]
    return "\n".join(lines)


class Encoder(LatentEncoder):
    """Pictures and prompts as the model takes them, from the cache where nothing changed."""

    def examples(self, pictures: Sequence[Picture], prior: bool) -> list[dict[str, Any]]:
        mirrored = (False, True) if self.config.flip else (False,)
        return [self.example(p, prior, flip) for flip in mirrored for p in pictures]

    def example(self, picture: Picture, prior: bool, flip: bool) -> dict[str, Any]:
        """mean and deviation of the latents, before they are normalized, `(1, c, h, w)`; mask, text, caption, prior."""
        image = read_picture(picture.file)
        mask = mask_of(picture, image.size, self.sizes, self.config.mask_background)

        def make() -> dict[str, Tensor]:
            x = pixels(fitted(image, self.sizes))
            return self.latents(x.flip(-1) if flip else x)

        size = fitted(image, self.sizes).size
        latents = self.cache.get({"file": sha256(picture.file), "size": size, "flip": flip, "vae": self.vae_print}, make)
        if mask is None:
            mask = torch.ones(1, 1, *latents["mean"].shape[-2:])
        mask = F.interpolate(mask.flip(-1) if flip else mask, latents["mean"].shape[-2:], mode="area")
        text = {} if self.config.train_text_encoder else self.text(picture.caption)
        return {**latents, "mask": mask, "text": text, "caption": picture.caption, "prior": prior}


def class_pictures(config: SubjectConfig, family: Family, device: torch.device, make: bool = True) -> list[Picture]:
    """The base's own pictures of the class; those that are missing are made, each from a seed of its own."""
    prompt = str(config.class_prompt)
    made_by = {"model": config.model, "prompt": prompt, "resolution": config.resolution or family.size}
    made_by |= {"revision": config.revision} if config.revision else {}
    mark = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"\W+", "_", str(config.class_word))
    folder = Path(config.class_folder or f"runs/class_images/{name}-{mark}")
    there = [f for f in sorted(folder.glob("*")) if not f.name.startswith(".")]
    missing = [i for i in range(config.class_images) if not (folder / f"{i:05}.png").is_file()]
    own = config.class_folder and there and not any(re.fullmatch(r"\d{5}\.png", f.name) for f in there)
    if not make or own:
        return find_pictures(folder, prompt) if there else []
    if missing:
        said(f"{folder}: making {len(missing)} pictures of {prompt!r}")
    mine = missing[processes.rank() :: processes.count()]
    for i in random.Random().sample(mine, len(mine)):  # in any order: other runs may be making the same ones
        file = folder / f"{i:05}.png"
        if not file.is_file():
            image = _not_black(family, config, prompt, i, device)
            write_atomically(file, lambda part, image=image: image.save(part, "png"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # each process made its share
    return find_pictures(folder, prompt)[: config.class_images]


def _not_black(family: Family, config: SubjectConfig, prompt: str, seed: int, device: torch.device) -> Image.Image:
    """A picture; with another seed where it is black, as a safety checker leaves some and an overflow leaves all."""
    for further in range(4):
        image = draw(family, config, prompt, seed + (further << 32), device)
        if image.getbbox():
            return image
    raise HalotuneError(
        f"{config.model}: its pictures of {prompt!r} are black. Use another --precision, another --class-prompt, or a "
        "--class-folder of your own."
    )


def show_subject(config: SubjectConfig, family: Family, folder: Path) -> int:
    """As many of the subject's pictures as there are seeds, cut as they are learned, for the run's page; how many there are."""
    found = find_pictures(config.subject, "")[: config.validation_seeds]
    sizes = family.sizes(config.resolution, config.aspect)
    for i, picture in enumerate(found):
        file = folder / f"{i}.png"
        if not file.is_file():
            image = fitted(read_picture(picture.file), sizes)
            write_atomically(file, lambda out, image=image: image.save(out, "png"))
    return len(found)
