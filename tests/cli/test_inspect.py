"""The figures of `halotune inspect` are those of the dense matrices; and the command, from flags to files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halotune import HRAConfig, LoHaConfig, get_peft_model
from halotune.cli.loading import BaseModel, Saved
from halotune.cli.main import main
from halotune.core.errors import AdapterFileError, HalotuneError
from halotune.core.layer import AdaptedLayer
from halotune.inspect import figures
from halotune.inspect.figures import Figures, measure
from halotune.methods import registry
from halotune.report.grid import short, split
from tests.laws.cases import Case, Model, grid, matrix, some_bases, train, wrap

FIXTURES = Path(__file__).parents[1] / "fixtures"


def saved_on(folder: Path, module: nn.Module, config: Any, *, trained: bool = True) -> tuple[Saved, AdaptedLayer]:
    """An adapter on a layer, saved; and the layer."""
    model = wrap(Model(module), config)
    layer = model.get_base_model().layer
    if trained:
        train(layer.adapters)
    model.save_pretrained(folder)
    return Saved.read(str(folder)), layer


def dense(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """W and W' − W in float64."""
    W = layer.base.weight().detach().double()
    return W, layer.adapters["default"].double().weight(W).detach() - W


DELTA = {"weight_norm", "delta_norm", "relative_delta", "spectral_norm", "effective_rank"}


def numbers(layer: Figures) -> dict[str, Any]:
    """The figures that are known, but for the shape."""
    return {k: v for k, v in layer.to_dict().items() if isinstance(v, (float, int))}


def entropy_rank(values: Tensor) -> float:
    p = [s / float(values.sum()) for s in values.tolist()]
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


@grid(torch.float32, bases=some_bases("linear", "gpt2-conv1d", "conv2d-grouped"))
def test_figures_are_those_of_the_dense_delta(case: Case, tmp_path: Path) -> None:
    module = case.module()
    original = module.state_dict()
    saved, layer = saved_on(tmp_path, module, case.variant.config)
    fresh = case.module()
    fresh.load_state_dict(original)
    (found,) = measure(saved, BaseModel("here", Model(fresh)))

    W, delta = dense(layer)
    values = torch.linalg.svdvals(delta)
    assert (found.path, found.kind, found.shape) == ("layer", type(module).__name__, tuple(matrix(module).shape))
    assert found.rank == (case.variant.config.r or layer.adapters["default"].rank)
    assert found.weight_norm == pytest.approx(float(W.norm()))
    assert found.delta_norm == pytest.approx(float(delta.norm()))
    assert found.relative == pytest.approx(float(delta.norm() / W.norm()))
    if case.variant.rank is None:
        assert found.spectral_norm is None and found.effective_rank is None
    else:
        assert found.spectral_norm == pytest.approx(float(values[0]))
        assert found.effective_rank == pytest.approx(entropy_rank(values), rel=1e-4)

    if registry.method_of(case.variant.config.peft_type).measures is None:
        with pytest.raises(HalotuneError, match="Give it with --base"):
            measure(saved, None)
        return
    (alone,) = measure(saved, None)
    assert alone.weight_norm is None and alone.relative is None and alone.kind is None
    assert numbers(alone) == pytest.approx({key: numbers(found)[key] for key in numbers(alone)})
    assert (alone.rank, alone.parameters) == (found.rank, found.parameters)
    assert all(mine in (0, true) for mine, true in zip(alone.shape, found.shape, strict=True))
    knows_all = not saved.prefix.startswith(("hra", "bone", "miss"))
    assert (0 not in alone.shape) == knows_all
    needs_weight = not knows_all or getattr(case.variant.config, "weight_decompose", False)
    assert numbers(found).keys() - numbers(alone).keys() == (
        numbers(found).keys() & DELTA if needs_weight else {"weight_norm", "relative_delta"}
    )


