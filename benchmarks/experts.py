"""Adapters on fused experts beside peft's and the frozen base, on one GPU: time and peak memory of forward and backward.

    python benchmarks/experts.py --output benchmarks/results/experts.json

`weight` is one weight of 128 experts, 2048 inputs and 768 outputs, on the rows of 4096 tokens with 8 experts each, sorted by
expert; `block` a whole module of experts of that size (Qwen3-30B-A3B's), routing included; `model` a Mixtral of four layers.
All in bf16 with random weights. The contenders of a case run in turn, round after round, in one process: times are the least
and the median of all rounds, of CUDA events around one forward and backward, and beside them what the GPU spent in kernels and
how many there were: the rest is the host's. Then each runs alone for its peak of allocated memory, weights included. The
targets: LoRA at most a third of peft's time and 0.6 of its memory (`weight`), HRA at most 1.3 times frozen (`model`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]
SIZES: dict[str, dict[str, int]] = {
    "full": {"experts": 128, "hidden": 2048, "inner": 768, "tokens": 4096, "top_k": 8, "r": 16},
    "tiny": {"experts": 4, "hidden": 64, "inner": 32, "tokens": 32, "top_k": 2, "r": 8},
}
MODEL: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64},
}  # fmt: skip


class Weight(nn.Module):
    """One weight of all experts, for peft to wrap."""

    def __init__(self, experts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.is_transposed = False
        self.up_proj = nn.Parameter(torch.randn(experts, n_out, n_in) * n_in**-0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.up_proj.mT, ends)


class Holder(nn.Module):
    """Experts in a model, as adapters are put into."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


def grouped_mm(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    run: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return run(x, W, offs=ends)


def experts_module(size: dict[str, int]) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=size["hidden"],
        moe_intermediate_size=size["inner"],
        num_experts=size["experts"],
        num_experts_per_tok=size["top_k"],
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.02)
    return experts


def routing(size: dict[str, int], device: str) -> tuple[Tensor, Tensor]:
    index = torch.rand(size["tokens"], size["experts"], device=device).argsort(-1)[:, : size["top_k"]]
    return index, torch.rand(index.shape, device=device)


def backward_of(run: Callable[[], Tensor], leaves: list[Tensor]) -> Step:
    """One step: forward, and backward from a fixed gradient."""
    weight: list[Tensor] = []

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = run()
        if not weight:
            weight.append(torch.randn_like(y))
        y.backward(weight[0])

    return step


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def adapted(base: nn.Module, kind: str, r: int, targets: list[str]) -> nn.Module:
    """The base with adapters: of halotune, or peft's."""
    if kind == "frozen":
        return base.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.startswith("peft"):
            import peft

            config: Any = peft.LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=targets)
            return peft.get_peft_model(base, config)  # type: ignore[arg-type]
        import halotune

        shared = "shared" in kind
        if "LoRA" in kind:
            config = halotune.LoraConfig(r=r, lora_alpha=r, target_parameters=targets, expert_sharing=shared)
        else:
            config = halotune.HRAConfig(r=8, target_parameters=targets, expert_sharing=shared)
        return halotune.get_peft_model(base, config)


CONTENDERS = {
    "weight": ("frozen", "halotune LoRA", "peft LoRA", "halotune HRA r8"),
    "block": ("frozen", "halotune LoRA", "peft LoRA", "halotune HRA r8", "halotune LoRA shared"),
    "model": ("frozen", "halotune HRA r8", "halotune LoRA", "peft LoRA"),
}


def weight_case(kind: str, size: dict[str, int], device: str, dtype: torch.dtype) -> Step:
    """One weight on sorted rows."""
    n = size["tokens"] * size["top_k"]
    index, _ = routing(size, device)
    ids = index.reshape(-1).sort().values
    ends = torch.searchsorted(ids, torch.arange(size["experts"], device=device), right=True).int()
    x = torch.randn(n, size["hidden"], device=device, dtype=dtype, requires_grad=True)
    with torch.device(device):
        weight = Weight(size["experts"], size["hidden"], size["inner"]).to(dtype)
    if not kind.startswith("halotune"):
        model = adapted(Holder(weight), kind, size["r"], ["experts.up_proj"])
        return backward_of(lambda: model(x, ends), [x, *trained(model)])
    from halotune.core.experts import Groups

    vars(weight).update(has_gate=False, has_bias=False, is_concatenated=True, config=argparse.Namespace())
    weight.down_proj = nn.Parameter(torch.empty(size["experts"], 1, 1, device=device, dtype=dtype))
    model = adapted(Holder(weight), kind, size["r"], ["experts.up_proj"])
    layer: Any = model.get_base_model().experts.up_proj  # type: ignore[operator]
    groups = Groups(ends, ids)
    return backward_of(lambda: layer(x, groups), [x, *trained(model)])


