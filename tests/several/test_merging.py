"""Merging one or several of the adapters, and the report of what rounding cost."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor

from halotune import MergeReport, PeftModel

from ..laws.cases import matrix
from .models import METHODS, MLP, adapted, close, composed, config, every_method, layers, same_state, state


def by_hand(W: Tensor, exact: Tensor, stored: Tensor) -> dict[str, float]:
    """The numbers of one layer, or of several as one long vector, in float64."""
    W, exact, stored = (t.double() for t in (W, exact, stored))
    delta = exact - W
    return {
        "delta": float(delta.norm() / W.norm()),
        "lost": float((stored - exact).norm() / delta.norm()),
        "error": float((stored - exact).norm() / W.norm()),
        "changed": float((stored != W).double().mean()),
    }


def assert_numbers(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["lost"] < 1 and 0 < found["changed"] <= 1  # rounding cost something, but not all


@every_method
@torch.no_grad()
def test_report_by_hand(plain: MLP, method: str):
    plain = copy.deepcopy(plain).bfloat16()
    model = adapted(plain, a=config(method))
    model.set_scale("a", 0.02)  # small enough for rounding to show
    report = model.merge_adapter()
    before, exact, stored = [], [], []
    for path, layer in layers(model).items():
        W = matrix(plain.get_submodule(path))
        full = torch.lerp(W.float(), layer.adapters["a"].weight(W.float()), 0.02)
        assert torch.equal(matrix(layer.base_layer), full.bfloat16())
        assert_numbers(report.layers[path].to_dict(), by_hand(W, full, full.bfloat16()))
        for all_of_them, t in ((before, W), (exact, full), (stored, full.bfloat16())):
            all_of_them.append(t.flatten())
    assert list(report.layers) == list(layers(model)) and len(before) == 5
    assert_numbers(report.total().to_dict(), by_hand(torch.cat(before), torch.cat(exact), torch.cat(stored)))


@torch.no_grad()
def test_report_as_a_dict_and_as_a_table(plain: MLP):
    model = adapted(copy.deepcopy(plain).bfloat16(), a=config("hra-r4"), b=config("lora-r2", ["up"]))
    model.set_adapter(["a", "b"])
    report = model.merge_adapter()
    entries = json.loads(json.dumps(report.to_dict()))
    assert entries["total"] == report.total().to_dict() and entries["total"].keys() == {"delta", "lost", "error", "changed"}
    assert entries["layers"] == {path: record.to_dict() for path, record in report.layers.items()}

    head, *rows, total = str(report).splitlines()
    assert head.split() == ["layer", "|ΔW|/|W|", "lost", "error", "changed"]
    assert [row.split()[0] for row in rows] == list(layers(model))
    for row, record in zip([*rows, total], [*report.layers.values(), report.total()], strict=True):
        _, delta, lost, error, changed = row.split()
        assert float(error) == pytest.approx(record.error, rel=1e-2)
        assert float(delta) == pytest.approx(record.delta, rel=1e-2)
        assert float(lost.rstrip("%")) == pytest.approx(100 * record.lost, abs=1e-2)
        assert float(changed.rstrip("%")) == pytest.approx(100 * record.changed, abs=1e-2)
    assert total.startswith("total") and len({len(line) for line in (head, *rows, total)}) == 1


@torch.no_grad()
def test_each_merge_reports_its_own_step(plain: MLP):
    model = adapted(plain, a=config("hra-r4"), b=config("bat-r3", ["up"]), c=config("lora-r2"))
    model.set_adapter(["a", "b"])
    first, second = model.merge_adapter(["a"]), model.merge_adapter(["b"])
    assert first is not second and model.base_model.merge_report is second
    assert len(first.layers) == 5 and list(second.layers) == ["blocks.0.up", "blocks.1.up"]
    for path, record in second.layers.items():
        W = matrix(plain.get_submodule(path))
        after_a = layers(model)[path].adapters["a"].weight(W)
        after_b = layers(model)[path].adapters["b"].weight(after_a)
        assert record.delta_norm == pytest.approx(float((after_b - after_a).norm()), rel=1e-9)
    nothing = model.merge_adapter(["a", "b"])
    assert nothing.layers == {} and nothing.total().to_dict() == {"delta": 0, "lost": 0, "error": 0, "changed": 0}
    assert str(MergeReport()).splitlines()[-1].startswith("total")


@pytest.mark.parametrize(("scale", "lossy"), [(1e-4, True), (1.0, False)])
@torch.no_grad()
def test_a_delta_that_is_mostly_lost_is_warned_of(plain: MLP, recwarn, scale: float, lossy: bool):
    model = adapted(copy.deepcopy(plain).bfloat16(), a=config("bone-r3"))
    model.set_scale("a", scale)
    report = model.merge_adapter()
    messages = [str(w.message) for w in recwarn]
    if not lossy:
        assert messages == [] and report.total().lost < 0.05
        return
    (message,) = messages
    assert report.total().lost > 0.5 and f"lost {report.total().lost:.0%} of the adapter's delta to" in message
    assert "torch.bfloat16" in message and "Load the base in fp32" in message


@every_method
@torch.no_grad()
def test_merging_one_of_two_active(plain: MLP, x: Tensor, method: str):
    """In peft the other one is dropped."""
    model = adapted(plain, a=config(method), b=config("hra-r3", ["stem", "up"]), c=config(method, ["down"]))
    model.set_adapter(["a", "b", "c"])
    before, expected = state(model), composed(plain, model, ["a", "b", "c"])(x)
    for names in (["a"], ["b"], ["c"]):
        model.merge_adapter(names)
        close(model(x), expected)
    assert model.base_model.merged_adapters == ["a", "b", "c"]
    model.unmerge_adapter()
    assert same_state(model, before)
    close(model(x), expected)


@torch.no_grad()
def test_all_methods_merged_one_after_the_other(crowd: PeftModel, plain: MLP, x: Tensor):
    names = list(METHODS)
    crowd.set_adapter(names)
    before, expected = state(crowd), composed(plain, crowd, names)(x)
    report = crowd.merge_adapter()
    close(crowd(x), expected)
    for path, layer in layers(crowd).items():
        W, record = matrix(plain.get_submodule(path)), report.layers[path]
        size = math.hypot(*(matrix(layer.base_layer) - W).flatten().tolist())
        assert record.delta_norm == pytest.approx(size, rel=1e-9)
    with crowd.disable_adapter():
        assert torch.equal(crowd(x), plain(x))
    close(crowd(x), expected)  # merged again, in the same order
    crowd.unmerge_adapter()
    assert same_state(crowd, before)


@torch.no_grad()
def test_setting_others_while_merged_restores_the_base(plain: MLP, x: Tensor):
    plain = copy.deepcopy(plain).bfloat16()  # where an inverse would not do
    model = adapted(plain, a=config("hra-r4"), b=config("bat-r3"))
    before = state(model)
    model.merge_adapter()
    assert not same_state(model, before)
    with pytest.warns(UserWarning, match="adapters were merged; the base weights are restored"):
        model.set_adapter("b")
    assert same_state(model, before) and model.base_model.merged_adapters == []
    model.set_adapter("a")  # nothing is merged now, so nothing is warned of
    assert torch.isfinite(model(x.bfloat16())).all()


@torch.no_grad()
def test_deleting_a_merged_one_of_several(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4"), b=config("bat-r3"))
    model.set_adapter(["a", "b"])
    expected = composed(plain, model, ["b"])(x)
    model.merge_adapter(["a"])
    model.delete_adapter("a")
    assert model.base_model.merged_adapters == [] and model.active_adapter == "b"
    close(model(x), expected)
