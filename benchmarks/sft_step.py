"""One step of `halotune train sft` beside TRL's SFTTrainer with peft's LoRA, on one GPU: time and peak memory.

    python benchmarks/sft_step.py --output benchmarks/results/sft-step.json
    python benchmarks/sft_step.py --contenders "halotune HRA" "unsloth LoRA" "unsloth LoRA offloaded" --unsloth-site FOLDER

The shape of Llama-3.2-3B with random bf16 weights; one packed row of 4096 tokens; adapters of rank 32 on all linear layers;
all trainers as they are, TRL's chunked loss and AdamW included, without gradient checkpointing and with it (TRL's default).
Every contender runs in a process of its own, in turn, several times over; tokens per second are of the median step, memory is
the peak of allocated tensors in training steps.

unsloth's LoRA is a contender where unsloth is installed. It wants older versions of datasets and TRL than we do and changes
transformers, peft and TRL as it is imported, so `--unsloth-site FOLDER` (of `pip install --target FOLDER`) is seen by its
processes alone. Its own kind of checkpointing, which offloads activations to the CPU, is a contender beside the usual kind.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any

from sittings import write_result

COMPILED, THEIRS = "halotune HRA compiled", "TRL + peft LoRA"
UNSLOTHS = UNSLOTH, OFFLOADED = "unsloth LoRA", "unsloth LoRA offloaded"  # the latter: activations, to the CPU
WITHOUT_HEAD = "halotune HRA without head"  # what the loss over the vocabulary takes: with --length 8192
CONTENDERS = ("halotune HRA", COMPILED, THEIRS)
REFERENCES = (THEIRS, *UNSLOTHS, WITHOUT_HEAD)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth", "xformers", "flash_attn")
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


def bare_model(model: str) -> Any:
    """A Llama of this shape with random bf16 weights, on the GPU where there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODELS[model], tie_word_embeddings=True, max_position_embeddings=131072, use_cache=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        made = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return made


def arguments(checkpointing: bool, args: argparse.Namespace, **own: Any) -> Any:
    """TRL's, the same for all trainers; what unsloth has other defaults for is said."""
    import torch
    import trl

    return trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=1,
        max_steps=args.warmup + args.steps,
        learning_rate=1e-4,
        warmup_steps=0,
        optim="adamw_torch_fused",
        weight_decay=0.0,
        seed=42,
        bf16=True,
        gradient_checkpointing=checkpointing,
        logging_steps=args.warmup + args.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **own,
    )


def ours(contender: str, checkpointing: bool, args: argparse.Namespace, data: Any, watch: Any) -> Any:
    """The trainer of `halotune train sft`, with HRA."""
    import trl

    from halotune import HRAConfig, get_peft_model
    from halotune.integrations.trl import AdapterSFTTrainer
    from halotune.recipes.language.packing import PackedCollator, share_mask
    from halotune.recipes.sft import compile_blocks

    class WithoutHead(AdapterSFTTrainer):
        """The same step, but for the head and the loss over the vocabulary."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            inputs = {k: v for k, v in inputs.items() if k != "labels"}
            return model.get_base_model().model(**inputs, use_cache=False).last_hidden_state.float().square().mean()

    config = HRAConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(bare_model(args.model), config)
    share_mask(model.get_base_model())
    if contender == COMPILED:
        compile_blocks(model)
    own = {"activation_offloading": True} if checkpointing and contender == COMPILED else {}  # as the recipe has it
    kind = WithoutHead if contender == WITHOUT_HEAD else AdapterSFTTrainer
    return kind(
        model,
        args=arguments(checkpointing, args, **own, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=PackedCollator(0, args.length),
        train_dataset=trl.pack_dataset(data, args.length),
        processing_class=tokenizer(),
        callbacks=[watch],
    )


def theirs(checkpointing: bool, args: argparse.Namespace, data: Any, watch: Any) -> Any:
    """TRL's own trainer, with peft's LoRA."""
    import trl
    from peft import LoraConfig

    return trl.SFTTrainer(
        bare_model(args.model),
        args=arguments(checkpointing, args, max_length=args.length, packing=True),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )


def unsloths(contender: str, checkpointing: bool, args: argparse.Namespace, data: Any, watch: Any) -> Any:
    """TRL's trainer and LoRA as unsloth has changed them, used as its documentation says."""
    import torch
    import trl
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:  # it takes models from a folder or the hub only
        bare_model(args.model).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        gc.collect()
        torch.cuda.empty_cache()
        model, words = FastLanguageModel.from_pretrained(
            folder, max_seq_length=args.length, dtype=torch.bfloat16, load_in_4bit=False
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=32,
        lora_alpha=64,
        target_modules=LINEAR,
        use_gradient_checkpointing="unsloth" if contender == OFFLOADED else checkpointing,
    )
    # With labels among the columns unsloth replaces TRL's collator by one that lets packed examples attend to each other.
    masked = data.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]}, remove_columns="labels")
    return trl.SFTTrainer(
        model,
        args=arguments(checkpointing, args, max_length=args.length, packing=True, completion_only_loss=True),
        train_dataset=masked,
        processing_class=words,
        callbacks=[watch],
    )