def block_case(kind: str, size: dict[str, int], device: str, dtype: torch.dtype) -> Step:
    """A module of experts on tokens."""
    with torch.device(device):
        base = Holder(experts_module(size).to(dtype))
    index, weights = routing(size, device)
    x = torch.randn(size["tokens"], size["hidden"], device=device, dtype=dtype, requires_grad=True)
    model = adapted(base, kind, size["r"], ["experts.gate_up_proj", "experts.down_proj"])
    return backward_of(lambda: model(x, index, weights), [x, *trained(model)])


def model_case(kind: str, size: dict[str, int], device: str, dtype: torch.dtype) -> Step:
    """A language model on one row of tokens; frozen too, gradients go all the way back."""
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device(device):
        base = MixtralForCausalLM(MixtralConfig(**MODEL["full" if size["experts"] == 128 else "tiny"])).to(dtype)
    n = base.config.hidden_size
    x = torch.randn(1, size["tokens"], n, device=device, dtype=dtype, requires_grad=True)
    model = adapted(base, kind, size["r"], ["experts.gate_up_proj", "experts.down_proj"])
    return backward_of(lambda: model(inputs_embeds=x).logits, [x, *trained(model)])


CASES = {"weight": weight_case, "block": block_case, "model": model_case}


def milliseconds(step: Step, device: str, steps: int) -> float:
    """Of one of some steps that follow each other: as in training, nobody waits for the GPU between them."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) * 1e3 / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / steps


def device_events(step: Callable[[], Any], steps: int) -> list[Any]:
    """What a GPU did in some steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return [e for e in profile.events() or () if e.device_type.name == "CUDA"]


def kernels(step: Step, device: str, steps: int = 3) -> tuple[float | None, int | None]:
    """Milliseconds that a GPU spends in the kernels of one step, and their number."""
    if device == "cpu":
        return None, None
    events = device_events(step, steps)
    return sum(e.self_device_time_total for e in events) / 1e3 / steps, round(len(events) / steps)


def peak_gb(make: Callable[[], Step], device: str) -> float | None:
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = make()
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    del step
    return peak


def measure(case: str, size: dict[str, int], device: str, rounds: int, steps: int) -> dict[str, Any]:
    dtype = torch.bfloat16
    kinds = CONTENDERS[case]

    def make(kind: str) -> Step:
        torch.manual_seed(0)
        return CASES[case](kind, size, device, dtype)

    ready = {kind: make(kind) for kind in kinds}
    for step in ready.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, step in ready.items():
            times[kind].append(milliseconds(step, device, steps))
    busy = {kind: kernels(step, device) for kind, step in ready.items()}
    ready.clear()
    del step
    out: dict[str, Any] = {}
    for kind in kinds:
        peak = peak_gb(lambda kind=kind: make(kind), device)  # type: ignore[misc]
        out[kind] = {
            "min_ms": min(times[kind]),
            "median_ms": statistics.median(times[kind]),
            "kernels_ms": busy[kind][0],
            "kernels": busy[kind][1],
            "peak_gb": peak,
        }
    return out


def shown(case: str, found: dict[str, Any]) -> str:
    heads = "min ms", "median ms", "in kernels", "kernels", "peak GB", "of frozen", "of peft"
    lines = [f"{case:24}" + "".join([f"{head:>11}" for head in heads])]
    for kind, row in found.items():
        numbers = [row["min_ms"], row["median_ms"], row["kernels_ms"], row["kernels"], row["peak_gb"]]
        numbers += [row["median_ms"] / found[o]["median_ms"] if o in found else None for o in ("frozen", "peft LoRA")]
        cells = ["" if v is None else f"{v}" if isinstance(v, int) else f"{v:.3f}" for v in numbers]
        lines.append(f"{kind:24}" + "".join([f"{cell:>11}" for cell in cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--size", default="full", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="of each contender in a round, one after the other")
    parser.add_argument("--kernels-only", action="store_true", help="the parts of LoRA on one weight, see expert_kernels.py")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.kernels_only:
        import expert_kernels

        return expert_kernels.main(SIZES[args.size], device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "sizes": SIZES[args.size],
        "cases": {},
    }
    for case in args.cases:
        result["cases"][case] = found = measure(case, SIZES[args.size], device, args.rounds, args.steps)
        print(shown(case, found), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
