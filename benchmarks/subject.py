"""Subject-driven generation with every method at about equal parameters: `docs/results/subject/`, in sittings.

The images and the data set, once, where there is a network:

    halotune data dreambooth dreambooth
    python benchmarks/subject.py images --archive tiny_imagenet.tar --output images

Sittings on one GPU, each a command of at most ten minutes. A machine that begins empty needs `images`, `dreambooth` and, of the
base, `base/carried` (bf16, files of at most 16 MiB, 60 MB together); `base/state.pt` is there only while the machine stays.

    python examples/tiny_latent_diffusion.py --images images --output base --minutes 8 --compile # again until "finished": true
    python examples/tiny_latent_diffusion.py --images images --output base --minutes 0  # base/pipeline again, from base/carried
    python benchmarks/subject.py train --model base/pipeline --data dreambooth --minutes 7    # again until 0 are to be started
    python benchmarks/subject.py cost --minutes 7                                 # again; less memory: --blocks 10
    python benchmarks/subject.py table
    python benchmarks/subject.py picture --shown dog6 --output docs/subject.png
    python benchmarks/subject.py picture --shown dog6 backpack bear_plushie … --output docs/results/subject/subjects.webp

Without any download, at toy size, on a CPU (with scikit-learn's photographs; too short to learn the subject):

    python benchmarks/subject.py images --output images --data photographs
    python examples/tiny_latent_diffusion.py --images images --output base --minutes 4 --size 32 --vae-channels 16 32 32 \\
        --channels 32 64 --groups 8 --vae-batch-size 16 --unet-batch-size 16 --vae-steps 350 --unet-steps 1500 \\
        --learning-rate 1e-3 --device cpu
    python benchmarks/subject.py train --model base/pipeline --data photographs --subjects blue_flower --others temple \\
        --steps 40 --class-images 4 --inference-steps 8 --guidance 2 --results toy --minutes 20 --workers 1
    python benchmarks/subject.py cost --toy --device cpu --cost-steps 2 --results toy
    python benchmarks/subject.py picture --shown blue_flower --results toy --output docs/subject.png

`train` adapts the base to a subject of each class that the base knows: all methods at the first, where each takes the better of
two learning rates (`--rates`, times the recipe's default of the method) at one seed, then two seeds more; HRA and LoRA at the
others. Figures are those of `halotune eval subject`; the drift is that of prompts of the base's other classes. `cost` times a
training step on Stable Diffusion 1.5's UNet and on a FLUX-class transformer, with random weights at the released sizes, beside
peft's HRA: on the clock, methods in turn, and what the GPU spends in kernels, since with one picture a slow host is what the
GPU waits for.

`train` has several runs side by side on a GPU (`--workers`), so their seconds are comparable within a sitting alone. A sitting
starts nothing that would not end in `--minutes`, leaves the JSON and a small picture of each finished run in `--results`, and
goes on from what it finds there; a run that is cut off goes on at its checkpoint. The learning rate of each method is the
recipe's default times `--rate`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sittings import best_rate, sitting, write_result

ROOT = Path(__file__).parent.parent
# name -> method and configuration; of square layers of n each has 8 n parameters.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "HRA": ("hra", {"r": 8}),
    "HRA GS": ("hra", {"r": 8, "apply_GS": True}),
    "LoRA": ("lora", {"r": 4, "lora_alpha": 4}),
    "LoHa": ("loha", {"r": 2, "alpha": 2}),
    "Bone": ("bone", {"r": 8}),
    "BAT": ("bat", {"r": 8}),
}
# Tiny-ImageNet's folders with subjects in DreamBooth's data set, by the words for them there; and two others.
CLASSES = {
    **dict.fromkeys(("n02085620", "n02094433", "n02099601", "n02099712", "n02106662", "n02113799"), "dog"),
    **dict.fromkeys(("n02123045", "n02123394", "n02124075"), "cat"),
    "n02769748": "backpack",
    "n02948072": "candle",
    "n04285008": "sports car",
    "n04356056": "glasses",
    "n04398044": "teapot",
    "n04399382": "stuffed animal",
}
PHOTOGRAPHS = {"flower": "flower.jpg", "temple": "china.jpg"}
AT_EVERY_SUBJECT = ("HRA", "LoRA")
SEEDS = (0, 1, 2)
OURS = ("LoRA", "HRA", "LoHa", "Bone", "BAT")
WARM_UP, STEPS = 3, 10


def make_images(args: argparse.Namespace) -> None:
    """The folder that the base is trained on, out of an archive: of CLASS/FILE by the classes' names, else of one caption."""
    folder, lines = Path(args.output), []
    folder.mkdir(parents=True)
    if args.archive:
        with tarfile.open(args.archive) as archive:
            archive.extractall(folder, filter="data")
    else:
        cut_photographs(folder, Path(args.data))
    for file in sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png")):
        place = file.relative_to(folder)
        known = CLASSES.get(place.parts[0]) or (place.parts[0] if place.parts[0] in PHOTOGRAPHS else None)
        text = f"a photo of a {known}" if known else args.caption
        lines.append(json.dumps({"file_name": place.as_posix(), "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder}: {len(lines)} images")


def cut_photographs(folder: Path, data: Path) -> None:
    """Where there is no archive: squares out of scikit-learn's two photographs, of a flower and of a temple; and in
    DreamBooth's layout one subject, that flower in blue."""
    import random

    from PIL import Image
    from sklearn.datasets import load_sample_image

    from halotune.recipes.dreambooth import TABLE

    whole = {name: Image.fromarray(load_sample_image(file)) for name, file in PHOTOGRAPHS.items()}
    centres = {"flower": (330, 210), "temple": (320, 200)}
    rng = random.Random(0)

    def cut(image: Image.Image, x: int, y: int) -> Image.Image:
        side = rng.randint(240, 330)
        x, y = (c + rng.randint(-25, 25) - side // 2 for c in (x, y))
        return image.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.LANCZOS)

    for name, image in whole.items():
        (folder / name).mkdir()
        for number in range(200):
            cut(image, *centres[name]).save(folder / name / f"{number:03}.png")
    red, green, blue = whole["flower"].split()
    (data / "blue_flower").mkdir(parents=True)
    for number in range(5):
        cut(Image.merge("RGB", (blue, green, red)), *centres["flower"]).save(data / "blue_flower" / f"{number:02}.jpg")
    prompt = "prompt_list = [\n'a photo of a {0} {1}'.format(unique_token, class_token)\n]\n"
    table = "subject_name,class\nblue_flower,flower\n\nPrompts\n\nObject Prompts\n\n"
    (data / TABLE).write_text(f"{table}{prompt}\nLive Subject Prompts\n\n{prompt}", encoding="utf-8")


# -- training


Job = tuple[str, str, float, int]  # subject, method, learning rate, seed


def result(args: argparse.Namespace, *job: Any) -> dict[str, Any] | None:
    file = Path(args.results) / f"{name_of(*job)}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def chosen_rate(args: argparse.Namespace, method: str) -> tuple[float | None, bool]:
    """The rate of the highest similarity to the first subject at the first seed, of those there; and whether all are."""
    found = {rate: result(args, args.subjects[0], method, rate, SEEDS[0]) for rate in args.rates}
    return best_rate(found, similarity)


def similarity(entry: dict[str, Any]) -> float:
    (scorer,) = entry["figures"]["base"]  # those of the base are of the subject's own prompts
    return entry["figures"][scorer]


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What can be run: rates first, then what has its rate; the most telling first."""
    first, *others = args.subjects
    rates = {method: chosen_rate(args, method) for method in METHODS}
    for rate in args.rates:
        for method in METHODS:
            yield first, method, rate, SEEDS[0]
    known = [(method, rate) for method, (rate, final) in rates.items() if rate and final]
    for subject in others:
        for method, rate in known:
            if method in AT_EVERY_SUBJECT:
                yield subject, method, rate, SEEDS[0]
    for seed in SEEDS[1:]:
        for method, rate in known:
            yield first, method, rate, seed


def missing(args: argparse.Namespace) -> Iterator[Job]:
    return (job for job in jobs(args) if result(args, *job) is None)


def train(args: argparse.Namespace) -> None:
    import torch

    from halotune.recipes.scorers import load_scorers

    load_scorers(args.scorers, torch.device("cpu"))  # what is missing is said before minutes are spent
    sitting(lambda: missing(args), train_one, args)


def name_of(subject: str, method: str, rate: float, seed: int) -> str:
    return f"{subject}-{method.replace(' ', '_')}-x{rate:g}-{seed}"


def train_one(job: Job, args: argparse.Namespace) -> str:
    subject, method, rate, seed = job
    from diffusers.utils import make_image_grid
    from PIL import Image

    from halotune.recipes import SubjectConfig, SubjectEvaluation, evaluate_subject, train_subject
    from halotune.recipes.dreambooth import read_suite

    found = next(s for s in read_suite(Path(args.data)) if s.name == subject)
    kind, adapter = METHODS[method]
    run = Path(args.runs) / name_of(*job)
    word = found.class_word
    config = SubjectConfig(
        model=args.model,
        subject=str(found.folder),
        class_word=word,
        prompt=f"a photo of a qwe {word}",
        class_prompt=f"a photo of a {word}",
        method=kind,
        adapter=dict(adapter),
        seed=seed,
        max_steps=args.steps,
        batch_size=args.batch_size,
        class_images=args.class_images,
        inference_steps=args.inference_steps,
        guidance_scale=args.guidance,
        validation_seeds=4,
        output=str(run),
        label=method,
        tracker="none",
    )
    config.learning_rate *= rate
    record = train_subject(config)
    prompts = [config.prompt, f"a qwe {word} in the snow", f"a red qwe {word}"]
    others = [f"a photo of a {c}" for c in args.others if c != word]
    figures = evaluate_subject(
        SubjectEvaluation(str(run), scorers=args.scorers, prompts=prompts, drift_prompts=others, count=4)
    )
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    kept = {k: record[k] for k in ("config", "parameters", "seconds", "memory", "results", "versions", "hardware")}
    kept["config"]["model"], kept["config"]["subject"] = "tiny_latent_diffusion", subject
    for place in ("output", "cache", "class_folder"):
        kept["config"].pop(place)
    real = sorted(f for f in found.folder.iterdir() if f.suffix == ".jpg")[:4]
    drawn = [sorted((run / "evaluation" / kind).glob("a_photo_of_a_qwe*.png"))[:4] for kind in ("base", "run")]
    shown = [Image.open(f).convert("RGB").resize((64, 64)) for row in (real, *drawn) for f in row]
    make_image_grid(shown, 3, 4).save(results / f"{run.name}.webp", quality=90)
    entries = {
        "subject": subject,
        "method": method,
        "rate": rate,
        "seed": seed,
        "workers": args.workers,
        "figures": figures,
        **kept,
    }
    write_result(results / f"{run.name}.json", entries)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run.name


# -- the cost of a step


def sd15(toy: bool = False) -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion 1.5's UNet and its inputs of one picture of 512 pixels."""
    import torch
    from diffusers import UNet2DConditionModel

    size, widths = (8, (32, 64, 64, 64)) if toy else (64, (320, 640, 1280, 1280))
    model = UNet2DConditionModel(sample_size=size, cross_attention_dim=768, block_out_channels=widths)
    inputs = {
        "sample": torch.randn(1, 4, size, size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    return model, inputs


def flux(blocks: int, toy: bool = False) -> tuple[Any, dict[str, Any]]:
    """A transformer of FLUX.1's width with so many double and twice as many single blocks, and one picture of 512 pixels."""
    import torch
    from diffusers import FluxTransformer2DModel

    heads, tokens, words = (1, 16, 8) if toy else (24, 1024, 512)
    model = FluxTransformer2DModel(num_layers=blocks, num_single_layers=2 * blocks, num_attention_heads=heads)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, words, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(words, 3),
    }
    return model, inputs


def cost(args: argparse.Namespace) -> None:
    """Seconds and peak memory of a training step, the library's methods in one process for each model, peft's in another: what
    tells the time in kernels, torch's profiler, slows down all launches of its process from then on."""
    end = time.monotonic() + 60 * args.minutes
    for name in [f"flux-{args.blocks}" if base == "flux" else base for base in args.bases]:
        for methods in (OURS, ("peft HRA",)):
            if time.monotonic() < end and not all(cost_file(args, name, method).is_file() for method in methods):
                worker = multiprocessing.get_context("spawn").Process(target=cost_of, args=(name, methods, args))
                worker.start()
                worker.join()
                if worker.exitcode:
                    print(f"{name}, {', '.join(methods)}: failed", flush=True)


def cost_file(args: argparse.Namespace, name: str, method: str) -> Path:
    return Path(args.results) / f"cost-{name}-{method.replace(' ', '_')}.json"


def cost_of(name: str, methods: tuple[str, ...], args: argparse.Namespace) -> None:
    import torch

    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model, inputs = sd15(args.toy) if name == "sd15" else flux(args.blocks, args.toy)
        torch.set_default_dtype(torch.float32)
    for method, entries in measure(model, inputs, methods, args).items():
        entries = {"model": name, "method": method, **entries}
        write_result(cost_file(args, name, method), entries)
        print(entries, flush=True)


def measure(
    model: Any, inputs: dict[str, Any], methods: tuple[str, ...], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Of one library's methods, on one base: a step of each in turn, so that a host drifts for all alike; then kernels."""
    import torch

    from halotune.bench.timing import Clock

    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on FLUX, frozen or not (torch 2.11, H200)
    model.requires_grad_(False)
    model.enable_gradient_checkpointing()
    adapted, optimizers = with_adapters(model, methods, args.rank), {}
    adapted.train()
    for method in methods:
        adapted.set_adapter(method)
        optimizers[method] = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    clock = Clock(torch.device(args.device))

    def step(method: str) -> None:
        with torch.autocast(args.device, torch.bfloat16):
            adapted(**inputs).sample.float().square().mean().backward()
        optimizers[method].step()
        optimizers[method].zero_grad()

    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(WARM_UP + args.cost_steps):
        for method in [m for m in methods if "error" not in found.get(m, {})]:
            adapted.set_adapter(method)
            trained = [p for p in adapted.parameters() if p.requires_grad]
            found[method] = {"parameters": sum(p.numel() for p in trained)}
            try:
                clock.forget_peak()
                lap = clock.laps(lambda method=method: step(method))[0] / 1e3
                found[method]["peak_bytes"] = clock.peak()
                seconds[method] += [lap] if turn >= WARM_UP else []
            except torch.OutOfMemoryError as e:
                found[method]["error"] = str(e).split(".")[0]
                optimizers[method].zero_grad()
    for method in [m for m in methods if "error" not in found[m]]:
        adapted.set_adapter(method)
        found[method] |= {
            "seconds": statistics.median(seconds[method]),
            "kernel_seconds": clock.busy(lambda method=method: step(method)) / 1e3 if clock.cuda else None,
            "steps": len(seconds[method]),
            "device": torch.cuda.get_device_name() if clock.cuda else "cpu",
            "torch": torch.__version__,
        }
    return found


def with_adapters(model: Any, methods: tuple[str, ...], rank: int) -> Any:
    """An adapter of each method, by its name; a `rank` is HRA's, the others' give about equal parameters."""
    import halotune
    from halotune.recipes.diffusion import TARGETS

    if methods == ("peft HRA",):
        import peft

        return peft.get_peft_model(model, peft.HRAConfig(r=rank, target_modules=TARGETS["attention"]), methods[0])
    kinds = {"LoRA": halotune.LoraConfig, "HRA": halotune.HRAConfig, "LoHa": halotune.LoHaConfig}
    sizes = {"LoRA": rank // 2, "LoHa": rank // 4}
    adapted: Any = None
    for method in methods:
        own = METHODS[method][1] | {"r": sizes.get(method, rank)}
        own |= {k: own["r"] for k in ("lora_alpha", "alpha") if k in own}
        own |= {"init_weights": "bat"} if method == "BAT" else {}
        config = kinds.get(method, halotune.BoneConfig)(**own, target_modules=TARGETS["attention"])
        if adapted is None:
            adapted = halotune.get_peft_model(model, config, method)
        else:
            adapted.add_adapter(method, config)
    return adapted


# -- the table


def table(args: argparse.Namespace) -> None:
    """What is there, as text; what is missing is a dash."""
    from halotune.report.table import text_table

    rows = []
    for subject in args.subjects:
        for method in METHODS if subject == args.subjects[0] else AT_EVERY_SUBJECT:
            best, final = chosen_rate(args, method)
            for rate in args.rates if subject == args.subjects[0] else [best]:
                runs = [r for s in SEEDS if (r := result(args, subject, method, rate, s))] if rate else []
                figures = sorted({k for r in runs for k, v in r["figures"].items() if isinstance(v, float)})
                shown = "; ".join(
                    f"{k} {spread([r['figures'][k] for r in runs])}"
                    + (f" (base {spread([r['figures']['base'][k] for r in runs])})" if k in runs[0]["figures"]["base"] else "")
                    for k in figures
                )
                told = f"{rate or 0:g}{'' if final or rate != best else '?'}"  # others are still to be tried
                size = f"{runs[0]['parameters']['trainable']:,}" if runs else "–"
                rows.append([subject, method, told, str(len(runs)), size, spread([r["seconds"] for r in runs]), shown or "–"])
    heads = ["subject", "method", "rate ×", "seeds", "parameters", "seconds", "figures"]
    print(text_table(heads, rows, left=["subject", "method", "figures"]))
    costs = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(Path(args.results).glob("cost-*.json"))]
    lines = []
    for entry in costs:
        reference: dict[str, Any] = next((r for r in costs if (r["model"], r["method"]) == (entry["model"], "LoRA")), {})
        cells = [f"{entry['parameters']:,}"]
        for field, scale in (("seconds", 1.0), ("kernel_seconds", 1.0), ("peak_bytes", 2.0**30)):
            own, other = entry.get(field), reference.get(field)
            cells += [f"{own / scale:.3f}" if own else "–", f"{own / other:.2f}" if own and other else "–"]
        lines.append([entry["model"], entry["method"], *cells, entry.get("error", "")])
    if lines:
        heads = ["model", "method", "parameters", "s/step", "× LoRA", "in kernels", "× LoRA", "peak GiB", "× LoRA", "note"]
        print(text_table(heads, lines, left=["model", "method", "note"]))


def picture(args: argparse.Namespace) -> None:
    """Subject, base and methods side by side, out of the small pictures that `train` left: of one subject every method, with a
    row for each seed of the noise; of several a row for each, and the methods that every subject has."""
    from PIL import Image, ImageDraw, ImageFont

    one = len(args.shown) == 1
    side, head, count = (96, 22, 1) if one else (64, 22, 4)
    files: dict[tuple[str, str], Path] = {}
    for method in METHODS if one else AT_EVERY_SUBJECT:
        rate, _ = chosen_rate(args, method)
        for subject in args.shown:
            file = Path(args.results) / f"{name_of(subject, method, rate or 0, SEEDS[0])}.webp"
            if file.is_file():
                files[method, subject] = file
    if not files:
        raise SystemExit(f"{args.results}: holds no picture of {', '.join(args.shown)}. Run `train` first.")
    methods = list(dict.fromkeys(method for method, _ in files))
    columns = ["subject", "base", *methods]
    sheet = Image.new("RGB", (side * count * len(columns), head + side * (4 if one else len(args.shown))), "white")
    write = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        write.text((side * count * (x + 0.5), head / 2), name, "black", ImageFont.load_default(14), anchor="mm")
        for y, subject in enumerate(args.shown):
            file = files.get((methods[max(x - 2, 0)], subject))
            if file is None:
                continue  # white: missing
            with Image.open(file) as grid:  # rows: subject, base, run
                row, small = min(x, 2), grid.width // 4
                for i in range(4):
                    cell = grid.crop((small * i, small * row, small * (i + 1), small * (row + 1)))
                    at = (x, i) if one else (count * x + i, y)
                    sheet.paste(cell.resize((side, side), Image.Resampling.BICUBIC), (side * at[0], head + side * at[1]))
    sheet.save(args.output, optimize=True)
    print(f"{args.output}: {', '.join(columns)}")


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "train", "cost", "table", "picture"])
    flag = parser.add_argument
    flag("--archive", help="(default: none; squares out of scikit-learn's photographs, and a subject in --data)")
    flag("--caption", default="a photo of a face", help="of images whose folder has no name")
    flag("--output", default="images")
    flag("--model", default="base/pipeline")
    flag("--data", default="dreambooth", help="laid out by halotune data dreambooth")
    flag("--runs", default="runs/subject-benchmark")
    flag("--results", default=str(ROOT / "docs" / "results" / "subject"))
    flag("--subjects", nargs="+", default=["dog6", "backpack", "teapot", "cat", "candle", "pink_sunglasses", "bear_plushie"])
    flag("--shown", nargs="+", default=["dog6"], metavar="SUBJECT", help="of `picture`")
    flag("--others", nargs="+", default=list(dict.fromkeys(CLASSES.values())), help="classes of the base, for the drift")
    flag("--toy", action="store_true", help="time models of toy size")
    flag("--scorers", default="efficientnet-lite")
    flag("--steps", type=int, default=600)
    flag("--batch-size", type=int, default=4)
    flag("--class-images", type=int, default=100)
    flag("--inference-steps", type=int, default=25)
    flag("--guidance", type=float, default=3.0)
    flag("--rates", nargs="+", type=float, default=[10.0, 30.0], help="times the recipe's default learning rate of the method")
    flag("--rank", type=int, default=8)
    flag("--bases", nargs="+", default=["sd15", "flux"], choices=["sd15", "flux"], help="of `cost`")
    flag("--blocks", type=int, default=19, help="of the FLUX-class transformer; 19 is FLUX.1's")
    flag("--cost-steps", type=int, default=STEPS)
    flag("--workers", type=int, default=4, help="runs side by side on a GPU")
    flag("--minutes", type=float, default=7.0)
    flag("--grace", type=float, default=60.0, help="seconds more for what is running")
    flag("--device", default="cuda")
    args = parser.parse_args(given)
    {"images": make_images, "train": train, "cost": cost, "table": table, "picture": picture}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
