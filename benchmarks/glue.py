"""GLUE with every method at equal parameters: `docs/results/glue/`, over as many sittings as it takes.

    python benchmarks/glue.py --make-model warm-started            # once, where MiniLM's package is installed
    python benchmarks/glue.py --model warm-started --data GLUE --minutes 8
    python benchmarks/glue.py --table

The model is a DeBERTa-v2 of 6 layers of 384 that starts as MiniLM: its output is MiniLM's (rounded to fp16). It is no
DeBERTa-v3, and no figure here is the paper's. All methods adapt the paper's layers (query, key, value, attention output,
both linear layers of the feed-forward part) with 165,888 parameters each; pooler and classifier are trained beside them.

For every task and method four learning rates are tried at seed 0, and the one of the best last evaluation is kept; then
seeds 1, 2 and 3 are what is reported. A sitting starts nothing after `--minutes`, leaves the JSON of finished runs in
`--output`, and goes on from those it finds there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sittings import MISSING, best_rate, keep, read, sitting, told

ROOT = Path(__file__).parent.parent
EPOCHS = {"cola": 5, "sst2": 5, "mrpc": 5, "stsb": 5}
ROWS = {"sst2": 10_000}
SCORES = {"cola": "matthews_correlation", "sst2": "accuracy", "mrpc": "accuracy_f1_mean", "stsb": "pearson_spearman_mean"}
TARGETS = r".*\.(query_proj|key_proj|value_proj|attention\.output\.dense|intermediate\.dense|output\.dense)"
SEEDS = (1, 2, 3)
COMMAND = "python benchmarks/glue.py --model warm-started --data GLUE"  # which makes what is missing

# name -> method, its configuration, rates. Every one has r (in + out) or r · in or r · out = 27,648 a block of the model.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "HRA": ("hra", {"r": 8}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "HRA λ=1e-5": ("hra", {"r": 8, "orthogonality_weight": 1e-5}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "HRA GS": ("hra", {"r": 8, "apply_GS": True}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "LoHa": ("loha", {"r": 2, "alpha": 2}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "Bone": ("bone", {"r": 8}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "BAT": ("bat", {"r": 8}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "LoRA": ("lora", {"r": 4, "lora_alpha": 4}, (2e-4, 7e-4, 2e-3, 6e-3)),
}


def make_model(folder: Path) -> None:
    """A DeBERTa-v2 that computes what MiniLM does.

    DeBERTa divides its scores by √(3 d) where BERT has √d, so the query projection is multiplied by √3; the projections of
    relative positions are zero, so that content alone is compared; absolute positions and token types are embedded as in BERT.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer, DebertaV2Config, DebertaV2Model

    from halotune.recipes.common.model import model_source

    source = model_source("minilm")
    bert = AutoModel.from_pretrained(source).eval()
    own = bert.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
    same = {name: getattr(own, name) for name in f"{names} type_vocab_size layer_norm_eps hidden_act pad_token_id".split()}
    config = DebertaV2Config(**same, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=True)
    model = DebertaV2Model(config).eval()
    theirs = bert.state_dict()
    parts = {"query_proj": "query", "key_proj": "key", "value_proj": "value"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = name
            for ours, bert_name in parts.items():
                old = old.replace(ours, bert_name)
            if "pos_" in name:
                parameter.zero_()
            elif old in theirs:
                parameter.copy_(theirs[old] * (math.sqrt(3) if ".query_proj." in name else 1.0))
            elif "rel_embeddings" not in name:
                raise RuntimeError(f"{name} has no counterpart in BERT")
        tokenizer = AutoTokenizer.from_pretrained(source)
        batch = tokenizer(["Nobody has seen the film yet.", "It rains."], padding=True, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        difference = (bert(**batch)[0] - model(**batch)[0])[mask].abs().max()
    print(f"largest difference of the outputs: {difference:.1e}")
    if difference > 1e-5:
        raise RuntimeError("the model does not compute what MiniLM does")
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def name_of(task: str, method: str, rate: float, seed: int) -> str:
    plain = method.replace(" ", "-").replace("λ=", "").lower()
    return f"{task}-{plain}-{rate:g}-seed{seed}"


def train(point: tuple[str, str, float, int], args: argparse.Namespace) -> str:
    """One run, in a worker; its JSON is left in the output."""
    task, method, rate, seed = point
    from halotune.recipes import NLUConfig, train_nlu

    kind, fields, _ = METHODS[method]
    name = name_of(task, method, rate, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        config = NLUConfig(
            model=str(args.model),
            task=task,  # type: ignore[arg-type]
            data=str(args.data),
            train_rows=args.rows or ROWS.get(task),
            method=kind,
            adapter={**fields, "target_modules": TARGETS},
            label=method,
            learning_rate=rate,
            epochs=args.epochs or EPOCHS[task],
            seed=seed,
            output=str(folder),
            log_every=50,
            tracker="none",
        )
        record = train_nlu(config, command=COMMAND)
        record["substitutes"] = [*record["substitutes"], "model: DeBERTa-v2 warm-started from MiniLM, not DeBERTa-v3"]
        record["substitutes"] += ["SST-2: 10,000 of its 67,349 rows"] * (task == "sst2")
        record["workers"] = args.workers  # runs shared the GPU, so seconds are comparable within a sitting alone
        target = args.output / ("rates" if seed == 0 else "runs") / name
        text = told(record).replace(f"{scratch}/", "")
        for path, shown in ((args.model, "warm-started"), (args.data, "GLUE")):
            text = text.replace(json.dumps(str(path)), json.dumps(shown))
        keep(text, folder, target, whole=seed > 0)
    return name


def result(output: Path, task: str, method: str, rate: float, seed: int) -> dict[str, Any] | None:
    return read(output / ("rates" if seed == 0 else "runs") / name_of(task, method, rate, seed))


def chosen_rate(output: Path, task: str, method: str) -> tuple[float | None, bool]:
    """The rate whose last evaluation at seed 0 is the best of those there; and whether all are."""
    found = {rate: result(output, task, method, rate, 0) for rate in METHODS[method][2]}
    return best_rate(found, lambda record: record["results"]["last"][SCORES[task]])


def missing(args: argparse.Namespace) -> Iterator[tuple[str, str, float, int]]:
    """What is to be run and can be run now: rates first, then the seeds of what has its rate."""
    for task in args.tasks:
        for method in args.methods:
            rate, final = chosen_rate(args.output, task, method)
            points = [(rate, seed) for seed in SEEDS] if rate and final else [(r, 0) for r in METHODS[method][2]]
            for r, seed in points:
                if result(args.output, task, method, r, seed) is None:
                    yield task, method, r, seed


def table(args: argparse.Namespace) -> str:
    """Mean ± deviation of the last evaluation over three seeds, and the learning rate; a cell that is not there yet says so.
    * is for a rate beside which others are to be tried."""
    lines = ["| method | trained | " + " | ".join(args.tasks) + " | seconds |", "|---|---|" + "---|" * (len(args.tasks) + 1)]
    for method in args.methods:
        cells, seconds, trained = [], [], MISSING
        for task in args.tasks:
            rate, final = chosen_rate(args.output, task, method)
            found = [result(args.output, task, method, rate, seed) for seed in SEEDS] if rate else []
            records = [r for r in found if r is not None]
            if len(records) < len(SEEDS):
                cells.append(MISSING)
                continue
            scores = [100 * r["results"]["last"][SCORES[task]] for r in records]
            cells.append(f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores):.1f} ({rate:g}{'' if final else '*'})")
            seconds += [r["seconds"] for r in records]
            trained = f"{records[0]['parameters']['trainable']:,}"
        mean = f"{statistics.fmean(seconds):.0f}" if seconds else MISSING
        lines.append(f"| {method} | {trained} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--make-model", type=Path, metavar="DIR", help="write the model and stop")
    parser.add_argument("--model", type=Path, help="its folder")
    parser.add_argument("--data", type=Path, help="a folder with GLUE's own files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "glue")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing that would not end by then (default: 8)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds more for what is running (default: 30)")
    parser.add_argument("--workers", type=int, default=5, help="runs side by side on a GPU, 4 to 11 GB each (default: 5)")
    parser.add_argument("--tasks", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=int, help="learn from so many rows alone, to try the script")
    parser.add_argument("--epochs", type=float, help="instead of five, to try the script")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    args = parser.parse_args()
    if args.make_model:
        return make_model(args.make_model)
    if args.table:
        return print(table(args))
    if args.model is None or args.data is None:
        sys.exit("glue.py: give --model, made with --make-model, and --data")
    sitting(lambda: missing(args), train, args, kind=lambda point: point[0])
    print(table(args))


if __name__ == "__main__":
    main()
