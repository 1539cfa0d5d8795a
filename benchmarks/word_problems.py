"""GSM8K with every method at about equal parameters: `docs/results/math/`, over as many sittings as it takes.

    python benchmarks/word_problems.py --model smollm2 --data DATA --minutes 8 --workers 6
    python benchmarks/word_problems.py --table

The model is SmolLM2-135M-Instruct, out of the 4-bit numbers of its PyPI package. It learns GSM8K's and MATH's training problems
(14,973 worked solutions, one epoch, packed rows of 1024 tokens) and is asked all 1,319 test problems of GSM8K, greedily. The
held-out loss is per token of the solutions of GSM8K's test problems and MATH's first 1,000. DATA holds gsm8k/ and math/, each
with train.jsonl and test.jsonl, as `halotune data` writes them.

For every method four learning rates are tried at seed 0 on a quarter of an epoch, and the one of the least held-out loss is
kept; then seeds 1, 2 and 3 are what is reported. A sitting starts nothing that would not end by `--minutes`, leaves the JSON of
finished runs in `--output`, and goes on from those it finds there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sittings import MISSING, best_rate, keep, read, sitting, told
from word_problems_peft import held_out_loss, whole_run

ROOT = Path(__file__).parent.parent
SEEDS = (1, 2, 3)
COMMAND = "python benchmarks/word_problems.py --model smollm2 --data DATA"  # which makes what is missing
BASE = "base model"

# name -> method, its configuration, rates. All linear layers; 1.12 M to 1.24 M parameters.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "HRA": ("hra", {"r": 8}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "HRA λ=1e-4": ("hra", {"r": 8, "orthogonality_weight": 1e-4}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "HRA GS": ("hra", {"r": 8, "apply_GS": True}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "LoHa": ("loha", {"r": 2, "alpha": 2}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "Bone": ("bone", {"r": 8}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "BAT": ("bat", {"r": 8}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "OFT": ("oft", {"oft_block_size": 16}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "LoRA": ("lora", {"r": 4, "lora_alpha": 8}, (3e-4, 1e-3, 3e-3, 1e-2)),
}
PEFT = {"peft LoHa": "LoHa", "peft MiSS": "Bone", "peft LoRA": "LoRA"}  # at the rate that ours has; by TRL's own trainer
ALL = [*METHODS, *PEFT]
Point = tuple[str, float, int]  # method, rate, seed; the base model has rate and seed 0


def name_of(method: str, rate: float, seed: int) -> str:
    plain = method.replace(" ", "-").replace("λ=", "").lower()
    return plain if method == BASE else f"{plain}-{rate:g}-seed{seed}"


def folder_of(output: Path, point: Point) -> Path:
    method, _, seed = point
    return output / ("runs" if seed or method == BASE else "rates") / name_of(*point)


def held_out(data: Path, scratch: Path, limit: int | None) -> str:
    """GSM8K's test problems and MATH's first thousand, as one file."""
    from halotune.recipes.common.rows import read_rows
    from halotune.recipes.language.problems import as_metamath

    file = scratch / "held.jsonl"
    sources = [read_rows(data / suite / "test.jsonl") for suite in ("gsm8k", "math")]
    rows = [
        as_metamath(row.values) for source, n in zip(sources, (1319, 1000), strict=True) for row in list(source)[: limit or n]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def configured(point: Point, args: argparse.Namespace, scratch: Path) -> Any:
    from halotune.recipes import MathConfig

    method, rate, seed = point
    kind, fields, _ = METHODS["HRA" if method == BASE else PEFT.get(method, method)]
    return MathConfig(
        model=args.model,
        template="auto",
        data=f"{args.data}/gsm8k/train.jsonl,{args.data}/math/train.jsonl",
        evaluation=held_out(args.data, scratch, args.limit),
        max_rows=args.rows,
        max_length=args.length,
        method=kind,
        adapter=fields,
        label=method,
        learning_rate=rate or 1e-3,
        epochs=1.0 if seed else 0.25,
        batch_size=16,
        micro_batch_size=args.micro_batch_size,
        precision="bf16",
        compile=False,  # runs are short, and several would compile at once
        seed=seed,
        output=str(scratch / "run"),
        log_every=10,
        tracker="none",
    )


def work(point: Point, args: argparse.Namespace) -> str:
    """One run, in a worker; its JSON is left in the output."""
    from halotune.recipes import MathEvaluation, evaluate_math, train_math

    method, _, seed = point
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        config = configured(point, args, scratch)
        folder = scratch / "run"
        if method == BASE:
            record = base_record(config)
        elif method in PEFT:
            folder = scratch / "adapter"
            record = whole_run(config, method, COMMAND, folder)
        else:
            record = train_math(config, command=COMMAND)
        if seed or method == BASE:
            asked = {} if method == BASE else {"adapter": str(folder)}
            scores = evaluate_math(
                MathEvaluation(
                    suite="gsm8k",
                    model=args.model,
                    data=str(args.data / "gsm8k" / "test.jsonl"),
                    output=str(scratch / "answers"),
                    batch_size=args.eval_batch_size,
                    max_new_tokens=args.max_new_tokens,
                    limit=args.limit,
                    backend="transformers",
                    precision="bfloat16",
                    workers=2,
                    **asked,
                )
            )
            record["results"]["gsm8k"] = {k: scores[k] for k in ("strict", "paper", "not_ended")}
        record["substitutes"] = ["model: SmolLM2-135M-Instruct out of 4-bit numbers; data: GSM8K and MATH, not MetaMathQA"]
        record["workers"] = args.workers  # runs shared the GPU, so seconds are comparable within a sitting alone
        record["config"].update(model="smollm2", output="", data="gsm8k/train.jsonl,math/train.jsonl", evaluation="held out")
        target = folder_of(args.output, point)
        keep(told(record), folder, target, whole=seed > 0)
    return name_of(*point)


def base_record(config: Any) -> dict[str, Any]:
    """What run.json would hold of no training at all: HRA starts at the pretrained function."""
    from transformers import AutoModelForCausalLM

    from halotune.core.config import TaskType
    from halotune.recipes import sft
    from halotune.recipes.common.model import adapt, load_base
    from halotune.recipes.common.run import Run

    run = Run(config, COMMAND)
    tokenizer = sft.load_tokenizer(config)
    _, rows, _ = sft.read_data(config)
    held, _ = sft.tokenized(config, tokenizer, rows)
    model = adapt(load_base(AutoModelForCausalLM, config, attn_implementation="sdpa"), config, TaskType.CAUSAL_LM)
    own = {"status": "finished", "label": BASE, "method": BASE, "parameters": {"trainable": 0}}
    return {**run.record, **own, "results": {"last": held_out_loss(config, run, model, tokenizer, held)}}


def result(output: Path, point: Point) -> dict[str, Any] | None:
    return read(folder_of(output, point))


def chosen_rate(output: Path, method: str) -> tuple[float | None, bool]:
    """The rate of the least held-out loss at seed 0 of those there; and whether all are."""
    method = PEFT.get(method, method)
    found = {rate: result(output, (method, rate, 0)) for rate in METHODS[method][2]}
    return best_rate(found, lambda record: -record["results"]["last"]["loss"])


def missing(args: argparse.Namespace) -> Iterator[Point]:
    """What is to be run and can be run now: the base model, all rates, then a seed of every method before the next seed."""
    points: list[Point] = [(BASE, 0.0, 0)]
    rates = {method: chosen_rate(args.output, method) for method in args.methods}
    points += [(m, rate, 0) for m in args.methods if m in METHODS and not rates[m][1] for rate in METHODS[m][2]]
    points += [(m, rate, seed) for seed in SEEDS for m, (rate, final) in rates.items() if rate and final]
    yield from (point for point in points if result(args.output, point) is None)


def table(args: argparse.Namespace) -> str:
    """Mean ± deviation over the seeds that are there, whose number stands beside them; what is missing says so. * is for a
    learning rate beside which others are to be tried."""
    lines = ["| method (rate) | trained | held-out loss | GSM8K strict | GSM8K paper | seconds | peak GiB | seeds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for method in (BASE, *args.methods):
        rate, final = (0.0, True) if method == BASE else chosen_rate(args.output, method)
        points: list[Point] = [] if rate is None else [(BASE, 0.0, 0)] if method == BASE else [(method, rate, s) for s in SEEDS]
        found = [r for point in points if (r := result(args.output, point)) is not None]
        if not found:
            lines.append(f"| {method} | {' | '.join([MISSING] * 6)} | 0 |")
            continue

        def shown(values: list[float], form: str) -> str:
            mean = format(statistics.fmean(values), form)
            return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean

        cells = [shown([r["results"]["last"]["loss"] for r in found], ".4f")]
        cells += [shown([100 * r["results"]["gsm8k"][rule]["accuracy"] for r in found], ".1f") for rule in ("strict", "paper")]
        if method == BASE:
            cells += ["–", "–"]
        else:
            cells += [f"{statistics.fmean([r['seconds'] for r in found]):.0f}"]
            cells += [f"{statistics.fmean([r['memory']['peak_bytes'] for r in found]) / 2**30:.2f}"]
        named = method if method == BASE else f"{method} ({rate:g}{'' if final else '*'})"
        lines.append(f"| {named} | {found[0]['parameters']['trainable']:,} | " + " | ".join(cells) + f" | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 (of its PyPI package), or a folder")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k/ and math/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "math")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing that would not end by then (default: 8)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds more for what is running (default: 30)")
    parser.add_argument("--workers", type=int, default=6, help="runs side by side on a GPU (default: 6)")
    parser.add_argument("--methods", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row (default: 1024)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows at once (default: 8)")
    parser.add_argument("--eval-batch-size", type=int, default=330, help="answers side by side (default: 330)")
    parser.add_argument("--max-new-tokens", type=int, default=320, help="room for an answer (default: 320)")
    parser.add_argument("--rows", type=int, help="learn from so many rows alone, to try the script")
    parser.add_argument("--limit", type=int, help="ask and hold out so many problems alone, to try the script")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    args = parser.parse_args()
    if args.table:
        return print(table(args))
    if args.data is None:
        sys.exit("word_problems.py: give --data, a folder with gsm8k/ and math/")
    sitting(lambda: missing(args), work, args, kind=lambda point: point[2] == 0)  # a try at a rate, or a whole run
    print(table(args))


if __name__ == "__main__":
    main()
