"""What all tests share: a seed per test, and small models."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # tensors are tiny: a second thread only waits for the first


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """torch's seed, from the test's own name: the same alone, in any order, and on any machine."""
    value = zlib.crc32(request.node.name.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator that nothing but the test draws from."""
    return torch.Generator().manual_seed(seed)


class MLP(nn.Module):
    """Two numbered blocks of linear layers, a convolution in front, a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="mlp")
        self.stem = nn.Conv1d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 15), "down": nn.Linear(15, 6, bias=False)}) for _ in range(2)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mT
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)

    @staticmethod
    def sample() -> Tensor:
        return torch.randn(2, 3, 7)


@pytest.fixture
def mlp() -> MLP:
    return MLP()


@pytest.fixture
def language_model() -> nn.Module:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    ).eval()
