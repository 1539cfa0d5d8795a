"""The methods of word_problems.py as peft has them, in TRL's own trainer: as cheap, as good?

    python benchmarks/word_problems_peft.py --data DATA --output benchmarks/results/word-problems-peft.json

The same model, packed rows, learning rate and seed; a number of steps of each, ours and peft's in turn, alone on the device:
the median step, the peak of allocated tensors, and the mean loss of the last ten steps. What peft's LoHa, MiSS and LoRA learn
in a whole epoch is in word_problems.py's own table; its HRA would take too long there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sft_step import stopwatch
from sittings import write_result

PAIRS = {"HRA": "peft HRA", "LoHa": "peft LoHa", "Bone": "peft MiSS", "LoRA": "peft LoRA"}
RATES = {"HRA": 1e-3, "LoHa": 3e-3, "Bone": 3e-4, "LoRA": 1e-3}


def peft_model(config: Any, name: str) -> Any:
    """The base with peft's adapter of the same size."""
    import peft
    from transformers import AutoModelForCausalLM

    from halotune.recipes.common.model import load_base

    kinds: dict[str, tuple[Any, tuple[str, ...]]] = {
        "HRA": (peft.HRAConfig, ("r",)),
        "LoHa": (peft.LoHaConfig, ("r", "alpha")),
        "MiSS": (peft.MissConfig, ("r",)),
        "LoRA": (peft.LoraConfig, ("r", "lora_alpha")),
    }
    kind, names = kinds[name.removeprefix("peft ")]
    own = {field: getattr(config.adapter, field) for field in names}
    base = load_base(AutoModelForCausalLM, config, attn_implementation=config.attention)
    return peft.get_peft_model(base, kind(**own, target_modules="all-linear", task_type="CAUSAL_LM"))


def peft_trainer(config: Any, run: Any, model: Any, tokenizer: Any, train: Any, watch: Any) -> Any:
    """TRL's trainer, on the arguments and rows that ours gets."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from halotune.recipes.common.trainer import arguments, checkpointing
    from halotune.recipes.language.packing import PackedCollator

    args = arguments(
        config,
        run,
        SFTConfig,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        eval_strategy="no",
        save_strategy="no",
        **dict.fromkeys(checkpointing(SFTConfig), False),
    )
    collator = PackedCollator(tokenizer.pad_token_id, None)
    return SFTTrainer(
        model, args=args, data_collator=collator, train_dataset=train, processing_class=tokenizer, callbacks=[watch]
    )


def held_out_loss(config: Any, run: Any, model: Any, tokenizer: Any, held: Any) -> dict[str, float]:
    """Of a token that counts, by the evaluation of `halotune train sft`."""
    from halotune.recipes import sft

    found = sft.make_trainer(config, run, model, tokenizer, held, held).evaluate()
    return {name: found[f"eval_{name}"] for name in ("loss", "perplexity")}


def whole_run(config: Any, name: str, command: str, folder: Path) -> dict[str, Any]:
    """What run.json would hold. The held-out loss is measured by our reader of peft's files, as for our own adapters."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from halotune import PeftModel
    from halotune.recipes import sft
    from halotune.recipes.common.model import load_base
    from halotune.recipes.common.run import Run
    from halotune.recipes.common.trainer import seed

    run = Run(config, command)
    tokenizer = sft.load_tokenizer(config)
    train, held = (sft.tokenized(config, tokenizer, rows)[0] for rows in sft.read_data(config)[:2])
    seed(config)
    model = peft_model(config, name)
    watch = stopwatch(0)
    trainer = peft_trainer(config, run, model, tokenizer, train, watch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del trainer, model
    loaded = PeftModel.from_pretrained(load_base(AutoModelForCausalLM, config, attn_implementation="sdpa"), str(folder))
    return {
        **run.record,
        "status": "finished",
        "label": name,
        "library": f"peft {peft.__version__}",
        "parameters": {"trainable": trained},
        "seconds": sum(watch.times),
        "memory": {"peak_bytes": peak},
        "results": {"last": held_out_loss(config, run, loaded, tokenizer, held)},
    }


def steps(name: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """So many steps, in this process."""
    import torch
    from word_problems import configured

    from halotune.recipes import sft
    from halotune.recipes.common.run import Run
    from halotune.recipes.common.trainer import seed

    ours = next(k for k, v in PAIRS.items() if name in (k, v))
    with tempfile.TemporaryDirectory() as place:
        config = configured((ours, rate, 1), args, Path(place))
        config.evaluation, config.max_steps, config.log_every, config.save_every = 0.0, args.steps, 1, None
        run = Run(config)
        tokenizer = sft.load_tokenizer(config)
        train = sft.tokenized(config, tokenizer, sft.read_data(config)[0])[0]
        seed(config)
        watch = stopwatch(args.warmup)
        if name == ours:
            model = sft.adapt(sft.load_base(sft.AutoModelForCausalLM, config), config, sft.TaskType.CAUSAL_LM)
            trainer: Any = sft.make_trainer(config, run, model, tokenizer, train, None)
            trainer.add_callback(watch)
            with run.open():
                trainer.train()
        else:
            trainer = peft_trainer(config, run, peft_model(config, name), tokenizer, train, watch)
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    kept = watch.times[args.warmup :]
    return {
        "name": name,
        "rate": rate,
        "step_ms": 1e3 * statistics.median(kept),
        "steps_ms": [round(1e3 * t, 2) for t in kept],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "first_loss": losses[0],
        "last_loss": statistics.fmean(losses[-10:]),
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Medians over the rounds."""

    def of(name: str, key: str) -> float:
        return statistics.median([row[key] or float("nan") for row in found if row["name"] == name])

    lines = [
        "| method | step, ms | peft's | × | peak, GiB | peft's | × | loss | peft's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ours, theirs in PAIRS.items():
        if {ours, theirs} <= {row["name"] for row in found}:
            cells = [ours]
            for key, form in (("step_ms", ".0f"), ("peak_gib", ".2f")):
                a, b = of(ours, key), of(theirs, key)
                cells += [format(a, form), format(b, form), f"{b / a:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {of(ours, 'last_loss'):.3f} | {of(theirs, 'last_loss'):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 (of its PyPI package), or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a folder with gsm8k/ and math/")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "word-problems-peft.json")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="how often each runs, in turn (default: 2)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row (default: 1024)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows at once (default: 8)")
    parser.add_argument("--rows", type=int, default=2000, help="of the data (default: 2000)")
    args = parser.parse_args()
    args.limit = 1  # nothing is held out
    import gc

    import peft
    import torch

    found: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for ours, theirs in PAIRS.items():
            for name in (ours, theirs):
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                found.append({"round": turn, **steps(name, RATES[ours], args)})
                print(name, {k: v for k, v in found[-1].items() if k != "steps_ms"}, flush=True)
                record = {
                    "command": "python benchmarks/word_problems_peft.py --data DATA",
                    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                    "torch": torch.__version__,
                    "peft": peft.__version__,
                    "rows": f"16 of {args.length} tokens, {args.micro_batch_size} at once",
                    "runs": found,
                }
                write_result(args.output, record)
    print(table(found))


if __name__ == "__main__":
    main()
