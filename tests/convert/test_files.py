"""Names, errors, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halotune
from halotune import AdapterFileError, HalotuneError, LoHaConfig, LoraConfig, PeftModel, convert_adapter, get_peft_model
from halotune.cli.main import main
from halotune.convert import loading
from halotune.core.config import AdapterConfig
from halotune.engine.files.state_dict import read_metadata

from ..interop.models import MLP, base, error, output
from .models import FIXTURES, Layers, randomize, same

LLAMA, BASE = FIXTURES / "lycoris_loha_llama" / "lycoris.safetensors", FIXTURES / "base_llama"
KOHYA = FIXTURES / "lycoris_loha_kohya_prefix" / "lycoris.safetensors"


def lycoris_file(file: Path, *, prefix: str = "lycoris", dtype: torch.dtype = torch.float32, **config) -> Path:
    """A trained LoHa on every layer of `Layers`, as LyCORIS stores it."""
    entries = {"r": 3, "target_modules": r".*(conv_in|down\.\d|time|to_q|proj)", **config}
    halotune.save_lycoris(randomize(get_peft_model(Layers(), LoHaConfig(**entries))), file, prefix=prefix, dtype=dtype)
    return file


def rewrite(file: Path, change) -> Path:
    """The file with other tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


# -- what lycoris-lora wrote


@pytest.mark.parametrize("source", [LLAMA, KOHYA], ids=lambda f: f.parent.name)
def test_fixtures_compute_the_same_and_come_back(source: Path, tmp_path: Path) -> None:
    io = load_file(source.parent / "io.safetensors")
    model = halotune.load_lycoris(base("llama"), source, is_trainable=True)
    found = output(model, io["input_ids"])
    assert error(found, io["expected"]) < 1e-5
    found.square().mean().backward()
    prefix = next(iter(load_file(source))).split("_model_")[0]
    theirs = {key.removeprefix("grad::"): t for key, t in io.items() if key.startswith("grad::")}
    mine = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in mine.items():
        path, leaf = name.split(".adapters.default.")
        assert error(grad, theirs.pop(f"{prefix}_{path.replace('.', '_')}.{leaf}")) < 1e-5
    assert not theirs

    to = "kohya" if source is KOHYA else "lycoris"
    convert_adapter(source, tmp_path / "peft", "peft", base=BASE)
    convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", to, prefix=prefix)
    assert same(tmp_path / "out.safetensors", source)
    assert read_metadata(tmp_path / "out.safetensors") == read_metadata(source)
    assert error(output(PeftModel.from_pretrained(base("llama"), tmp_path / "peft"), io["input_ids"]), io["expected"]) < 1e-5
    convert_adapter(source, tmp_path / "renamed.safetensors", "lycoris", base=BASE)
    assert all(key.startswith("lycoris_model_layers_") for key in load_file(tmp_path / "renamed.safetensors"))


