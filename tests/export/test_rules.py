"""Every rule of every program: an adapter that keeps all, and one that breaks each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halotune import AdapterFileError, BoneConfig, HalotuneError, HRAConfig, LoHaConfig, get_peft_model, save_lycoris
from halotune.cli.main import main
from halotune.engine.injection.modules import adapted_layers
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


def comfyuis_decomposition(W: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Along the outputs ComfyUI divides by ‖W‖, along the inputs by ‖W + ΔW‖ (comfy/weight_adapter/base.py)."""
    outputs = magnitude.shape[0] == W.shape[0]
    norm = W.norm(dim=1, keepdim=True) if outputs else (W + delta).norm(dim=0, keepdim=True)
    return (W + delta) * (magnitude / norm)


@pytest.mark.parametrize("outputs", [True, False])
def test_a_magnitude_that_comfyui_divides_by_another_norm(outputs, tmp_path):
    config = LoHaConfig(r=2, target_modules=["fc"], weight_decompose=True, wd_on_out=outputs)
    plain = torch.nn.ModuleDict({"fc": torch.nn.Linear(7, 9)})
    W = plain["fc"].weight.detach().clone()
    model = randomized(get_peft_model(plain, config))
    save_lycoris(model, tmp_path / "x.safetensors", prefix="lora_unet")
    own = {key.partition(".")[2]: t for key, t in load_file(tmp_path / "x.safetensors").items()}
    delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"]) * (float(own["alpha"]) / 2)
    layer = adapted_layers(model.get_base_model())["fc"]
    right = torch.allclose(comfyuis_decomposition(W, delta, own["dora_scale"]), layer.adapters["default"].weight(W), atol=1e-5)
    assert right != outputs
    assert [p.rule.name for p in check(tmp_path / "x.safetensors", "comfyui")] == (["magnitude"] if outputs else [])


# -- vLLM's peft_helper, SGLang's lora.py, llama.cpp's converter


def read_by(tmp_path, change: Change) -> set[str]:
    """The programs that read a LoRA of q and v whose files have been changed."""
    adapter = Adapter(tmp_path, "vllm")
    adapter.spoil(change)
    return {name for name in FOLDERS if not check(tmp_path, name)}


def patterned(config, tensors):
    """v of another rank, as `rank_pattern` says."""
    rank(3, "v_proj")(config, tensors)
    config["rank_pattern"] = {"v_proj": 3}


@pytest.mark.parametrize(
    ("change", "readers"),
    [
        pytest.param(patterned, {"vllm", "llama.cpp"}, id="rank_pattern"),
        pytest.param(entry(rank_pattern={"v_proj": 8}), set(FOLDERS), id="rank_pattern-of-nothing-else"),
        pytest.param(entry(alpha_pattern={"v_proj": 3}), {"vllm"}, id="alpha_pattern"),
        pytest.param(entry(alpha_pattern={"v_proj": 8}), set(FOLDERS), id="alpha_pattern-of-nothing-else"),
        pytest.param(entry(use_rslora=True), {"vllm"}, id="rslora"),
        pytest.param(entry(lora_alpha=0), {"vllm", "sglang"}, id="alpha-0"),
        pytest.param(entry(target_modules="all-linear"), set(FOLDERS), id="all-linear"),
        pytest.param(entry(target_modules=".*_proj"), {"vllm", "llama.cpp"}, id="regular-expression"),
        pytest.param(entry(alora_invocation_tokens=[1, 2]), {"llama.cpp"}, id="alora"),
        *(pytest.param(entry(init_lora_weights=i), set(), id=i) for i in ("pissa", "olora", "corda", "loftq", "PiSSA")),
        *(pytest.param(entry(init_lora_weights=i), set(FOLDERS), id=str(i)) for i in (True, False, "eva", "lora_ga")),
        pytest.param(entry(layer_replication=[[0, 1]]), set(), id="layer_replication"),
        pytest.param(entry(lora_bias=True), set(), id="lora_bias"),
        pytest.param(entry(use_qalora=True), set(), id="qalora"),
        pytest.param(entry(use_bdlora={"nblocks": 2}), set(), id="bdlora"),
        pytest.param(entry(modules_to_save=["score"]), {"vllm"}, id="score"),
        pytest.param(entry(modules_to_save=["score", "classifier"]), set(), id="two-heads"),
    ],
)
def test_which_program_reads_what_of_peft(change, readers, tmp_path):
    assert read_by(tmp_path, change) == readers


def test_the_rank_that_vllm_must_serve_is_the_highest(tmp_path):
    assert read_by(tmp_path, entry(rank_pattern={"other": 513})) == {"llama.cpp"}


def test_a_classifiers_own_keys_are_vllms(tmp_path):
    def change(config, tensors):
        config["modules_to_save"] = ["score"]
        tensors["base_model.model.score.weight"] = torch.zeros(2, 8)

    assert read_by(tmp_path, change) == {"vllm"}


# -- lm_head on a base whose embeddings are tied


def tied_base(folder: Path, tied: bool, entries: dict[str, Any] | None = None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*tied|.*share:UserWarning")
def test_llama_cpp_has_no_lm_head_of_its_own_on_a_tied_base(tied, tmp_path):
    """There it is the embeddings' tensor: the file is refused, or llama-cpp-python crashes."""
    base = tied_base(tmp_path / "base", tied)
    model = get_peft_model(base, HRAConfig(r=2, target_modules=["lm_head", "q_proj", "v_proj"], init_weights=False))
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    if tied:
        with pytest.raises(HalotuneError, match=r"nothing was written\. llama\.cpp: tied-head: .*lm_head.*embeddings are tied"):
            model.export("lora", tmp_path / "out", runtime="llama.cpp")
        assert not (tmp_path / "out").exists()
        model.export("lora", tmp_path / "out", runtime="peft")
    else:
        model.export("lora", tmp_path / "out", runtime="llama.cpp")
    assert [p.rule.name for p in check(tmp_path / "out", "llama.cpp")] == (["tied-head"] if tied else [])
    assert check(tmp_path / "out", ["vllm", "sglang"]) == []


def test_whether_the_base_is_tied_is_looked_up(tmp_path, capsys):
    base = tied_base(tmp_path / "base", False)
    model = get_peft_model(base, HRAConfig(r=2, target_modules=["lm_head"], init_weights=False))
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "gone")
    model.export("lora", tmp_path / "out", runtime="peft")
    (problem,) = check(tmp_path / "out", "llama.cpp")
    assert (
        problem.rule.name == "tied-head"
        and "no config.json of the base is at hand" in problem.found
        and "--base" in str(problem)
    )
    arguments = ["export", str(tmp_path / "out"), "--check", "llama.cpp", "--base", str(tmp_path / "base")]
    assert main(arguments) == 0
    file = tmp_path / "base" / "config.json"
    entries = json.loads(file.read_text())
    del entries["tie_word_embeddings"]  # older versions of transformers leave out what is the class's default
    file.write_text(json.dumps(entries))
    assert main(arguments) == 0
    file.write_text(json.dumps({**entries, "tie_word_embeddings": True}))
    assert main(arguments) == 1


@pytest.mark.parametrize("r", ["4", None, 0, [8]])
@pytest.mark.parametrize("runtime", RULES)
def test_damaged_files_are_told_of(r, runtime, tmp_path):
    """Rules hold of whatever there is: none of them fails."""
    tensors = {"x.lora_A.weight": torch.zeros(()), "x.lora_B.weight": torch.zeros(3), "lora_unet_y.alpha": torch.zeros(2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": "x", "rank_pattern": ["x"], "modules_to_save": 3})
    )
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
