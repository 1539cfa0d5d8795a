"""Every rule of every program: an adapter that keeps all, and one that breaks each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halotune import AdapterFileError, BoneConfig, HalotuneError, HRAConfig, LoHaConfig, get_peft_model
from halotune.export import RULES, RUNTIMES, check

from ..interop.models import FIXTURES
from ..several.models import randomized

FOLDERS = [name for name in RULES if RUNTIMES[name].folder]
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


class Adapter:
    """A good adapter's files, to be spoiled."""

    def __init__(self, folder: Path, runtime: str, component: str = "transformer") -> None:
        self.folder, self.runtime = folder, runtime
        stack = {"q_proj": torch.nn.Linear(6, 8), "v_proj": torch.nn.Linear(6, 8)}
        model = get_peft_model(torch.nn.ModuleDict(stack), BoneConfig(r=2, target_modules=list(stack)))
        randomized(model).export("lora", folder, runtime=runtime, component=component)
        self.weights = folder / RUNTIMES[runtime].file
        self.config = folder / "adapter_config.json"

    def spoil(self, change: Change) -> None:
        entries = json.loads(self.config.read_text()) if self.config.exists() else {}
        tensors = load_file(self.weights)
        change(entries, tensors)
        save_file(tensors, self.weights)  # without a header, too
        if self.config.exists():
            self.config.write_text(json.dumps(entries))

    def broken(self) -> set[str]:
        return {p.rule.name for p in check(self.folder, self.runtime)}


