"""`AutoModel.from_pretrained(adapter folder)` of transformers, which hands the folder to peft; and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halotune import AutoPeftModelForCausalLM, BoneConfig, HRAConfig, LoHaConfig, MissConfig, PeftModel

from .models import adapted, language_model, tensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

QV = ["q_proj", "v_proj"]
IDS = torch.arange(3, 17).reshape(2, 7)
CONFIGS = {
    "HRA": HRAConfig(r=4, target_modules=QV),
    "HRA, Gram–Schmidt": HRAConfig(r=4, target_modules=QV, apply_GS=True, init_weights=False),
    "HRA with the penalty": HRAConfig(r=4, target_modules=QV, orthogonality_weight=0.1),
    "LoHa": LoHaConfig(r=4, target_modules=QV, alpha=6),
    "MiSS": MissConfig(r=4, target_modules=QV),
    "Bone as MiSS": BoneConfig(r=4, target_modules=QV),
    "BAT as MiSS": BoneConfig(r=4, target_modules=QV, init_weights="bat"),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    language_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, config: Any, folder: Path, **kwargs: Any) -> PeftModel:
    config.task_type = "CAUSAL_LM"
    model = adapted(config, transformers.AutoModelForCausalLM.from_pretrained(base))
    for name in tensors(model):
        model.get_parameter(name).data.normal_()
    model.save_pretrained(folder, **kwargs)
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'orthogonality:UserWarning")  # which peft does not know
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(name, base, tmp_path):
    model = saved(base, CONFIGS[name], tmp_path / "adapter", bone_as_miss=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(found), logits(model), atol=1e-4)
    assert not torch.allclose(logits(found), logits(language_model()), atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_loads_all_of_it(name, base, tmp_path):
    model = saved(base, CONFIGS[name], tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
