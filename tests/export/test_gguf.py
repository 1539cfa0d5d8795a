"""GGUF LoRAs: names, order of rows, header. `.ci/clients` runs them in llama.cpp itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor, nn

from halotune import HalotuneError, HRAConfig, LoHaConfig, get_peft_model
from halotune.cli.main import main
from halotune.export.gguf import ARCHITECTURES, GGUF_NAME, gguf_lora

from ..laws.cases import relative
from ..several.models import randomized
from .test_lora import in_peft

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(kind: str = "Llama", tied: bool = False, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied, pad_token_id=0, **more
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def adapted(model: nn.Module, config: Any = None) -> Any:
    config = config or HRAConfig(r=4, target_modules=LINEAR, init_weights=False)
    return randomized(get_peft_model(model, config)).eval()


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries of the header, and the tensors in fp32 as rows and columns."""
    reader = gguf.GGUFReader(file)
    entries = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return entries, tensors


def neighbours(n: int, heads: int) -> Tensor:
    """Where llama.cpp's rows of q or k are in transformers': pair i of a head are its rows i and d/2 + i there."""
    d = n // heads
    return torch.tensor([h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in (0, 1)])


def test_a_llama(tmp_path: Path):
    """W' = W + B A of every layer, under llama.cpp's names; rows of q and k as they lie there."""
    plain = llama()
    W = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = adapted(plain)
    report = model.export("lora", tmp_path, runtime="llama.cpp", gguf=True)
    entries, tensors = read(tmp_path / GGUF_NAME)
    assert {key: v for key, v in entries.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": report.rank,
    }
    theirs = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert tensors.keys() == {f"blk.{i}.{t}.weight.lora_{f}" for i in (0, 1) for t in theirs for f in "ab"}
    merged = dict(model.merge_and_unload().named_parameters())
    for i in (0, 1):
        for own, their in zip(LINEAR, theirs, strict=True):
            part = "self_attn" if own.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) else "mlp"
            name = f"model.layers.{i}.{part}.{own}.weight"
            B, A = (tensors[f"blk.{i}.{their}.weight.lora_{f}"] for f in "ba")
            delta = merged[name].detach() - W[name]
            if own in ("q_proj", "k_proj"):
                delta = delta[neighbours(len(delta), 4 if own == "q_proj" else 2)]
            assert relative(B @ A, delta) < 1e-4, name


def test_rows_are_moved_to_where_llama_cpp_rotates_them():
    """Rotating neighbours of the moved rows is moving the rows rotated in halves."""
    heads, d = 3, 8
    x, angle = torch.randn(heads * d, dtype=torch.float64), torch.randn(d // 2, dtype=torch.float64)
    a, b = x.view(heads, 2, d // 2).unbind(1)
    halves = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1).flatten()
    a, b = x[neighbours(heads * d, heads)].view(heads, d // 2, 2).unbind(2)
    pairs = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2).flatten()
    torch.testing.assert_close(pairs, halves[neighbours(heads * d, heads)])


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Granite"])
@torch.no_grad()
def test_the_folder_beside_it_is_the_same_lora(kind: str, tmp_path: Path):
    model = adapted(llama(kind, tied=True), LoHaConfig(r=2, target_modules=LINEAR))
    model.export("lora", tmp_path, runtime="llama.cpp", gguf=True)
    entries, tensors = read(tmp_path / GGUF_NAME)
    assert entries["general.architecture"] == ARCHITECTURES[f"{kind}ForCausalLM"] and len(tensors) == 28
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    assert relative(in_peft(model.unload(), tmp_path)(ids).logits, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("fp64", "F32")])
def test_the_command(dtype: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "hra")
    flags = ["--base", tmp_path / "base", "--output", tmp_path / "out", "--for", "llama.cpp", "--gguf", "--dtype", dtype]
    assert main(["export", str(tmp_path / "hra"), *map(str, flags), "--check", "llama.cpp"]) == 0
    assert "llama.cpp: reads it" in capsys.readouterr().out
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / GGUF_NAME).tensors} == {kind}
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize("model_class", ARCHITECTURES)
def test_every_layer_of_every_architecture_has_a_name(model_class: str):
    """As installed: what these classes are made of, and what `gguf` calls it."""
    kind = getattr(transformers, model_class)
    config = kind.config_class()
    text = config.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    for name, value in {"head_dim": 8, "num_key_value_heads": 4}.items():
        setattr(text, name, getattr(text, name, None) or value)
    with torch.device("meta"):
        model = kind(config)
    tied = getattr(config, "tie_word_embeddings", False)
    others = ["vis", "multi_modal", *(["lm_head"] if tied else [])]  # a head that is the embeddings has no name
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(part in n for part in others)]
    keys = [f"base_model.model.{path}.lora_{f}.weight" for path in paths for f in "AB"]
    heads = text.num_attention_heads * text.num_key_value_heads * 2
    tensors, architecture = gguf_lora(dict.fromkeys(keys, torch.zeros(heads, 4)), model)
    assert len(tensors) == len(keys) >= 8 and architecture == ARCHITECTURES[model_class]


# -- refusals: nothing is written


def refused(model: Any, folder: Path, match: str, runtime: str = "llama.cpp") -> None:
    with pytest.raises(HalotuneError, match=match):
        model.export("lora", folder / "out", runtime=runtime, gguf=True)
    assert not (folder / "out").exists()


def test_an_architecture_that_is_not_known(tmp_path: Path):
    config = transformers.GPTNeoXConfig(**SIZES)
    model = get_peft_model(transformers.GPTNeoXForCausalLM(config), HRAConfig(r=2, target_modules=["query_key_value"]))
    refused(
        model, tmp_path, r"converts a GPTNeoXForCausalLM is not known here; known are .*LlamaForCausalLM.*convert_lora_to_gguf"
    )
    refused(
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])), tmp_path, "a Sequential is not"
    )


def test_a_module_that_llama_cpp_lacks(tmp_path: Path):
    base = llama()
    base.model.layers[0].extra = nn.Linear(4, 4)  # type: ignore[index,union-attr]
    model = get_peft_model(base, HRAConfig(r=2, target_modules=["extra", "q_proj"]))
    refused(model, tmp_path, r"llama\.cpp's llama has no model\.layers\.0\.extra\. Leave it out")


@pytest.mark.filterwarnings("ignore:.*tied|.*share:UserWarning")
def test_the_head_of_a_tied_base(tmp_path: Path):
    head = HRAConfig(r=4, target_modules=["lm_head", "q_proj"], init_weights=False)
    refused(adapted(llama(tied=True), head), tmp_path, "tied-head: .*lm_head")
    adapted(llama(), head).export("lora", tmp_path / "out", runtime="llama.cpp", gguf=True)
    assert "output.weight.lora_a" in read(tmp_path / "out" / GGUF_NAME)[1]


def test_another_runtime(tmp_path: Path):
    refused(adapted(llama()), tmp_path, r"GGUF is for llama\.cpp\..*--for llama\.cpp.*got 'vllm'", runtime="vllm")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usual = importlib.import_module

    def lacking(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(importlib, "import_module", lacking)
    refused(adapted(llama()), tmp_path, r'pip install "halotune\[gguf\]"')
