"""The example with convolutions, on a narrow ResNet-50."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from halotune import PeftConfig, PeftModel

from .models import ResNet, example, only_adapters_train, run_as_script, starts_away


def test_resnet(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 32, 32)
    labels = torch.arange(6) % 3
    base = ResNet(classes=3)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with starts_away():
        model, losses = example("hra_resnet")["main"](base, [(images, labels)], save=str(tmp_path), epochs=8, lr=2e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert only_adapters_train(model)

    layers = {layer.name for layer in model.get_layer_status()}
    blocks = {name.rpartition(".")[0] for name, _ in ResNet(3).named_modules() if name.endswith("conv3")}
    assert len(blocks) == 16
    assert layers == {"conv1", "fc"} | {f"{block}.{conv}" for block in blocks for conv in ("conv1", "conv2")}
    assert isinstance(model.get_submodule("base_model.model.layer1.0.conv3"), nn.Conv2d)
    stem = model.get_parameter("base_model.model.conv1.adapters.default.hra_u")
    assert stem.shape == (3 * 7 * 7, 8)

    fresh = ResNet(classes=3)
    fresh.load_state_dict(before)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(images), again(images), atol=1e-4, rtol=1e-4)


def test_as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a substitute for what the script takes from torchvision, which not every build of torch can import."""

    class Images(list):
        classes = ("cat", "dog", "cow")

        def __init__(self, folder: str, transform: object) -> None:
            assert (folder, transform) == ("my_images", "as in training")
            super().__init__((torch.randn(3, 32, 32), i % 3) for i in range(4))

    weights = SimpleNamespace(transforms=lambda: "as in training")
    parts = {
        "datasets": {"ImageFolder": Images},
        "models": {
            "ResNet50_Weights": SimpleNamespace(DEFAULT=weights),
            "resnet50": lambda weights: ResNet(classes=1000),
        },
    }
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    for name, members in parts.items():
        module = ModuleType(f"torchvision.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    with starts_away():
        run_as_script(monkeypatch, "hra_resnet", "--images", "my_images", "--save", tmp_path, "--epochs", "1")
    assert PeftConfig.from_pretrained(tmp_path).modules_to_save == ["fc"]
    again = PeftModel.from_pretrained(ResNet(classes=3), tmp_path)
    assert again(torch.randn(2, 3, 32, 32)).shape == (2, 3)
