"""Small random models of the classes that the examples load, saved as the hub has them; and the examples themselves."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples"
AWAY_FROM_THE_BASE = "apply_GS=True training starts away from the pretrained function"


def example(name: str) -> dict[str, Any]:
    """What an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def run_as_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """Run an example as a user does."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def only_adapters_train(model: nn.Module) -> bool:
    names = trained(model)
    return bool(names) and all(".adapters." in name or ".modules_to_save." in name for name in names)


def starts_away() -> Any:
    """Expect the warning that Gram–Schmidt HRA gives."""
    return pytest.warns(UserWarning, match=AWAY_FROM_THE_BASE)


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time, whichever test asks first; the test's own go on where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@seeded()
def save_language_model(folder: Path, kind: str) -> Path:
    """A causal language model of six layers, with a tokenizer of the words in the examples."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        PreTrainedTokenizerFast,
    )

    texts = " ".join([*example("hra_language_model")["TEXTS"], *example("hra_two_adapters")["TEXTS"].values()])
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+", texts)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 64}
    ids = {"vocab_size": len(vocabulary), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, **ids, ffn_dim=48, word_embed_proj_dim=32))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, intermediate_size=48))
    with torch.no_grad():
        for p in model.parameters():  # far from the tiny usual start, so that adapters matter
            p.mul_(5.0) if p.dim() == 2 else None
    model.save_pretrained(folder)
    return folder


@seeded()
def save_stable_diffusion(folder: Path) -> Path:
    """A pipeline of Stable Diffusion 1.5's classes; the UNet's `proj_in` and `proj_out` are convolutions as there."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vocabulary = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokens = folder / "tokens"
    tokens.mkdir(parents=True)
    (tokens / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tokens, model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=vocabulary.index("<|startoftext|>"),
            eos_token_id=vocabulary.index("<|endoftext|>"),
        )
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut, under torchvision's names."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """A narrow ResNet-50: its blocks and the names of its modules, an eighth of its width."""

    def __init__(self, classes: int, width: int = 8, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        channels = width
        for i, n in enumerate(blocks):
            layers = []
            for j in range(n):
                layers.append(Bottleneck(channels, width * 2**i, stride=2 if i and not j else 1))
                channels = width * 2**i * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))