@pytest.mark.parametrize(("r", "gram_schmidt"), [(1, False), (3, False), (4, False), (9, False), (1, True), (4, True)])
def test_hra_angles_are_those_of_the_dense_rotation(r: int, gram_schmidt: bool, tmp_path: Path) -> None:
    config = HRAConfig(r=r, apply_GS=gram_schmidt, init_weights=False, target_modules=["layer"])
    saved, layer = saved_on(tmp_path, nn.Linear(7, 5), config)
    (found,) = measure(saved, None)
    Q = layer.adapters["default"].double().weight(torch.eye(7, dtype=torch.float64)).detach()
    eigenvalues = torch.linalg.eigvals(Q)
    every = torch.atan2(eigenvalues.imag.abs(), eigenvalues.real).rad2deg().sort().values
    angles = torch.tensor(found.own["angles"], dtype=torch.float64)
    assert len(angles) == min(r, 7)
    torch.testing.assert_close(angles, every[-len(angles) :], atol=1e-5, rtol=0)
    assert (every[: -len(angles)] < 1e-4).all()
    assert found.own["rotation"] == pytest.approx(float((Q - torch.eye(7)).norm()))
    Û = nn.functional.normalize(layer.adapters["default"].hra_u.detach(), dim=0)
    assert found.own["orthogonality_gap"] == pytest.approx(float((Û.T @ Û - torch.eye(r)).norm()))


@pytest.mark.parametrize("config", [HRAConfig(r=4, target_modules=["layer"]), LoHaConfig(r=3, target_modules=["layer"])])
def test_an_untrained_adapter_does_nothing(config: Any, tmp_path: Path) -> None:
    module = nn.Linear(9, 8)
    saved, _ = saved_on(tmp_path, module, config, trained=False)
    (found,) = measure(saved, BaseModel("here", Model(nn.Linear(9, 8))))
    assert found.delta_norm == found.relative == found.spectral_norm == found.effective_rank == 0
    assert all(value < 1e-6 for key, value in found.own.items() if key in ("largest_angle", "rotation"))


def test_factors_of_high_rank_are_not_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, layer = saved_on(tmp_path, nn.Linear(9, 8), LoHaConfig(r=3, target_modules=["layer"]))
    monkeypatch.setattr(figures, "MAX_FACTOR_RANK", 8)
    (found,) = measure(saved, BaseModel("here", Model(nn.Linear(9, 8))))
    assert found.effective_rank is None
    assert found.delta_norm == pytest.approx(float(dense(layer)[1].norm()))


def test_a_method_without_measures_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, _ = saved_on(tmp_path, nn.Linear(9, 8), HRAConfig(r=4, target_modules=["layer"]))
    whole = registry.method_of("HRA")
    monkeypatch.setitem(registry._METHODS, "HRA", dataclasses.replace(whole, measures=None))
    (found,) = measure(saved, BaseModel("here", Model(nn.Linear(9, 8))))
    assert found.delta_norm and found.effective_rank and not found.own
    with pytest.raises(HalotuneError, match="HRA adapters are inspected with their base model"):
        measure(saved, None)


# -- the grid of the chart


def test_layers_and_modules() -> None:
    llama = {f"model.layers.{i}.{m}": (f"model.layers.{i}", m) for i in range(3) for m in ("self_attn.q_proj", "mlp.up_proj")}
    assert split([*llama, "lm_head"]) == {**llama, "lm_head": ("", "lm_head")}
    blocks = [f"down_blocks.{i}.attentions.1.transformer_blocks.{j}" for i in (0, 1) for j in (0, 1)]
    unet = {f"{block}.{m}": (block, m) for block in blocks for m in ("attn1.to_out.0", "ff.net.0.proj")}
    assert split([*unet, "conv_in"]) == {**unet, "conv_in": ("", "conv_in")}
    assert short(["model.layers.0", "model.layers.10", ""]) == {"model.layers.0": "0", "model.layers.10": "10", "": ""}


# -- the command


def test_table(adapters: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapters / "hra"), "--base", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"base     {base} (LlamaForCausalLM, float32)" in out and "task     CAUSAL_LM" in out
    assert "4 layers, 320 numbers" in out
    layers = measure(Saved.read(str(adapters / "hra")), BaseModel.load(Saved.read(str(adapters / "hra")), str(base)))
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("model.")}
    assert list(lines) == [layer.path for layer in layers]
    first = layers[0]
    assert lines[first.path][:4] == [first.path, "Linear", "16×16", "4"]
    assert float(lines[first.path][6]) == pytest.approx(first.relative, rel=1e-2)
    assert float(lines[first.path][9]) == pytest.approx(first.own["largest_angle"], abs=0.06)
    assert "mean of 2 self_attn.q_proj" in out and "all layers together: ‖W‖" in out


def test_without_the_base(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapters / "loha")]) == 0
    out = capsys.readouterr().out
    assert "give --base to compare with its weights" in out
    assert "rank(ΔW)" in out and "‖ΔW‖/‖W‖" not in out


