"""What `halotune.speed_up` gains on one live peft model: training steps of peft alone and of the same model sped up, in turn.

    python benchmarks/speed_up.py --device cpu --model llama-1b --layers 2 --dtype fp32 --batch 1 --tokens 256
    python benchmarks/speed_up.py --device cuda --model llama-3b --json benchmarks/results/h100-speed-up.json

Both train the same parameters from the same start on the same batches, with AdamW, so their losses can be compared step by
step. A side that runs out of memory is left out from then on, and the other goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import halotune
from halotune.bench.config import DTYPES
from halotune.bench.contenders import quiet
from halotune.bench.models import PRESETS, Batch, build, target_names
from halotune.bench.rows import hardware, versions
from halotune.bench.timing import Clock, no_collection

CONFIGS: dict[str, Callable[..., Any]] = {
    "hra": peft.HRAConfig,
    "loha": lambda r, **kwargs: peft.LoHaConfig(r=r, alpha=r, **kwargs),
    "miss": peft.MissConfig,
    "bat": lambda **kwargs: peft.MissConfig(init_weights="bat", **kwargs),
}
SIDES = {"peft": halotune.slow_down, "sped up": halotune.speed_up}


@dataclass
class Side:
    """What one side gave: milliseconds and losses of every timed step, and the most memory allocated, weights included."""

    change: Callable[[Any], Any]
    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        median = statistics.median(self.ms) if self.ms else None
        return {"ms": median, "all_ms": self.ms, "losses": self.losses, "peak_bytes": self.peak, "problem": self.problem}


def turn(
    side: Side,
    model: Any,
    start: list[Tensor],
    batches: list[Batch],
    loss_of: Callable[[Any, Batch], Tensor],
    lr: float,
    clock: Clock,
) -> None:
    """Train on every batch from the start; the first step is not timed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses: list[Tensor] = []

    def step(batch: Batch) -> None:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    side.change(model)
    clock.forget_peak()
    try:
        ms = [clock.laps(lambda batch=batch: step(batch))[0] for batch in batches]
        side.ms += ms[1:]
        side.losses = [loss.item() for loss in losses]
        side.peak = max(side.peak or 0, clock.peak() or 0) or None
    except torch.OutOfMemoryError:
        side.problem = "out of memory"
    for p in trained:
        p.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="llama-tiny", choices=[name for name in PRESETS if name.startswith("llama")])
    parser.add_argument("--layers", type=int, help="another number of layers than the model's")
    parser.add_argument("--method", default="hra", choices=CONFIGS)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="all-linear", choices=["qv", "all-linear"])
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    device, preset = torch.device(args.device), PRESETS[args.model].with_layers(args.layers)
    torch.manual_seed(0)
    with quiet():
        base = build(preset, device, DTYPES[args.dtype])
        config = CONFIGS[args.method](r=args.r, target_modules=target_names(base, preset.family, args.targets))
        model = peft.get_peft_model(base, config)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    size = args.batch, args.tokens or preset.tokens
    batches = [preset.family.batch(preset.shape, *size, device, DTYPES[args.dtype]) for _ in range(args.steps + 1)]
    clock, sides = Clock(device), {name: Side(change) for name, change in SIDES.items()}
    with no_collection():
        for _ in range(args.rounds):
            for name, side in sides.items():
                if side.problem is None:
                    turn(side, model, start, batches, preset.family.loss, args.lr, clock)
                    clock.clean()
                    print(f"{name}: {side.problem or f'{statistics.median(side.ms):.1f} ms a step'}", flush=True)

    theirs, ours = sides.values()
    both = theirs.ms and ours.ms
    ratio = statistics.median(theirs.ms) / statistics.median(ours.ms) if both else None
    pairs = zip(ours.losses, theirs.losses, strict=True) if both else ()
    difference = max((abs(a - b) / abs(b) for a, b in pairs), default=None)
    if ratio is not None:
        print(
            f"{ratio:.2f} times as fast; the losses of {len(ours.losses)} steps differ by {difference:.1e} at most, relatively"
        )
    for name, side in sides.items():
        if side.peak:
            print(f"{name}: {side.peak / 2**30:.1f} GiB at most")
    if args.json:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        result = {"setting": setting, "hardware": hardware(device), "versions": versions(), "ratio": ratio}
        result |= {"largest_relative_loss_difference": difference, **{name: side.to_dict() for name, side in sides.items()}}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
