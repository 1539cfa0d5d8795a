"""Kinds of models with adapters: bases, what is adapted and trained in them, and what they are wrapped in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from halotune import get_peft_model
from halotune.core.config import CLASSES
from halotune.engine.injection.modules import innermost

from ..interop.models import randomize

WORDS, MORE = 32, 36
IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hra": ("HRA", {"r": 2, "init_weights": False}),
    "loha": ("LOHA", {"r": 2, "alpha": 3, "rank_pattern": {"q_proj": 3}}),
    "bone": ("BONE", {"r": 4}),
    "bat": ("BONE", {"r": 4, "init_weights": "bat"}),
    "miss": ("MISS", {"r": 3}),
    "oft": ("OFT", {"oft_block_size": 4}),
    "lora": ("LORA", {"r": 2, "use_rslora": True}),
}


def config(method: str, **kwargs: Any) -> Any:
    name, own = METHODS[method]
    return CLASSES[name](**{**own, **kwargs})


# -- bases: the same weights for the same seed, and other ones where a fresh process would draw them anew


def llama(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **kwargs}))


def with_head(make: Callable[[], nn.Module], head: str) -> Callable[[int], nn.Module]:
    """A model whose head is drawn anew for each seed, as `from_pretrained` draws it."""

    def base(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if head in name:
                    p.normal_()
        return model

    return base


def resized(make: Callable[[], Any]) -> Callable[[int], nn.Module]:
    """A model from a folder of its own whose vocabulary got words, drawn anew for each seed."""

    @cache
    def stored() -> str:
        folder = mkdtemp(prefix="halotune")
        torch.manual_seed(0)
        make().save_pretrained(folder)
        return folder

    def base(seed: int) -> nn.Module:
        model = type(make()).from_pretrained(stored())
        torch.manual_seed(seed)
        model.resize_token_embeddings(MORE, mean_resizing=False)
        return model

    return base


def bart() -> nn.Module:
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 11}
    return transformers.BartForSequenceClassification(transformers.BartConfig(vocab_size=WORDS, d_model=16, **sizes, **heads))


def bert() -> nn.Module:
    return transformers.BertForTokenClassification(transformers.BertConfig(**SIZES))


def t5(seed: int = 0, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=tied))


def llava() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**LLAMA),
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
            image_token_index=WORDS - 1,
        )
    )


class Layers(nn.Module):
    """Attention of torch's own, a shared layer, a grouped convolution, and a normalisation with a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        x = self.again(torch.tanh(self.first(x)))
        return self.head(self.conv(x.mT).mean(-1))


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return Layers()


# -- kinds


def in_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def layer_by_layer(model: Any) -> nn.Module:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        base: seed -> the base model.
        options: of the configuration.
        before, after: what is put around the base, and around the model with adapters.
        second: the targets of a second adapter.
    """

    base: Callable[[int], nn.Module]
    options: dict[str, Any]
    before: Callable[[nn.Module], nn.Module] = staticmethod(lambda model: model)
    after: Callable[[nn.Module], nn.Module] = staticmethod(lambda model: model)
    second: list[str] = field(default_factory=list)

    def wrapped(self, method: str) -> nn.Module:
        """A trained model, in whatever is around it."""
        model = get_peft_model(self.before(self.base(0)), config(method, **self.options))
        if self.second:
            model.add_adapter("second", config(method, target_modules=self.second))
            model.set_adapter(["default", "second"])
        return self.after(randomize(model).eval())


QV = ["q_proj", "v_proj"]
KINDS = {
    "llama": Kind(llama, {"target_modules": QV, "task_type": "CAUSAL_LM"}),
    "all-linear": Kind(llama, {"target_modules": "all-linear", "layers_to_transform": None}),
    "one-layer": Kind(llama, {"target_modules": QV, "layers_to_transform": [1]}),
    "tied": Kind(lambda seed: llama(tie_word_embeddings=True), {"target_modules": [*QV, "lm_head"]}),
    "tied-head-whole": Kind(
        lambda seed: llama(tie_word_embeddings=True), {"target_modules": QV, "modules_to_save": ["lm_head"]}
    ),
    "tied-embeddings-whole": Kind(
        lambda seed: llama(tie_word_embeddings=True), {"target_modules": QV, "modules_to_save": ["embed_tokens"]}
    ),
    "resized": Kind(resized(llama), {"target_modules": QV}),
    "resized-tied": Kind(resized(lambda: llama(tie_word_embeddings=True)), {"target_modules": QV}),
    "resized-whole": Kind(resized(llama), {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "vision-language": Kind(resized(llava), {"target_modules": r".*language_model.*\.q_proj"}),
    "other-head": Kind(with_head(bart, "classification_head"), {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "tagger": Kind(with_head(bert, "classifier"), {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "seq2seq": Kind(t5, {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "seq2seq-head-whole": Kind(t5, {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}),
    "compiled": Kind(llama, {"target_modules": QV}, before=compiled),
    "compiled-all-linear": Kind(llama, {"target_modules": "all-linear"}, before=layer_by_layer),
    "compiled-after": Kind(llama, {"target_modules": QV, "modules_to_save": ["norm"]}, after=compiled),
    "parallel": Kind(llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}, after=in_parallel),
    "parallel-before": Kind(llama, {"target_modules": QV}, before=in_parallel),
    "compiled-parallel": Kind(llama, {"target_modules": QV}, after=lambda model: compiled(in_parallel(model))),
    "two": Kind(llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}, second=["q_proj", "up_proj"]),
    "layers": Kind(layers, {"target_modules": ["attention", "first", "conv"], "modules_to_save": ["head"]}),
}


def output(model: nn.Module) -> Tensor:
    base = innermost(model)
    with torch.no_grad():
        if isinstance(base, Layers):
            return model(torch.linspace(-1, 1, 160).reshape(2, 5, 16))
        more = {"decoder_input_ids": IDS} if isinstance(base, transformers.T5ForConditionalGeneration) else {}
        return model(input_ids=IDS[:1] if isinstance(base, transformers.BartForSequenceClassification) else IDS, **more)[0]