def test_layers_come_in_order(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(11))})
    wrapped = get_peft_model(model, HRAConfig(r=2, target_modules=[str(i) for i in range(11)]))
    wrapped.save_pretrained(tmp_path)
    assert [layer.path for layer in measure(Saved.read(str(tmp_path)), None)] == [f"layers.{i}" for i in range(11)]


@pytest.mark.parametrize("name", ["hra", "loha", "bone", "bat", "lora"])
def test_json_and_chart(name: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart, file = tmp_path / "chart.png", tmp_path / "figures.json"
    assert main(["inspect", str(adapters / name), "--base", "--plot", str(chart), "--json", str(file)]) == 0
    assert f"Wrote {chart}" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000
    document = json.loads(file.read_text())
    assert len(document["layers"]) == 4
    sizes = [layer["delta_norm"] for layer in document["layers"].values()]
    assert document["total"]["delta_norm"] == pytest.approx(math.hypot(*sizes))
    assert main(["inspect", str(adapters / name), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["config"]["peft_type"] == document["config"]["peft_type"] and "layer" in err


def test_a_chart_of_unknown_and_missing_cells(tmp_path: Path) -> None:
    from halotune.inspect.plot import compact, plot

    layers = [
        Figures(path, None, (4, 4), 2, 8, delta_norm=size) for path, size in [("h.0.a", 1.0), ("h.1.b", 2.0), ("head", 3.0)]
    ]
    plot(tmp_path / "a.png", Saved.read(str(FIXTURES / "lora_from_hra_basic")), layers)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [compact(x) for x in (0, 0.034, 4.5, 67.89, 157.1, 3.4e-5, 2e4)] == [
        "0.00",
        "0.03",
        "4.50",
        "67.9",
        "157",
        "3e-5",
        "2e4",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nowhere"], ["nowhere", "no such folder"], id="missing"),
        pytest.param(["{base}"], ["adapter_config.json", "no such file"], id="no-adapter"),
        pytest.param(
            ["{adapters}/hra", "--base", "./nowhere"],
            ["base model './nowhere' cannot be loaded", "no such folder"],
            id="no-base",
        ),
        pytest.param(
            ["{adapters}/hra", "--base", "{adapters}/loha"], ["is an adapter, not a base model"], id="adapter-as-base"
        ),
        pytest.param(
            ["{adapters}/hra", "--base", f"{FIXTURES}/base_llama"],
            ["hra_u", "expected (48, 4), found (24, 4)"],
            id="wrong-base",
        ),
        pytest.param(["{adapters}/hra", "--plot", "a.pdf"], ["--plot a.pdf", ".png"], id="not-png"),
        pytest.param([f"{FIXTURES}/lycoris_loha_kohya_prefix"], ["no such file"], id="kohya"),
    ],
)
def test_errors(arguments: list[str], said: list[str], adapters: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *(a.format(adapters=adapters, base=base) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("halotune inspect: error: ") and all(words in error for words in said), error


def test_files_that_do_not_fit(adapters: Path, tmp_path: Path) -> None:
    entries = json.loads((adapters / "hra" / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((adapters / "hra" / "adapter_model.safetensors").read_bytes())
    nan = {k: t.fill_(float("nan")) for k, t in Saved.read(str(adapters / "hra")).tensors.items()}
    with pytest.raises(AdapterFileError, match=r"layers\.0\.mlp\.down_proj\.hra_u: expected finite numbers, found NaN"):
        measure(dataclasses.replace(Saved.read(str(adapters / "hra")), tensors=nan), None)
    for change, said in [({"r": 6}, "size mismatch"), ({"peft_type": "BONE", "init_weights": True}, "holds no tensor of BONE")]:
        kept = {k: v for k, v in entries.items() if k != "apply_GS"}
        (tmp_path / "adapter_config.json").write_text(json.dumps({**kept, **change}))
        with pytest.raises(AdapterFileError, match=said):
            measure(Saved.read(str(tmp_path)), None)


def test_matplotlib_is_asked_for_by_its_extra(
    adapters: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["inspect", str(adapters / "hra"), "--plot", "a.png"]) == 2
    assert 'pip install "halotune[plot]"' in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(adapters: Path) -> None:
    command = [sys.executable, "-m", "halotune", "inspect", str(adapters / "hra")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
