"""Files of adapters on experts: peft's, of the versions that lay tensors out in different ways, and ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import halotune
from halotune import HalotuneError, HRAConfig, LoraConfig
from halotune.core.errors import AdapterFileError

from .make_fixtures import CASES, Model
from .test_laws import adapted, error
from .toys import block, on_experts, sample, shake

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ("0.18.1", "0.21.2")


def model_of(name: str) -> Any:
    """The model that a fixture was made on, with what transformers says of its experts."""
    torch.manual_seed(0)
    model = Model(*CASES[name])
    vars(model.experts).update(has_gate=True, has_bias=False, is_concatenated=True, config=SimpleNamespace())
    return model


def deltas(model: Any, folder: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What a saved adapter adds to the weights."""
    before = {n: p.detach().clone() for n, p in model.experts.named_parameters()}
    merged: Any = halotune.PeftModel.from_pretrained(model, folder, **kwargs).merge_and_unload()
    return {n: p.detach() - before[n] for n, p in merged.experts.named_parameters()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_file_of_pefts_adds_what_it_added_in_peft(name, version, tmp_path):
    folder = FIXTURES / f"peft_{version}_{name}"
    due = load_file(folder / "deltas.safetensors")
    got = deltas(model_of(name), folder)
    assert got.keys() == due.keys()
    for n, t in due.items():
        torch.testing.assert_close(got[n], t, atol=2e-6, rtol=1e-5)
    halotune.PeftModel.from_pretrained(model_of(name), folder).save_pretrained(tmp_path)
    again = deltas(model_of(name), tmp_path)
    for n, t in due.items():
        torch.testing.assert_close(again[n], t, atol=2e-6, rtol=1e-5)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == "0.19.0"
    if version != "0.18.1" or name == "transposed":  # there they agree, and the file is the same again
        theirs = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == theirs.keys()
        assert all(torch.equal(saved[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", CASES)
def test_both_versions_hold_the_same_numbers_that_mean_different_deltas(name):
    """Of weights stored (E, out, in); else there would be nothing to tell apart."""
    old, new = (FIXTURES / f"peft_{v}_{name}" for v in VERSIONS)
    sizes = [{k: t.shape for k, t in load_file(f / "adapter_model.safetensors").items()} for f in (old, new)]
    assert (sizes[0] == sizes[1]) is (name != "wide")
    differ = [
        not torch.allclose(a, b)
        for a, b in zip(*(load_file(f / "deltas.safetensors").values() for f in (old, new)), strict=True)
    ]
    assert all(differ) is (name != "transposed")


def test_the_layout_of_pefts_file():
    """Row e·r + j of A is row j of expert e's, column j·E + e of B is its column j."""
    folder = FIXTURES / "peft_0.21.2_wide"
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.experts.lora_{m}.weight"] for m in "AB")  # the last weight is outermost
    delta = load_file(folder / "deltas.safetensors")["down_proj"]
    for e in range(3):
        own = sum(torch.outer(B[:, j * 3 + e], A[e * 2 + j]) for j in range(2)) * 3 / 2
        torch.testing.assert_close(delta[e], own, atol=2e-6, rtol=1e-5)


def edited(folder: Path, to: Path, **entries: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    config.update(entries)
    (to / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return to


def test_a_file_that_may_be_of_either_form_is_refused(tmp_path):
    for i, version in enumerate(VERSIONS):
        folder = edited(FIXTURES / f"peft_{version}_square", tmp_path / str(i), peft_version="gone")
        with pytest.raises(AdapterFileError, match=r"square.*peft_version"):
            deltas(model_of("square"), folder)
        folder = edited(FIXTURES / f"peft_{version}_wide", tmp_path / f"wide{i}", peft_version="gone")
        due = load_file(folder / "deltas.safetensors")
        assert all(error(t, due[n]) < 1e-5 for n, t in deltas(model_of("wide"), folder).items())  # its sizes tell


def test_files_for_other_experts_are_refused():
    with pytest.raises(AdapterFileError, match=r"expected lora_A \(3·r, 5\)"):
        deltas(model_of("square"), FIXTURES / "peft_0.21.2_wide")
    with pytest.raises(AdapterFileError, match=r"expected lora_A \(…, "):
        deltas(model_of("transposed"), FIXTURES / "peft_0.18.1_wide")
    model = model_of("wide")
    model.experts.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4))
    with pytest.raises(AdapterFileError, match=r"expected \(2, 2, 4\), found \(2, 3, 4\)"):
        deltas(model, FIXTURES / "peft_0.21.2_wide")


def test_peft_reads_what_is_saved_and_exported(tmp_path):
    peft = pytest.importorskip("peft")
    for i, config in enumerate((LoraConfig(r=3, lora_alpha=5), HRAConfig(r=4), LoraConfig(r=2))):
        model = adapted(config, "interleaved", shared=i == 2, dtype=torch.float32)
        x = sample(dtype=torch.float32)
        torch.manual_seed(7)
        folder = tmp_path / str(i)
        report = model.export("lora", folder)
        assert report.exact
        plain = model.get_base_model()
        y = model(x)
        base = block("interleaved", dtype=torch.float32)
        base.load_state_dict({k.replace(".base_layer", ""): t for k, t in plain.state_dict().items() if ".adapters." not in k})
        base.config = {"model_type": "toy"}  # peft looks for entries
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        assert error(theirs(x), y) < 1e-5
        if i == 0:
            model.save_pretrained(tmp_path / "saved")
            theirs.unload()
            assert error(peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()(x), y) < 1e-5


def test_full_rank_deltas_are_exported_truncated():
    model = adapted(halotune.BoneConfig(r=3, init_weights="bat"))
    with pytest.raises(HalotuneError, match="full rank"):
        model.export("lora", "nowhere")


def test_other_runtimes_refuse_experts_by_name(tmp_path):
    model = adapted(HRAConfig(r=2))
    for runtime in ("vllm", "llama.cpp", "diffusers"):
        with pytest.raises(HalotuneError, match=r"(?s)fused experts.*experts\.gate_up_proj|component"):
            model.export("lora", tmp_path, runtime=runtime)


def test_a_state_dict_of_either_form_is_taken():
    model = adapted(LoraConfig(r=3))
    x = sample()
    y = model(x)
    written = {k: t.clone() for k, t in halotune.get_peft_model_state_dict(model).items()}
    assert {k.rpartition(".lora_")[0] for k in written} == {
        "base_model.model.experts.base_layer",
        "base_model.model.experts",
    }
    ours = {
        n.replace(".default", "").replace(".adapters", ""): p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" in n
    }
    for given in (written, ours):
        shake(model)
        assert error(model(x), y) > 1e-3
        halotune.set_peft_model_state_dict(model, given)
        assert torch.equal(model(x), y)


def test_an_adapter_given_by_the_keys_of_a_state_dict(tmp_path):
    model = adapted(HRAConfig(r=4))
    tensors = halotune.get_peft_model_state_dict(model)
    twin = halotune.inject_adapter_in_model(HRAConfig(r=4), block(), state_dict=tensors)
    assert {n for n, _ in twin.named_parameters() if "hra_u" in n} == {
        f"experts.{n}.adapters.default.hra_u" for n in ("gate_up_proj", "down_proj")
    }
    assert on_experts(HRAConfig(r=4)).target_parameters == twin.peft_config["default"].target_parameters


def test_lycoris_has_no_experts(tmp_path):
    model = adapted(LoraConfig(r=3))
    with pytest.raises(HalotuneError, match="no adapters on fused experts"):
        halotune.save_lycoris(model, tmp_path / "file.safetensors")


def test_every_expert_is_inspected():
    from halotune.inspect.figures import measure_model

    model = adapted(HRAConfig(r=4))
    figures = {f.path: f for f in measure_model(model)}
    assert set(figures) == {f"experts.{n}[{e}]" for n in ("gate_up_proj", "down_proj") for e in range(5)}
    layer = model.get_base_model().experts.down_proj
    W = layer.base.weight()
    delta = (layer.adapters["default"].weight(W) - W).detach()
    assert figures["experts.down_proj[3]"].delta_norm == pytest.approx(float(delta[3].norm()), rel=1e-9)


def test_dependent_vectors_of_any_expert_are_told_of():
    model = adapted(on_experts(HRAConfig(r=3, apply_GS=True, init_weights=False)))
    tensors = halotune.get_peft_model_state_dict(model)
    halotune.set_peft_model_state_dict(model, tensors)  # in silence
    next(iter(tensors.values()))[2] = 1
    with pytest.warns(UserWarning, match="linearly dependent"):
        halotune.set_peft_model_state_dict(model, tensors)
