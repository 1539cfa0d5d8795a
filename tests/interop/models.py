"""Small models, and what several tests do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures"
torch.set_num_threads(1)  # models this small only make threads wait for each other

IDS = torch.arange(14).reshape(2, 7) % 13 + 3  # no special token among them


class ConvNet(nn.Module):
    """The base of the fixtures with convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.gconv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv1x1 = nn.Conv2d(8, 6, 1)
        self.c1d = nn.Conv1d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gconv(self.conv2(self.conv1(x).relu()).relu()).relu()
        return self.fc(self.c1d(self.conv1x1(x).flatten(2)).mean(-1))


class MLP(nn.Module):
    """Two linear layers with biases, in a list."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@cache
def _original(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP()
    if kind == "convnet":
        model = ConvNet()
        model.load_state_dict(load_file(FIXTURES / "base_convnet" / "model.safetensors"))
        return model
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        return transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base_llama")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    if kind in ("tied", "llama_classifier"):  # the first one's head has the embedding's weight
        config = transformers.LlamaConfig(**sizes, intermediate_size=24, tie_word_embeddings=kind == "tied", pad_token_id=0)
    elif kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "initializer_range": 0.2}
        config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    elif kind == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    elif kind == "t5":
        config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    else:
        config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=32)
    classes = {
        "tied": transformers.LlamaForCausalLM,
        "llama_classifier": transformers.LlamaForSequenceClassification,
        "gpt2": transformers.GPT2LMHeadModel,
        "opt": transformers.OPTForCausalLM,
        "t5": transformers.T5ForConditionalGeneration,
        "bert": transformers.BertModel,
        "bert_classifier": transformers.BertForSequenceClassification,
        "bert_tagger": transformers.BertForTokenClassification,
        "bert_reader": transformers.BertForQuestionAnswering,
    }
    return classes[kind](config)


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of its own for the caller, in eval mode; the same weights each time."""
    return copy.deepcopy(_original(kind)).eval().to(dtype)


def inputs(model: nn.Module) -> Tensor:
    """An input that this kind of model takes."""
    if hasattr(model, "config"):
        return IDS
    generator = torch.Generator().manual_seed(1)
    return torch.randn((2, 3, 8, 8) if hasattr(model, "conv1") else (3, 8), generator=generator)


def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """What the model answers: its logits, or its plain output."""
    x = inputs(model) if x is None else x
    if x.is_floating_point():
        return model(x.to(next(model.parameters()).dtype))
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=x, decoder_input_ids=x).logits
    return model(input_ids=x)[0]


def error(a: Tensor, b: Tensor) -> float:
    """`‖a − b‖ / ‖b‖`."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Move every trainable parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=std)
    return model


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember a model; the function returned asserts that it is as it was, bit for bit."""
    modules = {name: id(m) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        before = output(model)

    def check() -> None:
        assert {name: id(m) for name, m in model.named_modules()} == modules
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(output(model), before)

    return check


@contextmanager
def base_biases_stay(expected: bool) -> Iterator[None]:
    """Disabling an adapter that trained the base's biases warns that these stay."""
    if not expected:
        yield
        return
    with pytest.warns(UserWarning, match="biases of the base model, which stay"):
        yield
