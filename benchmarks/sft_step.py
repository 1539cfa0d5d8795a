"""One step of `halotune train sft` beside TRL's SFTTrainer with peft's LoRA, on one GPU: time and peak memory.

    python benchmarks/sft_step.py --output benchmarks/results/sft-step.json

The shape of Llama-3.2-3B with random bf16 weights; one packed row of 4096 tokens; adapters of rank 32 on all linear layers;
both trainers as they are, TRL's chunked loss and AdamW included, without gradient checkpointing and with it (TRL's default).
Every contender runs in a process of its own, in turn, several times over; tokens per second are of the median step, memory is
the peak of allocated tensors in training steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("halotune HRA", "halotune HRA compiled", "TRL + peft LoRA")
WITHOUT_HEAD = "halotune HRA without head"  # what the loss over the vocabulary takes: with --length 8192
MODELS: dict[str, dict[str, Any]] = {
    "llama-3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def tokenizer() -> Any:
    """The trainers want one; the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def rows(vocabulary: int, length: int, number: int) -> Any:
    """Examples of the lengths that worked problems have, prompts of which do not count."""
    import torch
    from datasets import Dataset

    rng = torch.Generator().manual_seed(0)
    out, tokens = [], 0
    while tokens < 1.2 * number * length:
        n = int(torch.exp(5.5 + 0.6 * torch.randn((), generator=rng)).clamp(16, length))
        ids = torch.randint(3, vocabulary, (n,), generator=rng).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3 :]})
        tokens += n
    return Dataset.from_list(out)


def measure(contender: str, checkpointing: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Median step and peak memory, in this process."""
    import torch
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[args.model], tie_word_embeddings=True, max_position_embeddings=131072, use_cache=False)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    steps = args.warmup + args.steps
    data = rows(config.vocab_size, args.length, steps * args.rows + 8)
    place = tempfile.mkdtemp()
    usual: dict[str, Any] = {
        "output_dir": place,
        "per_device_train_batch_size": args.rows,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "bf16": True,
        "gradient_checkpointing": checkpointing,
        "logging_steps": steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not cuda,
    }
    times: list[float] = []
    real: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            if len(times) == args.warmup and cuda:
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.start)

    if contender.startswith("halotune"):
        from halotune import HRAConfig, get_peft_model
        from halotune.integrations.trl import AdapterSFTTrainer
        from halotune.recipes.language.packing import PackedCollator
        from halotune.recipes.sft import compile_blocks

        adapted = get_peft_model(model, HRAConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        if contender.endswith("compiled"):
            compile_blocks(adapted)
        packed = trl.pack_dataset(data, args.length)

        class WithoutHead(AdapterSFTTrainer):
            def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
                inputs = {k: v for k, v in inputs.items() if k != "labels"}
                return model.get_base_model().model(**inputs, use_cache=False).last_hidden_state.float().square().mean()

        kind = WithoutHead if contender == WITHOUT_HEAD else AdapterSFTTrainer
        trainer: Any = kind(
            adapted,
            args=trl.SFTConfig(**usual, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
            data_collator=PackedCollator(0, args.length),
            train_dataset=packed,
            processing_class=tokenizer(),
            callbacks=[Watch()],
        )
    else:
        from peft import LoraConfig

        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**usual, max_length=args.length, packing=True),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Watch()],
        )
    for batch in trainer.get_train_dataloader():
        real.append(batch["input_ids"].numel())
        if len(real) == 4:
            break
    trainer.train()
    kept = times[args.warmup :]
    median = statistics.median(kept)
    return {
        "contender": contender,
        "checkpointing": checkpointing,
        "step_ms": 1e3 * median,
        "steps_ms": [round(1e3 * t, 2) for t in kept],
        "tokens": statistics.fmean(real),
        "tokens_per_second": statistics.fmean(real) / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "loss": trainer.state.log_history[-1].get("train_loss"),
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sft-step.json")
    parser.add_argument("--model", choices=list(MODELS), default="llama-3b")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a packed row (default: 4096)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step (default: 1)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="how often every contender runs, in turn (default: 2)")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after (default: 8)")
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, WITHOUT_HEAD], default=list(CONTENDERS))
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CHECKPOINTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one[0], args.one[1] == "True", args)))
        return
    import torch

    end = time.monotonic() + 60 * args.minutes
    found: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for checkpointing in (False, True):
            for contender in args.contenders:
                if time.monotonic() > end:
                    print(f"left out for lack of time: {contender}, checkpointing {checkpointing}, round {turn}")
                    continue
                command = [sys.executable, __file__, *sys.argv[1:], "--one", contender, str(checkpointing)]
                done = subprocess.run(command, capture_output=True, text=True)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                row = json.loads(line[7:]) if line else {"contender": contender, "checkpointing": checkpointing}
                if not line:
                    row["failed"] = next(reversed(done.stderr.strip().splitlines()), "")[:300]
                found.append({**row, "round": turn})
                print(found[-1], flush=True)
    record = {
        "model": args.model,
        "rows": args.rows,
        "length": args.length,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "runs": found,
        "ratios": ratios(found),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["ratios"], indent=1))


def ratios(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over TRL + peft's LoRA: tokens per second and peak memory, of each one's median round."""
    out: dict[str, Any] = {}
    for checkpointing in (False, True):

        def median(contender: str, key: str, checkpointing: bool = checkpointing) -> float | None:
            same = [r for r in found if (r["contender"], r["checkpointing"]) == (contender, checkpointing)]
            values = [r[key] for r in same if r.get(key) is not None]
            return statistics.median(values) if values else None

        for contender in CONTENDERS[:-1]:
            name = f"{contender}, {'checkpointing' if checkpointing else 'no checkpointing'}"
            for key in ("tokens_per_second", "peak_gib"):
                ours, theirs = median(contender, key), median(CONTENDERS[-1], key)
                out.setdefault(name, {})[key] = None if ours is None or theirs is None else round(ours / theirs, 3)
    return out


if __name__ == "__main__":
    main()
