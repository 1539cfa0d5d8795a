"""Controllable generation with every method at about equal parameters: `docs/results/control/`, in sittings.

    python benchmarks/control.py data --classes tiny_imagenet.tar --faces faces/ --streets camvid.tar --output control-data
    python examples/tiny_latent_diffusion.py --images control-data --output base --minutes 8 --compile  # until "finished": true
    python benchmarks/control.py segmenter --data control-data --minutes 8            # judges the streets
    python benchmarks/control.py train --model base/pipeline --data control-data --minutes 7  # again until 0 are to be started
    python benchmarks/control.py table

The base is trained on what the tasks learn from, never on what they are evaluated with; it serves benchmarks/subject.py, too.

Three tasks: edges on the classes of Tiny-ImageNet, landmarks on faces, label maps on streets (CamVid); every method, two seeds.
Figures are those of `halotune eval control --base`: of the run, of the base alone, and of the originals. All methods
have the same encoder of hints at first, the same learning rate for it, and the recipe's default of their own times `--rate`.

`train` has several runs side by side on a GPU (`--workers`), so their seconds are comparable within a sitting alone. A sitting
starts nothing that would not end in `--minutes`, leaves the JSON and a small picture of each finished run in `--results`, and
goes on from what it finds there; a run that is cut off goes on at its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sittings import sitting, write_result
from subject import CLASSES, METHODS, spread

ROOT = Path(__file__).parent.parent
TASKS = ("canny", "landmark", "segm")
SEEDS = (0, 1)
FOLDERS = {"canny": "classes", "landmark": "faces", "segm": "streets"}
HELD_OUT = 10  # every tenth picture of a class is for evaluation
STREETS, VOID = 12, 11  # CamVid's labels, and the one that counts as nothing
FIGURES = {
    "canny": ("iou", "f1"),
    "landmark": ("error", "undetected", "floor", "original_undetected"),
    "segm": ("aAcc", "mAcc", "mIoU"),
}


# -- the data


def make_data(args: argparse.Namespace) -> None:
    """OUTPUT/classes, faces, streets: pictures, train.jsonl, val.jsonl; OUTPUT/metadata.jsonl, what the base learns from."""
    out = Path(args.output)
    if args.classes:
        with tarfile.open(args.classes) as archive:
            archive.extractall(out / "classes", filter="data")
        files = sorted(f for f in (out / "classes").rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
        rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        for i, file in enumerate(files):
            place = file.relative_to(out / "classes")
            row = {"target": place.as_posix(), "prompt": f"a photo of a {CLASSES.get(place.parts[0], 'thing')}"}
            rows["train" if i % HELD_OUT else "val"].append(row)
        _write(out / "classes", rows)
    if args.faces:
        rows = {"train": [], "val": []}
        for split, name in (("train", "train"), ("val", "test")):
            with tarfile.open(next(Path(args.faces).glob(f"{name}*.tar"))) as archive:
                archive.extractall(out / "faces", filter="data")
            there = {f.name: f for f in (out / "faces").rglob("*.jpg")}
            for line in (Path(args.faces) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                target = there[Path(found["file"]).name].relative_to(out / "faces").as_posix()
                rows[split].append({"target": target, "prompt": "a photo of a face", "landmarks": found["landmarks"]})
        _write(out / "faces", rows)
    if args.streets:
        with tarfile.open(args.streets) as archive:
            archive.extractall(out / "streets", filter="data")
        rows = {"train": [], "val": []}
        for split in rows:
            for target in sorted((out / "streets" / split).glob("*.jpg")):
                labels = out / "streets" / f"{split}annot" / f"{target.stem}.png"
                own = {"target": f"{split}/{target.name}", "source": f"{labels.parent.name}/{labels.name}"}
                rows[split].append(own | {"prompt": "a photo of a street"})
        _write(out / "streets", rows)

    captions = [
        json.dumps({"file_name": f"{name}/{row['target']}", "text": row["prompt"]}) + "\n"
        for name in FOLDERS.values()
        if (out / name / "train.jsonl").is_file()
        for row in map(json.loads, (out / name / "train.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    (out / "metadata.jsonl").write_text("".join(captions), encoding="utf-8")


def _write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    for split, own in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        print(f"{folder}: {len(own)} of {split}")


# -- the judge of label maps


def make_segmenter(args: argparse.Namespace) -> None:
    """A small SegFormer, trained on the streets from nothing; it goes on where the last sitting ended."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    from halotune.recipes.control_data import Preparation, read_pairs
    from halotune.recipes.control_metrics import Confusion
    from halotune.recipes.pictures import pixels

    size, folder = args.resolution, Path(args.segmenter)
    own = argparse.Namespace(control="segm", palette=None, skip_bad_rows=False)
    preparation: Any = Preparation(own, [(size, size)])  # type: ignore[arg-type]

    def read(split: str) -> tuple[Any, Any]:
        pairs = read_pairs(Path(args.data) / "streets", split, "segm")[: args.limit]
        images = torch.cat([(pixels(preparation.picture(p)) + 1) / 2 for p in pairs])
        labels = torch.stack([torch.from_numpy(preparation.labels(p)) for p in pairs])
        return images, labels

    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images, labels = read("train")
    x = ((images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)).to(args.device)
    y = labels.to(args.device)
    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=STREETS,
        semantic_loss_ignore_index=VOID,
        depths=[2, 2, 2, 2],
        hidden_sizes=[32, 64, 128, 192],
        strides=[2, 2, 2, 2],
        decoder_hidden_size=128,
    )
    state, done = folder / "state.pt", 0
    model: Any = SegformerForSemanticSegmentation(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    if state.is_file():
        held = torch.load(state, map_location=args.device, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        done = held["step"]
    end = time.monotonic() + 60 * args.minutes
    model.train()
    while done < args.segmenter_steps and time.monotonic() < end:
        chosen = torch.randint(len(x), (args.batch_size,))
        flip = torch.rand(()) < 0.5
        a, b = x[chosen], y[chosen]
        loss = model(pixel_values=a.flip(-1) if flip else a, labels=b.flip(-1) if flip else b).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done % 200 == 0:
            print(f"segmenter step {done}/{args.segmenter_steps}  loss {loss.item():.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, folder / ".state.pt")
    os.replace(folder / ".state.pt", state)
    model.eval().save_pretrained(folder)
    shape = {"height": size, "width": size}
    SegformerImageProcessor(size=shape, image_mean=mean, image_std=std).save_pretrained(folder)
    from halotune.recipes.control_eval import Segmenter

    judge, seen = Segmenter(str(folder), torch.device(args.device)), Confusion(STREETS, VOID)
    for pair in read_pairs(Path(args.data) / "streets", "val", "segm")[: args.limit]:
        seen.add(preparation.labels(pair), judge(preparation.picture(pair)))
    print(f"{folder}: step {done} of {args.segmenter_steps}, on the held-out originals {seen.figures()}")


# -- training


def jobs(tasks: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(task, method, seed), the most telling first."""
    for seed in SEEDS:
        for method in methods:
            for task in tasks:
                yield task, method, seed


def name_of(task: str, method: str, seed: int) -> str:
    return f"{task}-{method.replace(' ', '_')}-{seed}"


def missing(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    return (j for j in jobs(args.tasks, args.methods) if not (Path(args.results) / f"{name_of(*j)}.json").is_file())


def train(args: argparse.Namespace) -> None:
    sitting(lambda: missing(args), train_one, args, kind=lambda job: job[0])


def train_one(job: tuple[str, str, int], args: argparse.Namespace) -> str:
    task, method, seed = job
    from diffusers.utils import make_image_grid
    from PIL import Image

    from halotune.recipes import ControlConfig, ControlEvaluation, evaluate_control, train_control
    from halotune.recipes.control_data import evenly

    kind, adapter = METHODS[method]
    run = Path(args.runs) / name_of(task, method, seed)
    config = ControlConfig(
        model=args.model,
        control=task,  # type: ignore[arg-type]
        data=str(Path(args.data) / FOLDERS[task]),
        method=kind,
        adapter=dict(adapter),
        seed=seed,
        resolution=args.resolution,
        max_steps=args.steps,
        save_every=max(args.steps // 8, 1),
        batch_size=args.batch_size,
        encoder_learning_rate=args.encoder_rate,
        empty_prompts=0.1,
        inference_steps=args.inference_steps,
        guidance_scale=args.guidance,
        precision=args.precision,
        cache=str(Path(args.runs) / ".cache"),
        device="cpu" if args.device == "cpu" else "auto",
        output=str(run),
        label=method,
        tracker="none",
    )
    config.learning_rate *= args.rate  # type: ignore[operator]
    record = train_control(config)
    begun = time.monotonic()
    figures = evaluate_control(
        ControlEvaluation(
            str(run),
            limit=args.limit,
            batch_size=args.limit,
            base=True,
            segmentation_model=args.segmenter,
            void_label=VOID,
            device=config.device,
        )
    )
    kept = {k: record[k] for k in ("config", "parameters", "seconds", "memory", "results", "versions", "hardware")}
    kept["config"] = {k: v for k, v in kept["config"].items() if k not in ("output", "cache")}
    kept["config"] |= {"model": "tiny_latent_diffusion", "data": FOLDERS[task]}
    seconds = {"evaluation_seconds": round(time.monotonic() - begun, 1)}
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    drawn = run / "drawn" / "val"
    names = evenly(sorted(f.name for f in (drawn / "results").glob("[!.]*")), 6)
    shown = [Image.open(drawn / kind / n).convert("RGB") for kind in ("hints", "source", "base", "results") for n in names]
    make_image_grid(shown, 4, len(names)).save(results / f"{run.name}.webp", quality=90)
    entries = {"task": task, "method": method, "seed": seed, "workers": args.workers, "figures": figures, **seconds, **kept}
    write_result(results / f"{run.name}.json", entries)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run.name


# -- the table


def table(args: argparse.Namespace) -> None:
    """What is there, as text; what is missing is a dash."""
    from halotune.report.table import text_table

    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(Path(args.results).glob("*.json"))}
    for task in args.tasks:
        names = FIGURES[task]
        drawn = [name for name in names if name not in ("floor", "original_undetected")]
        lines = []
        for method in args.methods:
            runs = [r for s in SEEDS if (r := found.get(name_of(task, method, s)))]
            parameters = f"{runs[0]['parameters']['trainable']:,}" if runs else "–"
            memory = f"{statistics.fmean(r['memory']['peak_bytes'] for r in runs) / 2**30:.2f}" if runs else "–"
            own = [_spread(runs, name) for name in names]
            base = [_spread(runs, "base", name) for name in drawn]
            original = [_spread(runs, "original", names[-1])] if task == "segm" else []
            lines.append(
                [method, str(len(runs)), parameters, spread([r["seconds"] for r in runs]), memory, *own, *base, *original]
            )
        heads = ["method", "seeds", "parameters", "seconds", "peak GiB", *names, *(f"base {n}" for n in drawn)]
        print(f"\n{task}\n" + text_table(heads + [f"original {names[-1]}"] * (task == "segm"), lines, left=["method"]))


def _spread(runs: list[dict[str, Any]], *path: str) -> str:
    values = []
    for run in runs:
        value: Any = run["figures"]
        for key in path:
            value = (value or {}).get(key)
        if value is not None:
            values.append(value)
    return spread(values)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "segmenter", "train", "table"])
    flag = parser.add_argument
    flag("--classes", help="an archive of CLASS/FILE")
    flag("--faces", help="a folder with train*.tar, test*.tar, train.jsonl and test.jsonl")
    flag("--streets", help="an archive of train/, trainannot/, val/ and valannot/")
    flag("--output", default="control-data")
    flag("--model", default="base/pipeline")
    flag("--data", default="control-data")
    flag("--segmenter", default="runs/control-segmenter")
    flag("--segmenter-steps", type=int, default=4000)
    flag("--runs", default="runs/control-benchmark")
    flag("--results", default=str(ROOT / "docs" / "results" / "control"))
    flag("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    flag("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    flag("--steps", type=int, default=2000)
    flag("--batch-size", type=int, default=32)
    flag("--resolution", type=int, default=64)
    flag("--limit", type=int, default=128, help="pictures of an evaluation")
    flag("--inference-steps", type=int, default=50)
    flag("--guidance", type=float, default=3.0)
    flag("--rate", type=float, default=1.0, help="times the recipe's default learning rate of the method")
    flag("--encoder-rate", type=float, default=1e-3)
    flag("--precision", default="fp32", choices=["fp32", "bf16"])
    flag("--workers", type=int, default=4, help="runs side by side on a GPU")
    flag("--minutes", type=float, default=7.0)
    flag("--grace", type=float, default=60.0, help="seconds more for what is running")
    flag("--device", default="cuda")
    args = parser.parse_args(given)
    {"data": make_data, "segmenter": make_segmenter, "train": train, "table": table}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
