"""A tiny language model with a tokenizer of bytes, and adapters on it, as folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, get_peft_model
from halotune.core.config import AdapterConfig
from tests.laws.cases import train

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TARGETS = ["q_proj", "down_proj"]
CONFIGS: dict[str, AdapterConfig] = {
    "hra": HRAConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "bone": BoneConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "bat": BoneConfig(r=4, init_weights="bat", target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lora": LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
}


def save_tokenizer(folder: Path, *, template: bool = True) -> int:
    """A tokenizer of single bytes; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if template:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(tokens)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder. Its weights are far from the usual start, so that its answers vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "base"
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(10.0) if p.dim() == 2 else None
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters on `base`, one a method, all parameters random."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for layer in model.modules():
                if hasattr(layer, "adapters"):
                    train(layer.adapters)
        model.save_pretrained(folder / name)
    return folder