def stopwatch(warmup: int) -> Any:
    """A callback with the seconds of every step, which has the peak forgotten after the first ones."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(self.times) == warmup and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(now() - self.start)

    return Watch()


def measure(contender: str, checkpointing: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Median step and peak memory, in this process."""
    if contender in UNSLOTHS:
        if importlib.util.find_spec("unsloth") is None:
            sys.exit("not installed")
        import unsloth  # noqa: F401  # it changes what is imported after it

    import torch

    data = rows(MODELS[args.model]["vocab_size"], args.length, (args.warmup + args.steps) * args.rows + 8)
    watch = stopwatch(args.warmup)
    if contender == THEIRS:
        trainer = theirs(checkpointing, args, data, watch)
    elif contender in UNSLOTHS:
        trainer = unsloths(contender, checkpointing, args, data, watch)
    else:
        trainer = ours(contender, checkpointing, args, data, watch)
    real = [batch["input_ids"].numel() for batch in islice(trainer.get_train_dataloader(), 4)]
    trainer.train()
    kept = watch.times[args.warmup :]
    median = statistics.median(kept)
    return {
        "contender": contender,
        "checkpointing": checkpointing,
        "step_ms": 1e3 * median,
        "steps_ms": [round(1e3 * t, 2) for t in kept],
        "tokens": statistics.fmean(real),
        "tokens_per_second": statistics.fmean(real) / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "loss": trainer.state.log_history[-1].get("train_loss"),
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)},
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
    parser.add_argument("--minutes", type=float, default=8.0, help="of all of it; what is cut off is told (default: 8)")
    parser.add_argument("--seconds", type=float, default=240.0, help="of one contender's process (default: 240)")
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, WITHOUT_HEAD, *UNSLOTHS], default=list(CONTENDERS))
    parser.add_argument("--unsloth-site", metavar="FOLDER", help="with unsloth and the versions it wants, for it alone")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CHECKPOINTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one[0], args.one[1] == "True", args)))
        return
    end = time.monotonic() + 60 * args.minutes
    found: list[dict[str, Any]] = []
    for turn, checkpointing, contender in product(range(args.rounds), (False, True), args.contenders):
        if contender == OFFLOADED and not checkpointing:
            continue
        left = end - time.monotonic()
        row = {"contender": contender, "checkpointing": checkpointing, "round": turn}
        found.append(row | (in_a_process(contender, checkpointing, args, left) if left > 0 else {"failed": "no time was left"}))
        print(found[-1], flush=True)
        write(args, found)
    print(json.dumps(ratios(found), indent=1))


def in_a_process(contender: str, checkpointing: bool, args: argparse.Namespace, left: float) -> dict[str, Any]:
    """What `measure` gives in a process of its own, or why it gives nothing: then the end of its output goes to stderr."""
    command = [sys.executable, "-u", __file__, *sys.argv[1:], "--one", contender, str(checkpointing)]
    environment = dict(os.environ)
    if contender in UNSLOTHS:
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(),
        }
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (args.unsloth_site, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=min(left, args.seconds))
            failure = ""
        except subprocess.TimeoutExpired:
            failure = "the time was over"
        output.seek(0)
        lines = output.read().strip().splitlines()
    result = next((x for x in lines if x.startswith("RESULT ")), None)
    if result:
        return json.loads(result[7:])
    print(*lines[-25:], sep="\n", file=sys.stderr)
    return {"failed": failure or "".join(lines[-1:])[:300]}


def write(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """All that was measured so far."""
    import torch

    record = {
        "command": "python benchmarks/sft_step.py " + shlex.join(sys.argv[1:]),
        "model": args.model,
        "rows": args.rows,
        "length": args.length,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "runs": found,
        "ratios": ratios(found),
    }
    write_result(args.output, record)


def ratios(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second and peak memory, of each one's median round: ours over every LoRA's, and over our own step without the
    head."""
    values: dict[Any, list[float]] = {}
    for row, key in product(found, ("tokens_per_second", "peak_gib")):
        if row.get(key) is not None:
            values.setdefault((row["contender"], row["checkpointing"], key), []).append(row[key])
    median = {where: statistics.median(v) for where, v in values.items()}
    out: dict[str, Any] = {}
    for (contender, checkpointing, key), value in median.items():
        for reference in REFERENCES:
            other = median.get((reference, checkpointing, key))
            if other and contender not in REFERENCES:
                name = f"{contender} / {reference}, {'checkpointing' if checkpointing else 'no checkpointing'}"
                out.setdefault(name, {})[key] = round(value / other, 3)
    return out


if __name__ == "__main__":
    main()