# -- ours, there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"alpha": 0.1},
        {"alpha": 7, "rank_pattern": {"time": 2, r"block_0\.proj": 4}, "alpha_pattern": {"conv_in": 3, "to_q": 3}},
        {"use_effective_conv2d": True, "rank_pattern": {"^proj": 5}},
        {"weight_decompose": True, "wd_on_out": False},
        {"use_rslora": True},
        {"use_scalar": True},
    ],
    ids=str,
)
def test_ours_come_back(config: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    entries = {"r": 3, "target_modules": ["conv_in", "0", "1", "2", "time", "to_q", "proj"], **config}
    model, x = randomize(get_peft_model(Layers(), LoHaConfig(**entries))).to(dtype), Layers.sample().to(dtype)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path / "ours")
    halotune.save_lycoris(model, tmp_path / "theirs.safetensors")
    if "use_effective_conv2d" not in config:  # nothing that needs the base
        convert_adapter(tmp_path / "ours", tmp_path / "same.safetensors", "lycoris")
        assert same(tmp_path / "same.safetensors", tmp_path / "theirs.safetensors")
    again = halotune.load_lycoris(model.unload(), tmp_path / "theirs.safetensors").eval()
    if config.keys() & {"use_rslora", "use_scalar"}:  # said otherwise there: alpha √r, and in hada_w1_a
        assert error(again(x), expected) < 4 * torch.finfo(dtype).eps
        return
    assert torch.equal(again(x), expected)
    again.to(dtype).save_pretrained(tmp_path / "again")
    assert same(tmp_path / "again" / "adapter_model.safetensors", tmp_path / "ours" / "adapter_model.safetensors")
    old, new = (AdapterConfig.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    for path, module in Layers().named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            assert (old.at(path).r, old.at(path).alpha) == (new.at(path).r, new.at(path).alpha)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bone_basic", "bone_bat", "miss_balance", "miss_bat", "miss_remainder", "miss_bias_only"])
def test_bone_and_miss_are_two_names(name: str, tmp_path: Path) -> None:
    there, back = ("miss", "bone") if name.startswith("bone") else ("bone", "miss")
    found = convert_adapter(FIXTURES / name, tmp_path / there, there)
    assert found.source == "PEFT" and found.written == [tmp_path / there]
    assert AdapterConfig.from_pretrained(tmp_path / there).peft_type.value == there.upper()  # type: ignore[union-attr]
    ours, theirs = (PeftModel.from_pretrained(base("llama"), f).eval() for f in (tmp_path / there, FIXTURES / name))
    assert torch.equal(output(ours), output(theirs))
    convert_adapter(tmp_path / there, tmp_path / there, back)  # in its place
    assert same(tmp_path / there / "adapter_model.safetensors", FIXTURES / name / "adapter_model.safetensors")
    entries, before = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / there, FIXTURES / name))
    assert {k: v for k, v in entries.items() if k != "target_modules" and v != before.get(k)} == {}


def test_mini_stays_miss(tmp_path: Path) -> None:
    convert_adapter(FIXTURES / "miss_mini", tmp_path / "miss", "miss")
    assert same(tmp_path / "miss" / "adapter_model.safetensors", FIXTURES / "miss_mini" / "adapter_model.safetensors")
    with pytest.raises(HalotuneError, match=r"mini.* has no form in Bone"):
        convert_adapter(FIXTURES / "miss_mini", tmp_path / "bone", "bone")
    assert not (tmp_path / "bone").exists()


# -- names


