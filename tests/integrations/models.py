"""Small models and data for trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halotune

WORDS = 37


def language_model() -> Any:
    """A Llama of two layers, 32 wide; always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )


def encoder(kind: str = "BertForSequenceClassification") -> Any:
    """A BERT of two layers, 32 wide, with a head; always the same."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(
            transformers.BertConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )


def adapted(config: Any = None, base: nn.Module | None = None) -> halotune.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = config or halotune.HRAConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return halotune.get_peft_model(base or language_model(), config)


def texts(n: int = 16, length: int | None = 6) -> Any:
    """Rows of tokens with a column that no model takes; `length` None: of different lengths."""
    from datasets import Dataset

    rng = torch.Generator().manual_seed(0)

    def row(i: int) -> dict[str, Any]:
        ids = torch.randint(3, WORDS, (length or 3 + i % 7,), generator=rng).tolist()
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids), "author": "nobody"}

    return Dataset.from_list([row(i) for i in range(n)])


def tokenizer(folder: Path) -> Any:
    """One word a token: w3, w4 …"""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    out = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)
    out.save_pretrained(folder)
    return out


def arguments(folder: Path, **kwargs: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**usual, **kwargs})


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
