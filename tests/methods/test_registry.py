"""The registry: the engine knows no method by name, so that a new one costs a configuration and an adapter."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from enum import Enum

import pytest
import torch
from torch import nn

from halotune import HalotuneError, PeftModel, PeftType, get_peft_model
from halotune.bench.contenders import PeftApi
from halotune.core.config import CLASSES, AdapterConfig, peft_types
from halotune.core.kinds import LowRank
from halotune.core.operator import WeightShape
from halotune.engine.injection.modules import adapted_layers
from halotune.engine.tuner import tuner_class
from halotune.methods import registry
from halotune.methods.registry import Kind, Method, kinds, method_of, methods, register


def test_names():
    assert {m.peft_type for m in methods()} == {t.value for t in PeftType}
    assert method_of("HRA") is method_of(PeftType.HRA)
    with pytest.raises(HalotuneError, match=r"expected one of .*HRA, LOHA, LORA, OFT; got 'bonne'\. Did you mean 'BONE'"):
        method_of("bonne")


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.peft_type)
def test_entries_are_complete(method):
    assert method.config.TYPE == method.peft_type
    assert method.kinds
    adapter = method.create(WeightShape(9, 15), method.config(r=3))
    assert type(adapter) in method.adapters and adapter.rank == 3
    names = [n for n, _ in adapter.named_parameters()]
    assert names and all(n.startswith(method.prefix) for n in names)


@dataclass(kw_only=True)
class RowConfig(AdapterConfig):
    TYPE = "ROW"


class Row(LowRank):
    """`W' = W + b aᵀ`: the whole of a new method."""

    rank = 1

    def __init__(self, shape):
        super().__init__(shape)
        self.row_a = nn.Parameter(torch.randn(1, shape.in_features))
        self.row_b = nn.Parameter(torch.randn(shape.out_features, 1))

    @classmethod
    def create(cls, shape, config):
        return cls(shape)

    def prepare(self, *parameters):
        a, b = parameters
        return b.mT, a


def test_a_new_method_has_everything(mlp, tmp_path, monkeypatch):
    """Linear layers and convolutions, composition, merging and files."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setitem(CLASSES, "ROW", RowConfig)
    register(Method("ROW", "row_", RowConfig, (Row,), Row.create, {"ROW": Kind(0.1)}))
    assert peft_types()("ROW") == RowConfig().peft_type and tuner_class("ROW").__name__ == "RowModel"
    assert "row" in PeftApi("halotune").methods and kinds()["ROW"][1].learning_rate == 0.1
    base = {k: t.clone() for k, t in mlp.state_dict().items()}
    x = mlp.sample()
    plain = mlp(x)

    model = get_peft_model(mlp, RowConfig(r=1, target_modules=["stem", "up"]))
    assert list(adapted_layers(mlp)) == ["stem", "blocks.0.up", "blocks.1.up"]
    expected = model(x)
    assert not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unload()
    assert mlp.state_dict().keys() == base.keys()
    assert all(torch.equal(t, base[k]) for k, t in mlp.state_dict().items())

    again = type(mlp)()
    again.load_state_dict(base)
    torch.testing.assert_close(PeftModel.from_pretrained(again, tmp_path)(x), expected)


def test_members_of_the_enumeration_survive_a_new_method(monkeypatch):
    before = pickle.dumps(PeftType.HRA)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setitem(CLASSES, "ROW", RowConfig)
    assert pickle.loads(before) == PeftType.HRA
    assert pickle.loads(pickle.dumps(RowConfig())).peft_type == "ROW"
    assert isinstance(RowConfig().peft_type, Enum) and RowConfig().peft_type.value == "ROW"