class Ambiguous(nn.Module):
    """Two paths that are one name with `_` for `.`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 6)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, width)})


def test_a_name_of_two_layers_is_told_by_shape_or_refused(tmp_path: Path) -> None:
    model = get_peft_model(Ambiguous(5), LoHaConfig(r=2, target_modules=["c"]))
    halotune.save_lycoris(model, str(tmp_path / "one.safetensors"))
    found = halotune.load_lycoris(Ambiguous(5), str(tmp_path / "one.safetensors"))
    assert found.active_peft_config.target_modules == {"c"}
    with pytest.raises(AdapterFileError, match=r"lycoris_a_b_c: may mean a\.b_c and a_b\.c"):
        halotune.load_lycoris(Ambiguous(6), tmp_path / "one.safetensors")
    with pytest.raises(AdapterFileError, match=r"lycoris_a_b_c: may mean a\.b_c and a_b\.c"):  # and nobody writes it
        halotune.save_lycoris(get_peft_model(Ambiguous(6), LoHaConfig(r=2, target_modules=["c"])), tmp_path / "six.safetensors")
    assert not (tmp_path / "six.safetensors").exists()
    both = get_peft_model(Ambiguous(5), LoHaConfig(r=2, target_modules=["c", "b_c"]))
    with pytest.raises(HalotuneError, match="two modules get this name"):
        halotune.save_lycoris(both, tmp_path / "two.safetensors")


def test_a_prefix_of_ones_own(tmp_path: Path) -> None:
    file = lycoris_file(tmp_path / "own.safetensors", prefix="mine")
    with pytest.raises(AdapterFileError, match="none of its 8 modules is a layer of the Layers"):
        halotune.load_lycoris(Layers(), file)
    model = halotune.load_lycoris(Layers(), file, prefix="mine")
    halotune.save_lycoris(model, tmp_path / "again.safetensors", prefix="mine")
    assert same(tmp_path / "again.safetensors", file)
    with pytest.raises(AdapterFileError, match="no key begins with yours_; found: lycoris"):
        halotune.load_lycoris(Layers(), rename(file, "mine", "lycoris"), prefix="yours")


def rename(file: Path, old: str, new: str) -> Path:
    save_file({key.replace(old, new, 1): t for key, t in load_file(file).items()}, file)
    return file


def test_names_with_dots_are_read(tmp_path: Path) -> None:
    file, x = lycoris_file(tmp_path / "in.safetensors"), Layers.sample()
    model = halotune.load_lycoris(Layers(), file)
    expected = model(x)
    paths = {n.replace(".", "_"): n for n, _ in Layers().named_modules()}
    tensors = {}
    for key, t in load_file(file).items():
        name, leaf = key.removeprefix("lycoris_").split(".")
        tensors[f"diffusion_model.{paths[name]}.{leaf}"] = t
    save_file(tensors, tmp_path / "dots.safetensors")
    assert torch.equal(halotune.load_lycoris(model.unload(), tmp_path / "dots.safetensors")(x), expected)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_projections_of_attention_come_back(tmp_path: Path) -> None:
    model, x = randomize(get_peft_model(Attending(), LoHaConfig(r=2, target_modules=["attn"]))), torch.randn(2, 3, 6)
    halotune.save_lycoris(model, tmp_path / "out.safetensors")
    assert {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {
        "lycoris_attn_in_proj",
        "lycoris_attn_out_proj",
    }
    expected = model(x)
    again = halotune.load_lycoris(model.unload(), tmp_path / "out.safetensors", is_trainable=True)
    torch.testing.assert_close(again(x), expected)


def test_alpha_absent_or_zero_is_r(tmp_path: Path) -> None:
    file, x, plain = lycoris_file(tmp_path / "in.safetensors", alpha=3), Layers.sample(), Layers()
    outputs = []
    for change in (lambda t: None, lambda t: [t.pop(k) for k in list(t) if k.endswith(".alpha")]):
        model = halotune.load_lycoris(plain, rewrite(file, change))
        outputs.append(model(x))
        plain = model.unload()
    zero = lycoris_file(tmp_path / "zero.safetensors", alpha=2)
    rewrite(zero, lambda t: t.update({k: torch.zeros(()) for k in t if k.endswith(".alpha")}))
    assert torch.equal(*outputs) and halotune.load_lycoris(plain, zero).active_peft_config.alpha == 3  # type: ignore[attr-defined]


def test_scalar_of_old_files_is_read_and_written_into_the_factor(tmp_path: Path) -> None:
    file, x, plain = lycoris_file(tmp_path / "in.safetensors"), Layers.sample(), Layers()
    rewrite(file, lambda t: t.update({k.replace("alpha", "scalar"): torch.tensor(0.5) for k in list(t) if k.endswith("alpha")}))
    model = halotune.load_lycoris(plain, file, is_trainable=True)
    expected = model(x)
    assert model.active_peft_config.use_scalar  # type: ignore[attr-defined]
    halotune.save_lycoris(model, tmp_path / "out.safetensors")
    assert not any("scalar" in key for key in load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(halotune.load_lycoris(model.unload(), tmp_path / "out.safetensors")(x), expected)


def test_a_model_that_is_no_peft_model(tmp_path: Path) -> None:
    """A tuner's model, and a plain one that an adapter was put into."""
    config = LoHaConfig(r=2, target_modules=["proj", "to_q"])
    keys = {f"lycoris_{name}" for name in ("proj", "block_0_proj", "block_0_to_q")}
    for i, model in enumerate(
        (halotune.LoHaModel(Layers(), config, "default"), halotune.inject_adapter_in_model(config, Layers()))
    ):
        halotune.save_lycoris(model, tmp_path / f"{i}.safetensors")
        assert {key.split(".")[0] for key in load_file(tmp_path / f"{i}.safetensors")} == keys


def test_one_adapter_more(tmp_path: Path) -> None:
    first, second = (lycoris_file(tmp_path / f"{n}.safetensors") for n in "ab")
    model, x = halotune.load_lycoris(Layers(), first), Layers.sample()
    before = model(x)
    assert halotune.load_lycoris(model, second, "second") is model
    assert torch.equal(model(x), before)
    model.set_adapter("second")
    assert not torch.equal(model(x), before)
    halotune.save_lycoris(model, tmp_path / "c.safetensors", "second")
    assert same(tmp_path / "c.safetensors", second)


# -- errors


def drop(ending: str):
    return lambda t: [t.pop(k) for k in list(t) if k.endswith(ending)]


