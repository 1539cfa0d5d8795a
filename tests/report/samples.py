"""Run folders as a training command leaves them."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

# method -> rate at which it learns, best accuracy, trained parameters, GiB, seconds, size of its change
METHODS = {
    "HRA r8": (1.0, 0.884, 663_552, 6.1, 212, 0.09),
    "HRA r8, λ = 1e-5": (1.05, 0.889, 663_552, 6.2, 219, 0.08),
    "LoHa r8": (0.7, 0.871, 2_654_208, 7.0, 240, 0.02),
    "Bone r32": (1.3, 0.891, 2_211_840, 5.8, 203, 0.05),
    "BAT r32": (1.2, 0.893, 2_211_840, 7.4, 268, 0.06),
    "OFT b32": (0.8, 0.868, 1_142_784, 6.4, 230, 0.07),
    "LoRA r8": (0.9, 0.879, 1_327_104, 6.6, 221, 0.015),
}
MODULES = (
    *(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def write_run(
    folder: Path,
    method: str = "HRA r8",
    seed: int = 0,
    *,
    steps: int = 120,
    layers: int = 12,
    pictures: bool = False,
    **record: Any,
) -> Path:
    """One run; `record` replaces entries of run.json."""
    rate, best, parameters, gib, seconds, change = METHODS[method]
    noise = random.Random(f"{method} {seed}")
    folder.mkdir(parents=True)
    accuracy = best + noise.gauss(0, 0.004)
    whole = {
        "recipe": "nlu",
        "label": method,
        "command": f"halotune train nlu --task sst2 --seed {seed} --output {folder.name}",
        "config": {
            "task": "sst2",
            "adapter": {
                "r": int(method.split()[1].strip("rb,")),
                "target_modules": "all-linear",
                "orthogonality_weight": 1e-5 * ("λ" in method),
            },
            "learning_rate": 1e-3 if method.startswith("HRA") else 5e-4,
            "batch_size": 32,
            "seed": seed,
            "output": str(folder),
        },
        "seed": seed,
        "method": method.split()[0].lower(),
        "model": "microsoft/deberta-v3-base",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "halotune": "0.1.0"},
        "hardware": {"gpu": "NVIDIA H100 80GB HBM3", "cpu_cores": 16},
        "commit": "acd1432",
        "status": "finished",
        "parameters": {"trainable": parameters, "total": 184_000_000 + parameters},
        "seconds": seconds * noise.uniform(0.97, 1.06),
        "memory": {"peak_bytes": round(gib * 2**30 * noise.uniform(0.99, 1.01))},
        "results": {
            "best": {"accuracy": accuracy, "loss": 0.62 - 0.4 * accuracy + noise.gauss(0, 0.003)},
            "last": {"accuracy": accuracy - abs(noise.gauss(0, 0.004))},
        },
        "substitutes": ["MiniLM's weights in DeBERTa-v2's shape stand for microsoft/deberta-v3-base."],
    }
    (folder / "run.json").write_text(json.dumps(whole | record), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            at = step / steps
            loss = 0.22 + 0.48 * math.exp(-4 * rate * at) + noise.gauss(0, 0.018)
            speed = 21_000 / seconds * 212 * noise.uniform(0.95, 1.02)
            rate_now = 1e-3 * min(at * 10, 1 - at + 0.1)
            line = {"step": step, "epoch": 3 * at, "loss": loss, "learning_rate": rate_now, "tokens_per_second": speed}
            print(json.dumps(line | {"memory_bytes": whole["memory"]["peak_bytes"]}), file=file)
            if step * 10 % steps == 0:
                now = 0.5 + (accuracy - 0.5) * (1 - math.exp(-5 * rate * at)) + noise.gauss(0, 0.003)
                print(
                    json.dumps({"step": step, "epoch": 3 * at, "evaluation": {"accuracy": now, "loss": loss + 0.02}}), file=file
                )
    names = [f"deberta.encoder.layer.{i}.{module}" for i in range(layers) for module in MODULES]
    sizes = {
        n: change * noise.uniform(0.8, 1.2) * (0.4 + i / len(names)) * (2 if "value" in n else 1) for i, n in enumerate(names)
    }
    (folder / "changes.json").write_text(json.dumps({"layers": {n: {"relative_change": size} for n, size in sizes.items()}}))
    if pictures:
        columns = ["subject", "base", "step 200", "step 400"]
        for i in range(8):
            (folder / f"picture-{i}.png").write_bytes(png(noise.randrange(256), i * 32))
        rows = [
            {"label": f"a dog {place}", "images": [f"picture-{4 * i + j}.png" for j in range(4)]}
            for i, place in enumerate(("in the jungle", "on a beach"))
        ]
        (folder / "gallery.json").write_text(json.dumps({"columns": columns, "rows": rows}))
    return folder


def write_sweep(place: Path, seeds: int = 3, **options: Any) -> Path:
    """Every method with several seeds."""
    for method in METHODS:
        for seed in range(seeds):
            write_run(place / f"{method} seed {seed}".replace(" ", "-"), method, seed, **options)
    return place


def png(red: int, blue: int, side: int = 64) -> bytes:
    """A picture of a disc."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def pixel(x: int, y: int) -> bytes:
        inside = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2
        return bytes((red, 2 * y, blue)) if inside else bytes((230, 230, 120 + y))

    lines = b"".join(b"\0" + b"".join(pixel(x, y) for x in range(side)) for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
