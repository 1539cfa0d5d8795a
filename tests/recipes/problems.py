"""Generated word problems, and a Llama and a tokenizer small enough to be trained on them in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

NAMES = ("Tom", "Ada", "Mia", "Leo")
THINGS = ("apples", "books", "coins", "stones")


def problem(number: int) -> dict[str, str]:
    """A row as GSM8K has it."""
    rng = random.Random(number)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 5)
    question = f"{name} has {a} {things} and gets {b} more. {c} friends do the same. How many {things} do they have in all?"
    one, all_ = a + b, (a + b) * (c + 1)
    first = f"{name} has {a}+{b}=<<{a}+{b}={one}>>{one} {things}."
    second = f"All have {one}*{c + 1}=<<{one}*{c + 1}={all_}>>{all_} {things}."
    return {"question": question, "answer": f"{first}\n{second}\n#### {all_}"}


def write_problems(file: Path, numbers: range) -> Path:
    file.write_text("".join(json.dumps(problem(n)) + "\n" for n in numbers), encoding="utf-8")
    return file


def tokenizer(chat_template: str | None = None) -> Any:
    """Byte pairs of the problems, 400 of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((text for n in range(50) for text in problem(n).values()), trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", model_max_length=512)
    out.chat_template = chat_template
    return out


def tiny_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def sft_arguments(folder: Path, **changes: Any) -> Any:
    """TRL's, for two steps on the CPU, of rows that are tokens already."""
    from trl.trainer.sft_config import SFTConfig

    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(str(folder), **{**usual, **changes})


def base_folder(folder: Path) -> Path:
    """The model and the tokenizer, saved as a base model."""
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