BROKEN = {
    "lacking": (drop("time.hada_w2_b"), r"lycoris_time: a module of LOHA lacks hada_w2_b"),
    "norms": (lambda t: t.update({"lycoris_norm.w_norm": torch.zeros(2)}), r"lycoris_norm\.w_norm: expected .* found .*w_norm"),
    "lokr": (lambda t: t.update({"lycoris_time.lokr_w1": torch.zeros(2, 2)}), r"found tensors named .*lokr_w1"),
    "mixed": (
        lambda t: t.update(
            {"lycoris_proj.lora_up.weight": torch.zeros(5, 1), "lycoris_proj.lora_down.weight": torch.zeros(1, 6)}
        ),
        r"expected modules of one method .* found",
    ),
    "nothing": (lambda t: (t.clear(), t.update({"weight": torch.zeros(2)})), r"weight: expected modules of one method"),
    "size": (lambda t: t.update({"lycoris_time.hada_w1_a": torch.zeros(7, 3)}), r"hada_w1_a: expected \(6, 3\) for time"),
    "settings": (
        lambda t: t.update({"lycoris_time.dora_scale": torch.ones(6, 1, 1)}),
        r"differ in weight_decompose: True for time \(1 modules\), False for the other 7",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(kind: str, tmp_path: Path) -> None:
    change, message = BROKEN[kind]
    file = rewrite(lycoris_file(tmp_path / "in.safetensors"), change)
    plain = Layers()
    names = [n for n, _ in plain.named_modules()]
    with pytest.raises(AdapterFileError, match=message) as caught:
        halotune.load_lycoris(plain, file)
    assert str(file) in str(caught.value)
    assert [n for n, _ in plain.named_modules()] == names


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    file = rewrite(lycoris_file(tmp_path / "in.safetensors"), lambda t: t["lycoris_time.hada_w1_a"].fill_(torch.nan))
    plain = Layers()
    with pytest.raises(AdapterFileError, match="not finite"):
        halotune.load_lycoris(plain, file)
    assert all(p.requires_grad for p in plain.parameters())


def test_modules_without_a_layer_are_named(tmp_path: Path) -> None:
    file = rename(lycoris_file(tmp_path / "in.safetensors"), "lycoris_time", "lycoris_tmie")
    with pytest.warns(UserWarning, match=r"left out are 1 modules that the base has no layer for \(lycoris_tmie\)"):
        model = halotune.load_lycoris(Layers(), file)
    assert "time" not in model.active_peft_config.target_modules  # type: ignore[operator]


def test_a_file_for_another_model(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"none of its 6 modules is a layer of the Layers, which has 8, for example"):
        halotune.load_lycoris(Layers(), LLAMA)


def test_methods_that_lycoris_lacks(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="LyCORIS has no HRA as it is here; its files hold LOHA, LORA"):
        convert_adapter(FIXTURES / "hra_basic", tmp_path / "out.safetensors", "lycoris")


def test_what_a_lycoris_file_cannot_hold(tmp_path: Path) -> None:
    config = LoHaConfig(r=2, target_modules=["to_q"], modules_to_save=["time"])
    get_peft_model(Layers(), config).save_pretrained(tmp_path / "whole")
    with pytest.raises(HalotuneError, match=r"time\.(weight|bias): LyCORIS files hold adapters alone"):
        convert_adapter(tmp_path / "whole", tmp_path / "out.safetensors", "lycoris")


def test_a_core_needs_the_base_model(tmp_path: Path) -> None:
    config = LoHaConfig(r=2, target_modules=["time"], use_effective_conv2d=True)
    get_peft_model(Layers(), config).save_pretrained(tmp_path / "ours")
    with pytest.raises(HalotuneError, match=r"time: a core of shape \(2, 2, 3, 1\) may be .* Conv1d .* Give the base"):
        convert_adapter(tmp_path / "ours", tmp_path / "out.safetensors", "lycoris")


@pytest.mark.parametrize(
    ("source", "to", "base", "message"),
    [
        (LLAMA, "peft", None, r"looked up in the base model. Give base \(--base\)"),
        (LLAMA, "peft", FIXTURES / "hra_basic", "neither model_index.json .* nor config.json"),
        ("nowhere.safetensors", "peft", BASE, "there is no such file"),
        ("no/where/at/all", "peft", BASE, "there is no such folder"),
        (FIXTURES / "hra_basic", "miss", None, "a HRA adapter cannot be written as MISS.*: HRA"),
        (FIXTURES / "loha_linear", "kohia", None, "to: expected one of peft, bone, miss, lycoris, kohya; got 'kohia'"),
    ],
    ids=str,
)
def test_mistakes(source, to, base, message, tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match=message):
        convert_adapter(source, tmp_path / "out", to, base=base)
    assert not (tmp_path / "out").exists()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({"lycoris_time.hada_w1_a": torch.zeros(1)}, tmp_path / "in.pt")
    with pytest.raises(AdapterFileError, match=r"A pickle .* can run code"):
        convert_adapter(tmp_path / "in.pt", tmp_path / "out", "peft", base=BASE)


def test_a_lycoris_file_is_one_file(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match=r"ends in \.safetensors"):
        convert_adapter(FIXTURES / "loha_linear", tmp_path, "lycoris")


def test_from_pretrained_tells_what_to_do_with_such_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"is a file.*load_lycoris"):
        PeftModel.from_pretrained(base("llama"), LLAMA)
    with pytest.raises(
        AdapterFileError, match=r"lycoris\.safetensors: a LyCORIS or kohya file.*load_lycoris.*halotune convert"
    ):
        PeftModel.from_pretrained(base("llama"), LLAMA.parent)
    shutil.copy(LLAMA, tmp_path / "adapter_model.safetensors")
    LoHaConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"kohya and LyCORIS.*halotune convert FILE.*load_lycoris"):
        PeftModel.from_pretrained(base("llama"), tmp_path)
    found = convert_adapter(tmp_path, tmp_path / "out", "peft", base=BASE)  # recognised all the same
    assert found.source == "LyCORIS (lycoris)"


