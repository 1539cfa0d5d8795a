"""Both ways with the released peft: files, names, and training step by step."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import halotune

from .models import base, base_biases_stay, error, output, randomize

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers")

# peft asks transformers 5 for an attribute under its old name. Whatever else peft warns of is an error here.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QV = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONV = ["conv1", "conv2", "conv1x1", "c1d", "fc"]


@dataclass
class Case:
    """One adapter, in either package: the configurations have the same names and arguments."""

    config: str
    kwargs: dict[str, Any]
    base: str = "llama"
    rows: int | None = None  # resize the vocabulary to so many
    trains: bool = True  # peft can train it, and rightly
    save: dict[str, Any] = field(default_factory=dict)  # what peft would warn of where it decides it itself

    def model(self) -> nn.Module:
        model = base(self.base)
        if self.rows is not None:
            torch.manual_seed(0)
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        return model

    def ours(self) -> halotune.PeftModel:
        return halotune.get_peft_model(self.model(), getattr(halotune, self.config)(**self.kwargs))

    def theirs(self) -> Any:
        config, kwargs = self.config, self.kwargs
        if config == "BoneConfig":  # peft knows it as MiSS alone
            config, kwargs = "MissConfig", {**kwargs, "bias": kwargs.get("bias", "none").replace("bone", "MiSS")}
        return peft.get_peft_model(self.model(), getattr(peft, config)(**kwargs))


def hra(**kwargs) -> dict[str, Any]:
    return {"r": 4, "target_modules": QV, **kwargs}


CASES = {
    "hra": Case("HRAConfig", hra(target_modules=[*QV, *MLP], task_type="CAUSAL_LM")),
    "hra-rank-1": Case("HRAConfig", hra(r=1, init_weights=False)),
    "hra-odd": Case("HRAConfig", hra(r=5, init_weights=False)),
    "hra-gs": Case("HRAConfig", hra(r=3, apply_GS=True, init_weights=False)),
    "hra-bias-all": Case("HRAConfig", hra(bias="all")),
    "hra-bias-only": Case("HRAConfig", hra(bias="hra_only")),
    "hra-modules-to-save": Case("HRAConfig", hra(modules_to_save=["lm_head", "norm"])),
    "hra-lm-head": Case("HRAConfig", hra(target_modules=["q_proj", "lm_head"]), save={"save_embedding_layers": True}),
    "hra-resized": Case("HRAConfig", hra(), rows=70, save={"save_embedding_layers": True}),
    "hra-layers": Case("HRAConfig", hra(layers_to_transform=[1], layers_pattern="layers")),
    "hra-conv": Case("HRAConfig", hra(target_modules=["conv1", "conv2", "conv1x1", "fc"]), "convnet"),
    "hra-classifier": Case("HRAConfig", hra(target_modules=["query"], task_type="SEQ_CLS"), "bert_classifier"),
    "loha": Case("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": [*QV, "down_proj"]}),
    "loha-patterns": Case(
        "LoHaConfig",
        {"r": 4, "target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers.1.+v_proj": 3}},
    ),
    "loha-conv": Case("LoHaConfig", {"r": 2, "target_modules": CONV}, "convnet"),
    "loha-tucker": Case("LoHaConfig", {"r": 2, "target_modules": CONV, "use_effective_conv2d": True}, "convnet", trains=False),
    "lora": Case("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": QV}),
    "lora-rslora": Case("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": QV}),
    "lora-patterns": Case("LoraConfig", {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "lora-bias-all": Case("LoraConfig", {"r": 4, "target_modules": QV, "bias": "all"}),
    "lora-conv": Case("LoraConfig", {"r": 4, "target_modules": ["conv1", "conv2", "c1d", "fc"]}, "convnet"),
    "lora-conv1d": Case("LoraConfig", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"),
    "bone": Case("BoneConfig", {"r": 4, "target_modules": [*QV, "down_proj"]}),
    "bone-remainder": Case("BoneConfig", {"r": 5, "target_modules": QV}),
    "bone-bat": Case("BoneConfig", {"r": 8, "init_weights": "bat", "target_modules": [*QV, "down_proj"]}),
    "bone-bias-only": Case("BoneConfig", {"r": 4, "bias": "bone_only", "target_modules": QV}),
    "miss": Case("MissConfig", {"r": 4, "target_modules": QV}),
    "miss-bat": Case("MissConfig", {"r": 8, "init_weights": "bat", "target_modules": QV}),
    "oft": Case("OFTConfig", {"oft_block_size": 8, "target_modules": [*QV, "down_proj"]}),
    "oft-terms": Case("OFTConfig", {"oft_block_size": 16, "num_cayley_neumann_terms": 3, "target_modules": QV}),
    "oft-blocks": Case("OFTConfig", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": QV}),
    "oft-shared": Case("OFTConfig", {"oft_block_size": 4, "block_share": True, "bias": "oft_only", "target_modules": QV}),
    "oft-coft": Case("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 9.0, "target_modules": QV}),
    "oft-conv": Case("OFTConfig", {"oft_block_size": 2, "target_modules": ["conv1x1", "fc"]}, "convnet"),
    "miss-mini": Case("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini", "target_modules": QV}),
}
cases = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items()])
trained = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items() if c.trains])


def save_ours(case: Case, model: halotune.PeftModel, folder) -> None:
    model.save_pretrained(folder, bone_as_miss=case.config == "BoneConfig")


@cases
@torch.no_grad()
def test_written_here_peft_loads_and_computes_the_same(case: Case, tmp_path) -> None:
    ours = randomize(case.ours())
    save_ours(case, ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert error(output(theirs), output(ours.eval())) < 1e-5
    assert error(output(theirs), output(case.model())) > 1e-3
    stored = load_file(tmp_path / "adapter_model.safetensors")
    read = peft.get_peft_model_state_dict(theirs, **case.save)
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[k], t) for k, t in stored.items())


@cases
def test_files_have_the_same_keys_and_entries(case: Case, tmp_path) -> None:
    save_ours(case, case.ours(), tmp_path / "ours")
    case.theirs().save_pretrained(tmp_path / "theirs", **case.save)
    shapes = [
        {k: t.shape for k, t in load_file(tmp_path / who / "adapter_model.safetensors").items()} for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]
    ours, theirs = (
        {
            k: sorted(v) if isinstance(v, list) else v
            for k, v in json.loads((tmp_path / who / "adapter_config.json").read_text()).items()
        }
        for who in ("ours", "theirs")
    )
    for entries in (ours, theirs):
        del entries["peft_version"]
    if case.config == "LoraConfig":  # peft's LoRA has options that we lack
        theirs = {k: v for k, v in theirs.items() if k in ours}
    assert ours == theirs


@trained
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_training_is_the_same_step_by_step(case: Case, optimizer, tmp_path) -> None:
    torch.manual_seed(0)
    theirs = case.theirs()
    theirs.save_pretrained(tmp_path / "start", **case.save)
    ours = halotune.PeftModel.from_pretrained(case.model(), tmp_path / "start", is_trainable=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    losses = [train(model, optimizer) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[0][-1] - losses[0][0]) > 1e-3 * losses[0][0]  # it moved
    theirs.save_pretrained(tmp_path / "end", **case.save)
    loaded = halotune.PeftModel.from_pretrained(case.model(), tmp_path / "end").eval()
    assert error(output(loaded), output(theirs.eval())) < 1e-5


def train(model: nn.Module, optimizer, steps: int = 5) -> list[float]:
    model.eval()  # no dropout
    rate = {torch.optim.SGD: 0.3, torch.optim.AdamW: 3e-3}[optimizer]
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        y = output(model)
        target = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def test_adapters_of_other_names_lie_in_subfolders_for_both(tmp_path) -> None:
    config = {"r": 2, "target_modules": QV}
    ours = halotune.get_peft_model(base("llama"), halotune.HRAConfig(**config))
    ours.add_adapter("second", halotune.HRAConfig(**config))
    ours.set_adapter("second")
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "second", adapter_name="second")
    assert error(output(theirs), output(ours)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = halotune.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs", "second", subfolder="second")
    assert error(output(again), output(ours)) < 1e-5


@pytest.mark.parametrize("ours, theirs", [("LayerStatus", "TunerLayerStatus"), ("ModelStatus", "TunerModelStatus")])
def test_statuses_have_the_same_fields_and_the_form(ours: str, theirs: str) -> None:
    from peft import peft_model

    from halotune.engine import status

    names = [[f.name for f in dataclasses.fields(c)] for c in (getattr(status, ours), getattr(peft_model, theirs))]
    assert sorted(names[0]) == sorted([*names[1], "form"])


@torch.no_grad()
def test_disabled_and_merged_agree(tmp_path) -> None:
    theirs = peft.get_peft_model(base("llama"), peft.HRAConfig(r=4, target_modules=QV, bias="hra_only"))
    randomize(theirs).save_pretrained(tmp_path)
    ours = halotune.PeftModel.from_pretrained(base("llama"), tmp_path)
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), theirs.disable_adapter():
        expected = output(theirs)
    with base_biases_stay(True), ours.disable_adapter():
        assert error(output(ours), expected) < 1e-5
    assert error(output(ours.merge_and_unload()), output(theirs.merge_and_unload())) < 1e-5
