"""`halotune merge`: the base model with an adapter written into its weights, saved as a model of its own."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import HalotuneError
from .options import Commands, add_model_flags, add_parser

if TYPE_CHECKING:
    from ..engine.weights.merge import MergeReport
    from .loading import BaseModel, Saved

DESCRIPTION = """
Write an adapter into the weights of its base model, and save the model, with
its tokenizer, as a folder that from_pretrained loads without halotune. The
base may be a pipeline of diffusers. A report says what the merge changed in
every layer, and what share of the adapter was lost to rounding; --dtype
float32 loses none, and makes larger files.
"""
EXAMPLES = """
halotune merge my-adapter --output merged
halotune merge my-adapter --base ./llama --dtype float32 --output merged
"""
MARKS = ("config.json", "model_index.json")  # a folder with one of these holds a model


def add(commands: Commands) -> None:
    parser = add_parser(commands, "merge", DESCRIPTION, EXAMPLES, _run)
    add_model_flags(parser, device="cpu")
    flag = parser.add_argument
    flag("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    flag("--force", action="store_true", help="replace a model that is there already")
    flag("--no-safe-merge", action="store_true", help="do not check that all merged weights are finite")
    flag("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of one file of weights (default: 5GB)")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, force=args.force)
    from .loading import BaseModel, Saved, find_device

    device = find_device(args.device)
    saved = Saved.read(args.adapter)
    check_apart(args.output, args.adapter, args.base or saved.config.base_model_name_or_path)
    base = BaseModel.load(saved, args.base, args.dtype, device)
    model = saved.on(base)
    tuner = model.base_model
    plain = model.merge_and_unload(safe_merge=False)  # nothing is lost where it fails: no second copy of the weights is needed
    assert tuner.merge_report is not None
    if not args.no_safe_merge:
        check_finite(tuner.merge_report)
    merged = BaseModel(base.name, plain, base.component)
    print(tuner.merge_report)
    write_folder(args.output, lambda folder: save(merged, saved, folder, args.max_shard_size))
    print(f"\nWrote {args.output}")
    return 0


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB; got {text!r}")
    return text


def save(base: BaseModel, saved: Saved, folder: Path, max_shard_size: str) -> None:
    """The model with all that it needs to run: a tokenizer or processor, or the rest of its pipeline."""
    from .loading import loadable, tokenizer_source

    if base.component is not None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        with loadable("the pipeline", base.name):
            pipeline = DiffusionPipeline.from_pretrained(base.name, **{base.component: base.model})
        pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
        check_weights(base.model, folder / base.component)
        return
    base.model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
    check_weights(base.model, folder)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(tokenizer_source(saved, base.name))
    except (OSError, ValueError, KeyError, ImportError):  # there is none, or a package that it needs is not here
        return
    processor.save_pretrained(folder)


def check_finite(report: MergeReport) -> None:
    """Refuse to write what is not finite."""
    for path, record in report.layers.items():
        if not math.isfinite(record.lost_norm):
            raise HalotuneError(
                f"{path}: the merged weight is not finite, so nothing was written. Check the adapter for NaN, or merge with "
                "--dtype float32."
            )


def check_weights(model: Any, folder: Path) -> None:
    """Refuse a folder from which the model's own class would not read every weight, in its shape.

    Raises:
        HalotuneError: what is missing, left over or of another shape; the folder is not kept then.
    """
    if getattr(model, "is_quantized", False):  # which needs its device to be read
        return
    diffusers = type(model).__module__.startswith("diffusers.")
    where = {} if diffusers else {"device_map": "meta"}  # transformers reads headers alone
    _, report = type(model).from_pretrained(folder, output_loading_info=True, **where)
    problems = [f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:3])}" for what, keys in report.items() if keys]
    if problems:
        raise HalotuneError(
            f"the merged {type(model).__name__} could not be read back, so nothing was written ({'; '.join(problems)}). Keep "
            "the adapter beside the base, and report this."
        )


def check_output(output: Path, *, force: bool) -> None:
    """Refuse a folder that must not be written, before anything is loaded."""
    if not output.exists():
        return
    if not output.is_dir():
        raise HalotuneError(f"--output {output}: is a file. Name a folder.")
    if not any(output.iterdir()):
        return
    if not force:
        raise HalotuneError(f"--output {output}: exists. Choose another, or replace it with --force.")
    if not any((output / mark).is_file() for mark in MARKS):
        raise HalotuneError(f"--output {output}: holds no model, so --force does not replace it. Choose another folder.")


def check_apart(output: Path, *sources: str | None) -> None:
    """Refuse to replace what is read."""
    target = output.resolve()
    for source in sources:
        if source and (path := Path(source)).exists() and target in (path.resolve(), *path.resolve().parents):
            raise HalotuneError(f"--output {output}: {source} is read from there. Choose another folder.")


def write_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `output`, then rename it: there is the old folder or the new, never half.

    Between the two renames that replace an old folder there is none for a moment.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        new = temporary / "new"
        new.mkdir()  # with the user's own mode; mkdtemp's is 0700
        write(new)
        if output.exists():
            os.replace(output, temporary / "old")
        os.replace(new, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