# -- the command line


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(LLAMA), "--to", "peft", "--base", str(BASE), "--output", str(tmp_path / "peft")]) == 0
    shown = capsys.readouterr().out
    assert "found    LyCORIS (lycoris)" in shown and "LOHA, 6 modules, r = 3; alpha = 6" in shown
    assert f"written  {tmp_path / 'peft'}" in shown
    assert main(["convert", str(tmp_path / "peft"), "--to", "lycoris", "--output", str(tmp_path / "o.safetensors")]) == 0
    assert same(tmp_path / "o.safetensors", LLAMA)
    assert not list(tmp_path.glob("**/*.tmp"))


def test_command_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(KOHYA)
    tensors.update({k.replace("lora_unet_model", "lora_te_text"): t.clone() for k, t in tensors.items()})
    save_file(tensors, tmp_path / "in.safetensors")
    assert (
        main(["convert", str(tmp_path / "in.safetensors"), "--to", "peft", "--base", str(BASE), "--output", str(tmp_path)]) == 0
    )
    assert "left out 4 modules under lora_te" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "peft"], "--base"),
        (["--to", "miss", "--base", str(BASE)], "a LOHA adapter cannot be written as MISS"),
        (["--to", "kohia"], "to: expected one of peft"),
    ],
    ids=str,
)
def test_command_line_mistakes(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(LLAMA), "--output", str(tmp_path / "out"), *flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()


# -- alpha 0


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=2, alpha=0, target_modules=["0"]), LoraConfig(r=2, lora_alpha=0, target_modules=["0"])]
)
def test_an_adapter_of_alpha_0_has_no_effect_after_a_round_trip(config, tmp_path) -> None:
    model = randomize(halotune.get_peft_model(MLP(), config))
    file = tmp_path / "adapter.safetensors"
    halotune.save_lycoris(model, file)
    plain = model.unload()
    x = torch.randn(3, 8)
    y = plain(x)
    assert torch.equal(halotune.load_lycoris(plain, file)(x), y)


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Ambiguous(5), LoHaConfig(r=2, target_modules=["c"]))
    write = loading.write

    def one_tensor_less(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tensors = write(*args, **kwargs)
        return {key: t for key, t in tensors.items() if not key.endswith("hada_w2_b")}

    monkeypatch.setattr(loading, "write", one_tensor_less)
    with pytest.raises(AdapterFileError, match="hada_w2_b"):
        halotune.save_lycoris(model, tmp_path / "less.safetensors")
    assert not list(tmp_path.iterdir())
