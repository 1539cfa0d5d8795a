"""What leads a picture: edges, landmarks of a face, label maps, depth. Each hint is an RGB picture of its target's size.

canny       OpenCV's Canny of the picture, thresholds 100 and 200: white on black
landmark    68 points of a face as dots, those of a part of it joined by lines: white on black
segm        the colours of a label map
depth       a map of depth; 16-bit ones are stretched from black to white
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..cli.main import require
from ..core.errors import HalotuneError
from .image_sets.palettes import PALETTES
from .pictures import open_picture, read_picture

CONTROLS = ("canny", "landmark", "segm", "depth")
LOW, HIGH = 100, 200

# The parts of a face among the 68 points (iBUG 300-W): first point, the one after the last, and whether the line is closed.
PARTS = (
    (0, 17, False),  # jaw
    (17, 22, False),  # eyebrow on the left of the picture
    (22, 27, False),  # and on the right
    (27, 31, False),  # ridge of the nose
    (31, 36, False),  # below the nose
    (36, 42, True),  # eye on the left
    (42, 48, True),  # and on the right
    (48, 60, True),  # lips, outside
    (60, 68, True),  # and inside
)
# Of MediaPipe's 468 points the 68 that lie nearest to iBUG's, in their order, a line for each part.
MESH_TO_68 = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),
    *(71, 63, 105, 66, 107),
    *(336, 296, 334, 293, 301),
    *(168, 197, 5, 4),
    *(75, 97, 2, 326, 305),
    *(33, 160, 158, 133, 153, 144),
    *(362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),
    *(78, 82, 13, 312, 308, 317, 14, 87),
)
FACE_SIZE = 256  # smaller pictures are enlarged to it, in which faces are found


def edges(image: Image.Image) -> np.ndarray:
    """Canny's edges, `(h, w)` of true and false."""
    require("control", ["cv2"])
    return import_module("cv2").Canny(np.array(image.convert("RGB")), LOW, HIGH) > 0


def draw_edges(image: Image.Image) -> Image.Image:
    return Image.fromarray(edges(image).astype(np.uint8) * 255).convert("RGB")