def entry(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def renamed(old: str, new: str) -> Change:
    def change(config, tensors):
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def without(part: str) -> Change:
    def change(config, tensors):
        for key in [k for k in tensors if part in k]:
            del tensors[key]

    return change


def reshaped(part: str, *size: int) -> Change:
    def change(config, tensors):
        for key in [k for k in tensors if part in k]:
            tensors[key] = torch.zeros(size)

    return change


def rank(r: int, part: str = "") -> Change:
    def change(config, tensors):
        reshaped(f"{part}.lora_A", r, 6)(config, tensors)
        reshaped(f"{part}.lora_B", 8, r)(config, tensors)
        if not part:
            config.update(r=r, lora_alpha=r)

    return change


SPOILED: dict[tuple[str, str], Change] = {
    **{(c, "lora"): entry(peft_type="MISS") for c in FOLDERS},
    **{(c, "names"): renamed(".weight", ".default.weight") for c in FOLDERS},
    **{(c, "pairs"): without("v_proj.lora_B") for c in RULES},
    **{(c, "matrices"): lambda config, tensors: tensors.update({k: t[..., None] for k, t in tensors.items()}) for c in FOLDERS},
    **{(c, "one-rank"): rank(5, "v_proj") for c in ("vllm", "sglang")},
    ("sglang", "rank-pattern"): entry(rank_pattern={"other": 3}),
    **{(c, "alpha-pattern"): entry(alpha_pattern={"v_proj": 9}) for c in ("sglang", "llama.cpp")},
    **{(c, "base-changed"): entry(init_lora_weights="pissa_niter_16") for c in FOLDERS},
    **{(c, "variant"): entry(layer_replication=[[0, 2], [1, 3]]) for c in FOLDERS},
    ("llama.cpp", "alpha"): entry(lora_alpha=0),
    ("llama.cpp", "tied-head"): renamed("q_proj", "lm_head"),
    **{(c, "rslora"): entry(use_rslora=True) for c in ("sglang", "llama.cpp")},
    **{(c, "bias"): entry(bias="lora_only") for c in FOLDERS},
    **{(c, "modules-to-save"): entry(modules_to_save=["lm_head"]) for c in FOLDERS},
    **{(c, "dora"): entry(use_dora=True) for c in FOLDERS},
    ("vllm", "rank"): rank(513),
    ("sglang", "target-names"): entry(target_modules=".*_proj"),
    ("sglang", "stacked"): without("v_proj"),
    ("llama.cpp", "conv1d"): entry(fan_in_fan_out=True),
    ("diffusers", "names"): renamed("transformer.", "base_model.model."),
    ("diffusers", "grouped-rank"): reshaped("q_proj.lora_B", 8, 1),
    ("comfyui", "names"): renamed("transformer.", "unet."),
    ("comfyui", "product"): reshaped("q_proj.lora_B", 8, 1),
    ("comfyui", "magnitude"): lambda config, tensors: tensors.update({"lora_unet_x.dora_scale": torch.ones(8, 1)}),
}
NEEDS_CONFIG = {("diffusers", "scale"), ("comfyui", "scale"), ("diffusers", "two-scales")}  # below


def test_every_rule_is_broken_somewhere():
    assert {(c, rule.name) for c, rules in RULES.items() for rule in rules} == SPOILED.keys() | NEEDS_CONFIG


@pytest.mark.parametrize("runtime", RULES)
def test_an_export_keeps_every_rule(runtime, tmp_path):
    assert Adapter(tmp_path, runtime).broken() == set()


@pytest.mark.parametrize(("runtime", "rule"), [pytest.param(*case, id="/".join(case)) for case in SPOILED])
def test_a_broken_rule_is_told(runtime, rule, tmp_path):
    """It, and no other."""
    adapter = Adapter(tmp_path, runtime)
    adapter.spoil(SPOILED[runtime, rule])
    (problem,) = [p for p in check(tmp_path, runtime) if p.rule.name == rule]
    assert adapter.broken() == {rule}
    text = str(problem)
    assert text.startswith(f"{runtime}: {rule}: {problem.rule.says} Found: {problem.found}. ")
    assert "{" not in problem.rule.remedy.format(runtime=runtime) and problem.found


@pytest.mark.parametrize("runtime", ["diffusers", "comfyui"])
@pytest.mark.parametrize("change", [entry(lora_alpha=7), entry(use_rslora=True), entry(alpha_pattern={"q_proj": 1})])
def test_a_scale_that_only_the_configuration_has_is_lost(runtime, change, tmp_path):
    """Of a folder in PEFT's format whose keys somebody renamed."""
    adapter = Adapter(tmp_path, "vllm")
    adapter.spoil(renamed("base_model.model.", "transformer."))
    assert check(tmp_path, runtime) == []
    adapter.spoil(change)
    assert [p.rule.name for p in check(tmp_path, runtime)] == ["scale"]


def test_an_alpha_of_its_own_is_a_scale(tmp_path):
    save_file(
        {
            "lora_unet_x.lora_down.weight": torch.zeros(2, 6),
            "lora_unet_x.lora_up.weight": torch.zeros(8, 2),
            "lora_unet_x.alpha": torch.tensor(1.0),
        },
        tmp_path / "kohya.safetensors",
    )
    assert check(tmp_path / "kohya.safetensors", ["comfyui", "diffusers"]) == check(tmp_path, "comfyui") == []


def test_sglangs_stacked_projections(tmp_path):
    def names(*modules: str) -> set[str]:
        tensors = {}
        for m in modules:
            tensors[f"layers.0.{m}.lora_A.weight"] = torch.zeros(2, 6)
            tensors[f"layers.0.{m}.lora_B.weight"] = torch.zeros(8, 2)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(modules)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return {p.rule.name for p in check(tmp_path, "sglang")}

    assert names("q_proj", "v_proj") == names("q_proj", "k_proj", "v_proj", "gate_proj") == names("o_proj") == set()
    assert names("kv_b_proj", "q_proj") == set()
    for lone in (["k_proj"], ["q_proj"], ["v_proj", "k_proj"], ["up_proj"]):
        assert names(*lone) == {"stacked"}


@pytest.mark.parametrize("runtime", FOLDERS)
def test_fixtures(runtime):
    """LoRAs that were checked in peft pass; other methods are told what to do."""
    assert check(FIXTURES / "lora_from_loha_linear", runtime) == []
    problems = check(FIXTURES / "hra_basic", runtime)
    assert [p.rule.name for p in problems] == ["lora", "names"]
    assert f"halotune export ADAPTER --base MODEL --to lora --for {runtime}" in str(problems[0])


def test_comfyui_reads_loha_itself():
    assert check(FIXTURES / "lycoris_loha_kohya_prefix" / "lycoris.safetensors", "comfyui") == []
    assert [p.rule.name for p in check(FIXTURES / "lycoris_loha_kohya_prefix" / "lycoris.safetensors", "diffusers")] == [
        "names"
    ]


@pytest.mark.parametrize("r", ["4", None, 0, [8]])
@pytest.mark.parametrize("runtime", RULES)
def test_damaged_files_are_told_of(r, runtime, tmp_path):
    """Rules hold of whatever there is: none of them fails."""
    tensors = {"x.lora_A.weight": torch.zeros(()), "x.lora_B.weight": torch.zeros(3), "lora_unet_y.alpha": torch.zeros(2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": "x"}))
    assert any(p.rule.name in ("lora", "names") for p in check(tmp_path, runtime))


def test_several_programs_at_once(tmp_path):
    Adapter(tmp_path, "vllm").spoil(entry(use_rslora=True))
    assert [p.runtime for p in check(tmp_path, ["vllm", "sglang", "llama.cpp"])] == ["sglang", "llama.cpp"]


def test_an_export_that_breaks_a_rule_is_not_written(tmp_path):
    model = get_peft_model(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8)}), BoneConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(HalotuneError, match=r"nothing was written\. sglang: stacked: .*q_proj without v_proj"):
        model.export("lora", tmp_path / "out", runtime="sglang")
    assert not (tmp_path / "out").exists()


def test_gpt2_goes_everywhere_but_to_llama_cpp(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = get_peft_model(torch.nn.ModuleDict({"c_attn": Conv1D(12, 4)}), HRAConfig(r=2, target_modules=["c_attn"]))
    with pytest.raises(HalotuneError, match=r"llama\.cpp cannot represent .*transposed: c_attn"):
        model.export("lora", tmp_path, runtime="llama.cpp")
    assert model.export("lora", tmp_path, runtime="vllm").rank == 8
    assert [p.rule.name for p in check(tmp_path, "llama.cpp")] == ["conv1d"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(AdapterFileError, match="no such folder or file"):
        check(tmp_path / "none", "vllm")
    with pytest.raises(AdapterFileError, match=r"holds neither adapter_model\.safetensors .* 0 other .*pickles"):
        check(tmp_path, "vllm")
    (tmp_path / "x.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(AdapterFileError, match=r"x\.safetensors: cannot be read as safetensors"):
        check(tmp_path, "vllm")
    with pytest.raises(HalotuneError, match=r"expected one of vllm, .*got 'VLLM'. Did you mean 'vllm'"):
        check(FIXTURES / "hra_basic", "VLLM")


def test_a_loha_for_vllm(tmp_path):
    model = get_peft_model(torch.nn.ModuleDict({"fc": torch.nn.Linear(30, 40)}), LoHaConfig(r=3, target_modules=["fc"]))
    assert randomized(model).export("lora", tmp_path, runtime="vllm").rank == 16
    assert check(tmp_path, list(FOLDERS)) == []
