"""The parts of LoRA on one weight of experts, on one GPU, in some seconds: `python benchmarks/experts.py --kernels-only`.

Milliseconds of forward (x (n, in) to y) and backward (dy to dx): torch's grouped product alone; that and the delta added to its
output; z alone; and our product that adds the delta, with each of some tiles, beside its error relative to the second. Then a
whole step, kernel by kernel, with torch's product and with the fastest tile.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
TILES = (  # rows, columns, depth, warps, loads ahead
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (64, 256, 64, 4, 2),
)


def milliseconds(run: Run, device: str, rounds: int = 5, times: int = 8) -> float:
    """The median of some rounds; within one, launches follow each other without a wait."""
    if device == "cpu":
        run()
        return float("nan")
    found = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        begin.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / times)
    return statistics.median(found)


def error(result: tuple[Tensor, ...], due: tuple[Tensor, ...]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(result, due, strict=True))


def row(name: str, *cells: float) -> None:
    print(f"{name:64}" + "".join([f"{cell:10.4f}" for cell in cells]), flush=True)


def parts(size: dict[str, int], device: str) -> Any:
    """Print them; returns the fastest tile."""
    from experts import grouped_mm, routing

    from halotune.ops import grouped_linear_kernels as kernels
    from halotune.ops.grouped_low_rank import add_grouped_low_rank, grouped_low_rank_linear, grouped_outer_pair

    n, (groups, k, m, r) = size["tokens"] * size["top_k"], (size[s] for s in ("experts", "hidden", "inner", "r"))
    ids = routing(size, device)[0].reshape(-1).sort().values
    ends = torch.searchsorted(ids, torch.arange(groups, device=device), right=True).int()
    with torch.device(device):
        x, dy = torch.randn(n, k).bfloat16(), torch.randn(n, m).bfloat16()
        W = (torch.randn(groups, m, k) * k**-0.5).bfloat16()
        A, B = torch.randn(groups, r, k) * k**-0.5, torch.randn(groups, m, r) * r**-0.5
    both = (x, W, A, B, ends, 1.0, True), (dy, W.mT, B.mT, A.mT, ends, 1.0, True)
    print(f"{'milliseconds':64}   forward  backward   both     errors")
    row("torch's product", *(milliseconds(lambda x=x, W=W: grouped_mm(x, W.mT, ends), device) for x, W, *_ in both))
    row(
        "torch's product, and the delta",
        *(milliseconds(lambda a=a: grouped_low_rank_linear.reference(*a), device) for a in both),
    )
    row(
        "z alone",
        *(
            milliseconds(lambda x=x, A=A, B=B: add_grouped_low_rank(x, A, B[..., :0, :], None, ends, 1.0, True, False), device)
            for x, _, A, B, *_ in both
        ),
    )
    z = torch.randn(n, r, device=device, dtype=x.dtype)
    row("gradients of A and B", milliseconds(lambda: grouped_outer_pair(dy, z, z, x, ends, torch.float32), device))
    due = [grouped_low_rank_linear.reference(*a) for a in both]
    tiles = [kernels.Tile(*numbers) for numbers in TILES]
    runs = {}
    for tile in tiles:
        kernels.TILE = tile
        runs[tile] = [kernels.grouped_low_rank_linear(*a) for a in both]

    @torch.no_grad()
    def errors(tile: Any) -> list[float] | str:
        try:
            return [error(run(*a), b) for run, a, b in zip(runs[tile], both, due, strict=True)]
        except Exception as e:  # of a tile that does not fit this GPU or this version of Triton
            return f"{type(e).__name__}: {str(e)[:200]}"

    best, least = None, float("inf")
    first, *others = runs
    with ThreadPoolExecutor(8 if device == "cuda" else 1) as pool:  # compilers are programs of their own
        seen = {first: errors(first), **dict(zip(others, pool.map(errors, others), strict=True))}
    for tile, wrong in seen.items():
        if isinstance(wrong, str) and isinstance(wrong := errors(tile), str):  # nor alone
            print(tuple(tile), wrong, flush=True)
            continue
        found = [milliseconds(lambda run=run, a=a: run(*a), device) for run, a in zip(runs[tile], both, strict=True)]
        row(str(tuple(tile)), *found, sum(found), *wrong)
        if not sum(found) >= least and max(wrong) < 0.01:
            best, least = tile, sum(found)
    return best


@contextmanager
def chosen(tile: Any) -> Iterator[None]:
    """Inside, our product runs with this tile; with None torch's and what is added to it."""
    from halotune.ops import grouped_linear_kernels as kernels
    from halotune.ops.grouped_low_rank import grouped_low_rank_linear as op

    before, kernel = kernels.TILE, op.kernel
    kernels.TILE, op.kernel = tile or before, replace(kernel, faster=lambda *_: tile is not None)
    op.prepared.clear()
    try:
        yield
    finally:
        kernels.TILE, op.kernel = before, kernel
        op.prepared.clear()


def by_kernel(step: Run, steps: int = 4) -> dict[str, float]:
    from experts import device_events

    found: dict[str, float] = defaultdict(float)
    for e in device_events(step, steps):
        found[e.name[:56]] += e.self_device_time_total / 1e3 / steps
    return found


def main(size: dict[str, int], device: str) -> None:
    from experts import milliseconds as once
    from experts import weight_case

    torch.manual_seed(0)
    with torch.no_grad():
        best = parts(size, device)
    for name, tile in {"torch's product": None, f"{best}": best}.items():
        with chosen(tile):
            step = weight_case("halotune LoRA", size, device, torch.bfloat16)
            for _ in range(3):
                step()
            times = [once(step, device, 8) for _ in range(12)]
            row(f"a step, least and median: {name}"[:63], min(times), statistics.median(times))
            if device == "cuda":
                found = by_kernel(step)
                row("  in kernels", sum(found.values()))
                for kernel, time in sorted(found.items(), key=lambda kv: -kv[1]):
                    row(f"    {kernel}", time)