def draw_landmarks(points: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The 68 points, `(68, 2)` as x and y in pixels, in a picture of (width, height); those outside are cut off."""
    image = Image.new("RGB", size)
    pen = ImageDraw.Draw(image)
    radius = max(min(size) // 200, 1)
    for first, end, closed in PARTS:
        line = [tuple(p) for p in points[first:end].tolist()]
        pen.line(line + line[: int(closed)], fill="white")
    for x, y in points.tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    return image


class FaceMesh:
    """MediaPipe's face mesh: a picture -> its 68 points in pixels, or None where no face is found."""

    def __init__(self) -> None:
        if sys.version_info >= (3, 13) and importlib.util.find_spec("mediapipe") is None:
            raise HalotuneError(
                "landmark: mediapipe has no release with a face mesh for Python 3.13 and later. Give each row its landmarks, "
                "or use Python 3.12."
            )
        require("landmark", ["mediapipe"])
        try:
            mesh = import_module("mediapipe.python.solutions.face_mesh")
        except ImportError as e:  # later releases have no models of their own
            raise HalotuneError(
                f'this mediapipe has no face mesh ({e}). Install the release that has: pip install "halotune[landmark]"'
            ) from e
        self.mesh: Any = mesh.FaceMesh(static_image_mode=True, max_num_faces=1)

    def __call__(self, image: Image.Image) -> np.ndarray | None:
        width, height = image.size
        scale = max(FACE_SIZE / min(image.size), 1)
        large = image.convert("RGB").resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        found = self.mesh.process(np.array(large)).multi_face_landmarks
        if not found:
            return None
        points = np.array([(p.x, p.y) for p in found[0].landmark], dtype=np.float64)[list(MESH_TO_68)]
        return points * (width, height)


def read_points(given: Any, name: str) -> np.ndarray:
    """68 points, from a list of pairs, or a file: .npy, .json, or text with two numbers a line. `(68, 2)`.

    Args:
        name: whose they are, for errors.
    """
    try:
        if isinstance(given, (str, Path)):
            file, name = Path(given), str(given)
            if file.suffix == ".npy":
                given = np.load(file, allow_pickle=False)
            elif file.suffix == ".json":
                given = json.loads(file.read_text(encoding="utf-8"))
            else:
                given = [
                    line.replace(",", " ").split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
                ]
        points = np.asarray(given, dtype=np.float64)
    except FileNotFoundError:
        raise HalotuneError(f"{name}: there is no such file of landmarks. Add it, or take its row out.") from None
    except (OSError, ValueError, TypeError) as e:
        raise HalotuneError(f"{name}: cannot be read as landmarks: {e}. Write two numbers a line, x and y.") from e
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise HalotuneError(f"{name}: has landmarks of shape {points.shape}, finite or not; expected 68 pairs x, y. Mend it.")
    return points


# -- label maps

VOID = 255  # the label of what counts as nothing


def find_palette(name: str | None) -> np.ndarray | None:
    """A palette, `(n, 3)`: one of ours by name, or a JSON file with a list of [r, g, b], where label i has colour i."""
    if name is None:
        return None
    if name in PALETTES:
        return PALETTES[name]
    file = Path(name)
    if file.suffix != ".json" or not file.is_file():
        raise HalotuneError(
            f"palette: expected {', '.join(PALETTES)} or a JSON file; got {name!r}. Write [[r, g, b], …] into one."
        )
    try:
        colours = np.array(json.loads(file.read_text(encoding="utf-8")), dtype=np.uint8)
    except (ValueError, TypeError, OverflowError) as e:
        raise HalotuneError(f"{file}: cannot be read as a palette: {e}. Write [[r, g, b], …], each from 0 to 255.") from e
    if colours.ndim != 2 or colours.shape[1] != 3 or len(np.unique(colours, axis=0)) != len(colours):
        raise HalotuneError(
            f"{file}: is of shape {colours.shape}, or has a colour twice; expected [[r, g, b], …], all different."
        )
    return colours


def read_labels(file: Path, palette: np.ndarray | None) -> tuple[np.ndarray, Image.Image]:
    """A label map's numbers `(h, w)` and its colours.

    Of a PNG with a palette both are the file's own, where no palette is given; one of numbers gets the colours of the palette,
    by default PASCAL VOC's; one of colours gets the numbers.

    Raises:
        HalotuneError: it is no PNG, or has a label or a colour that the palette lacks.
    """
    image = open_picture(file)
    if image.format != "PNG":
        raise HalotuneError(
            f"{file}: is a {image.format}; label maps must be PNG, since compression that loses changes labels. "
            "Get the original; one that was compressed cannot be repaired."
        )
    if image.mode in ("RGB", "RGBA"):
        return _numbers_of_colours(file, np.array(image.convert("RGB")), palette), image.convert("RGB")
    if image.mode == "P" and palette is None:
        return np.array(image).astype(np.int64), image.convert("RGB")
    labels = np.array(image.convert("L") if image.mode in ("1", "LA") else image).astype(np.int64)
    colours = PALETTES["voc"] if palette is None else palette
    # What is marked as void lies outside of every palette, and is black.
    void = labels == VOID
    if (labels[~void] >= len(colours)).any():
        lacking = int(labels[~void].max())
        raise HalotuneError(
            f"{file}: has label {lacking}, which the palette of {len(colours)} colours lacks. Give a --palette."
        )
    drawn = colours[np.where(void, 0, labels)]
    drawn[void] = 0
    return labels, Image.fromarray(drawn.astype(np.uint8))


def _numbers_of_colours(file: Path, pixels: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    if palette is None:
        raise HalotuneError(f"{file}: is a map of colours, whose labels are not known. Say which they are with --palette.")
    codes = (pixels.astype(np.int64) * (65536, 256, 1)).sum(-1)
    known = (palette.astype(np.int64) * (65536, 256, 1)).sum(-1)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    labels = order[place]
    wrong = known[labels] != codes
    labels = np.where(wrong & (codes == 0), VOID, labels)
    wrong &= codes != 0
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise HalotuneError(
            f"{file}: has the colour {tuple(pixels[y, x].tolist())} at x {x}, y {y}, which the palette of {len(palette)} "
            "colours lacks. Give the --palette that it was drawn with."
        )
    return labels


def read_depth(file: Path) -> Image.Image:
    """A map of depth as RGB; of more than 8 bits it is stretched from its least value, black, to its greatest, white."""
    image = open_picture(file)
    if not image.mode.startswith(("I", "F")):
        return read_picture(file)
    depth = np.array(image, dtype=np.float64)
    span = np.ptp(depth) or 1.0
    return Image.fromarray(((depth - depth.min()) / span * 255).round().astype(np.uint8)).convert("RGB")
