"""Real benches of the smallest sizes: what they report, not how long anything took."""

from __future__ import annotations

import json
import math
import statistics
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halotune import HalotuneError
from halotune.bench import benches, sharded
from halotune.bench import report as reporting
from halotune.bench.benches import Work, run_layer, run_step
from halotune.bench.config import BenchConfig, parse_contenders
from halotune.bench.contenders import Contender
from halotune.bench.models import PRESETS, build, target_names
from halotune.bench.race import Entry, Turn, Watch, race
from halotune.bench.rows import PROCESSES, Ratio, Row, compare
from halotune.bench.timing import saved_bytes
from halotune.cli.main import main

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

CPU = torch.device("cpu")
OURS = "frozen,ours:hra-r2,ours:loha-r2,ours:bone-r4,ours:bat-r4,ours:lora-r2"
PEFT = "peft:hra-r2,peft:lora-r2" if find_spec("peft") else ""
LYCORIS = "lycoris:loha-r2" if find_spec("lycoris") else ""
EVERYONE = ",".join(filter(None, (OURS, PEFT, LYCORIS)))


def config(contenders: str = "frozen,ours:hra-r2,ours:lora-r2", **changes: Any) -> BenchConfig:
    options: dict[str, Any] = {"layers": 1, "batch": 1, "tokens": 4, "rounds": 1, "steps": 2, "warmup": 0}
    options |= {"dtype": "fp32", "features": (12, 20), "ranks": (2, 4), "token_counts": (3, 5), "prompt": 2}
    return BenchConfig(contenders=parse_contenders(contenders), **{**options, **changes})


def command(kind: str, contenders: str, *flags: str) -> int:
    sizes = ["--layers", "1", "--batch", "1", "--tokens", "4", "--rounds", "2", "--steps-per-round", "2"]
    sizes += ["--warmup", "0", "--features", "12x20", "--ranks", "2,4", "--token-counts", "3,5", "--output-dir", "out"]
    return main(["bench", kind, "--device", "cpu", "--contenders", contenders, *sizes, *flags])


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


MEASURES = {
    "step": ["step"],
    "layer": ["forward", "backward", "forward + backward"],
    "decode": ["token"],
    "merge": ["merge", "unmerge"],
    "load": ["load"],
    "scaling": ["forward + backward"],
}


@pytest.mark.parametrize("kind", MEASURES)
def test_every_row_says_what_was_measured_where_and_on_what(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(kind, EVERYONE, "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document == json.loads(Path("out/bench.json").read_text(encoding="utf-8"))
    (run,) = document["runs"]
    assert run["kind"] == kind and run["date"]
    names = EVERYONE.split(",")
    points = 4 if kind == "scaling" else 1
    assert [r["measure"] for r in run["rows"]] == [m for m in MEASURES[kind] for _ in range(points * len(names))]
    for row in run["rows"]:
        s = row["setting"]
        assert s["device"] and s["versions"]["torch"] == torch.__version__ and s["versions"]["halotune"]
        assert s["shape"] and s["model"] and s["dtype"] == "bf16" and s["adapted_modules"] >= 1
        assert row["contender"] in err
        if row["contender"] == "frozen" and kind in ("merge", "load"):
            assert row["status"].startswith("has no adapter") and row["ms"] is None
            continue
        assert row["status"] == "ok", row
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert [len(times) for times in row["rounds_ms"].values()] == [2, 2]
        assert (row["trainable_parameters"] > 0) == (row["contender"] != "frozen")
        assert ("frozen" in row["ratios"]) == (kind not in ("merge", "load"))
        assert row["ratios"]["lora"]["to"].startswith("ours:lora-r")
        assert (row["saved_bytes"] is not None) == (kind in ("layer", "scaling"))
        assert row["peak_bytes"] is None  # a CPU does not tell


def test_blocks_of_sharded_steps_are_compiled_inside_of_their_units() -> None:
    one = config("ours:hra-r2", layers=2, nproc=2, compile=True)
    work = Work.on_model(one)
    model = one.contenders[0].wrap(work.base, work.targets)
    sharded._prepare(model, work, Entry(one.contenders[0], {PROCESSES: 1}))
    layers = model.get_base_model().model.layers
    assert [type(block).__name__ for block in layers] == ["OptimizedModule"] * 2
    assert all(type(block._orig_mod).__name__ == "LlamaDecoderLayer" for block in layers)


def test_a_step_of_one_process_beside_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("step", "frozen,ours:hra-r2", "--nproc", "2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["runs"][0]["rows"]
    assert [(r["contender"], r["processes"]) for r in rows] == [(c, n) for c in ("frozen", "ours:hra-r2") for n in (1, 2)]
    for row in rows:
        n = row["processes"]
        assert row["status"] == "ok" and row["setting"]["nproc"] == 2 and row["setting"]["adapted_modules"] == 7
        assert row["ratios"]["frozen"]["to"] == "frozen" and [len(t) for t in row["rounds_ms"].values()] == [2, 2]
        assert row["tokens_per_second"] == pytest.approx(n * 4 / row["ms"]["median"] * 1e3)
    one, two = rows[2:]
    ratios = [statistics.median(one["rounds_ms"][i]) / statistics.median(two["rounds_ms"][i]) for i in "01"]
    assert one["speed_up"] is None and 2 * min(ratios) <= 1.0001 * two["speed_up"]["median"] <= 2.001 * max(ratios)
    assert two["speed_up_to_frozen"] == pytest.approx(two["speed_up"]["median"] / rows[1]["speed_up"]["median"])


def test_the_curves_take_every_rank_and_every_number_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("scaling", "ours:hra-r6,ours:lora-r6", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["runs"][0]["rows"]
    at = [(r["contender"], r.get("rank"), r.get("tokens")) for r in rows]
    ranks = [(f"ours:{m}-r{r}", r, None) for r in (2, 4) for m in ("hra", "lora")]
    assert at == ranks + [(f"ours:{m}-r6", None, t) for t in (3, 5) for m in ("hra", "lora")]
    assert rows[0]["ratios"]["lora"]["to"] == "ours:lora-r2"  # of the same rank


@pytest.mark.parametrize("name", EVERYONE.split(","))
def test_a_turn_leaves_the_base_as_it_was(name: str) -> None:
    preset = PRESETS["llama-tiny"].with_layers(1)
    base = build(preset, CPU, torch.float32)
    targets = target_names(base, preset.family, "all-linear")
    modules, weights = list(base.named_modules()), {k: v.clone() for k, v in base.state_dict().items()}
    ids = torch.randint(512, (1, 3))
    expected = base(ids).logits
    with Contender.parse(name).on(base, targets) as model:
        changed = model(ids).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        assert bool(trained) == (name != "frozen") and all(p.count_nonzero() for p in trained)
    assert torch.equal(changed, expected) == (name == "frozen")
    assert list(base.named_modules()) == modules and not any(p.requires_grad for p in base.parameters())
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(base.state_dict()[k], w) for k, w in weights.items())
    torch.testing.assert_close(base(ids).logits, expected)


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        pytest.param("llama-tiny", {"qv": 4, "all-linear": 14, "all": 14}, id="llama"),
        pytest.param("bert-tiny", {"qv": 4, "all-linear": 13, "all": 13}, id="bert"),
    ],
)
def test_targets(model: str, counts: dict[str, int]) -> None:
    base = build(PRESETS[model], CPU, torch.float32)
    for targets, count in counts.items():
        assert len(target_names(base, PRESETS[model].family, targets)) == count


def test_a_step_of_bert() -> None:
    rows = run_step(config(model="bert-tiny", targets="qv", dtype="bf16"))
    assert [row.status for row in rows] == ["ok"] * 3
    assert rows[0].setting["model"] == "bert-tiny" and rows[0].setting["shape"]["num_hidden_layers"] == 1


def test_a_step_of_a_unet_with_convolutions() -> None:
    pytest.importorskip("diffusers")
    rows = run_step(config("frozen,ours:hra-r2,ours:lora-r2", model="unet-tiny", targets="all", tokens=64, steps=1))
    assert [row.status for row in rows] == ["ok"] * 3


# -- what does not work becomes a row


def test_a_contender_that_fails_is_a_row_with_the_reason() -> None:
    rows = run_layer(config("frozen,ours:bat-r8,ours:lora-r2"))
    last = {str(row.contender): row for row in rows[-3:]}
    assert "must divide both sizes" in last["ours:bat-r8"].status and last["ours:bat-r8"].median is None
    assert last["frozen"].status == last["ours:lora-r2"].status == "ok"


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "lycoris.wrapper", None)
    rows = run_layer(config("ours:lora-r2,peft:lora-r2,lycoris:loha-r2"))[-3:]
    assert rows[0].status == "ok"
    assert "cannot be imported" in rows[1].status and "peft" in rows[1].status
    assert "cannot be imported" in rows[2].status and "lycoris" in rows[2].status


def test_a_missing_model_library_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["bench", "step", "--model", "sd-unet", "--device", "cpu"]) == 2
    assert "sd-unet" in capsys.readouterr().err


def test_out_of_memory_is_a_row_and_is_not_tried_again() -> None:
    asked: list[str] = []

    def turn(entry: Entry) -> Turn:
        asked.append(entry.contender.method)
        if entry.contender.method == "hra":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Turn({"step": [1.0]})

    entries = [Entry(Contender("ours", "hra", 2)), Entry(Contender("ours", "lora", 2))]
    rows = race(config(rounds=3), {}, entries, ["step"], turn, Watch(), started=math.inf)
    assert [row.status for row in rows] == ["out of memory", "ok"]
    assert asked == ["hra", "lora", "lora", "lora"]


def test_kernels_come_after_all_that_is_timed() -> None:
    asked: list[tuple[str, bool]] = []

    def turn(entry: Entry, profiled: bool = False) -> Turn:
        asked.append((entry.contender.method, profiled))
        return Turn({"kernels": [0.5]} if profiled else {"step": [1.0]})

    entries = [Entry(Contender("ours", "hra", 2)), Entry(Contender("ours", "lora", 2))]
    rows = race(config(rounds=2), {}, entries, ["step", "kernels"], turn, Watch(), started=math.inf)
    assert asked == 2 * [("hra", False), ("lora", False)] + [("hra", True), ("lora", True)]
    assert [row.times for row in rows] == 2 * [[1.0, 1.0]] + 2 * [[0.5]]


def test_when_time_is_up_the_rows_so_far_are_reported() -> None:
    kept: list[list[Row]] = []
    rows = race(
        config("ours:hra-r2,ours:lora-r2", time_limit=1.0),
        {},
        [Entry(Contender("ours", "hra", 2))],
        ["step"],
        lambda entry: Turn({"step": [1.0]}),
        Watch(keep=kept.append),
        started=-math.inf,
    )
    assert [row.status for row in rows] == ["time limit"] and kept == [rows]


def test_ctrl_c_keeps_the_turns_before(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("halotune.bench.contenders.fill", _interrupt_hra)
    assert command("layer", "ours:lora-r2,ours:hra-r2") == 130
    rows = reporting.read_runs(Path("out/bench.json"))[0]["rows"]
    assert [row["status"] for row in rows[-2:]] == ["ok", "not measured"]
    assert "not measured" in capsys.readouterr().out


def _interrupt_hra(model: nn.Module) -> None:
    if any("hra_u" in name for name, _ in model.named_parameters()):
        raise KeyboardInterrupt


def test_nothing_measured_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("layer", "ours:lora-r2", "--time-limit", "0") == 1
    assert "time limit" in capsys.readouterr().out


# -- arithmetic


def row(name: str, *rounds: list[float], peak: int | None = None, **point: int) -> Row:
    return Row(Contender.parse(name), "step", {}, point, dict(enumerate(rounds)), peak=peak)


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    frozen = row("frozen", [10.0, 10.0, 40.0], [20.0], [10.0], peak=100)
    hra = row("ours:hra-r8", [11.0, 12.0, 13.0], [22.0], [15.0], peak=150)
    lora = row("ours:lora-r8", [24.0], [11.0], peak=120)  # stopped after two rounds
    theirs = row("peft:lora-r8", [48.0])
    elsewhere = row("ours:bone-r8", [1.0], tokens=3)
    compare([frozen, hra, lora, theirs, elsewhere])
    assert hra.ratios["frozen"] == Ratio("frozen", 1.2, 1.1, 1.5)
    assert hra.ratios["lora"] == Ratio("ours:lora-r8", 1.25, 0.5, 2.0)
    assert hra.ratios["peft_lora"] == Ratio("peft:lora-r8", 0.25, 0.25, 0.25)
    assert frozen.ratios["frozen"].median == 1.0 and hra.memory_ratio == 1.5
    assert hra.median == 13.0 and not elsewhere.ratios


def test_saved_bytes_count_every_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(4, 8, bias=False)
    x = torch.randn(3, 4, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 3 * 4 * 4
    layer.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 0
    assert saved_bytes(lambda: (x.sin() * x).sum(), []) == 2 * 3 * 4 * 4


# -- what is shown and kept


def test_the_table_and_no_chart_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = lambda name: None if name == "matplotlib" else find_spec(name)  # noqa: E731
    monkeypatch.setattr("halotune.bench.report.find_spec", missing)
    monkeypatch.setattr("halotune.cli.bench.find_spec", missing)
    assert command("layer", "frozen,ours:hra-r2,ours:lora-r2") == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("contender"))
    titles = ["contender", "measure", "trainable", "ms [min–max]", "× frozen", "× LoRA"]
    assert header.split("  ")[0] == "contender"
    assert all(word in header for word in [*titles, "kept MiB", "peak GiB", "× memory", "status"])
    assert "in_features 12, out_features 20" in out and f"torch {torch.__version__}" in out and "bf16" in out
    assert "No chart: matplotlib is not installed." in out and list(Path("out").iterdir()) == [Path("out/bench.json")]


def test_the_cells_of_the_table() -> None:
    rows = [row("frozen", [10.0], peak=2**30), row("ours:hra-r8", [11.0], peak=2**31), row("ours:lora-r8", [400.0])]
    rows[2].problem = "out of memory"
    compare(rows)
    words = [line.split() for line in reporting.table(rows).splitlines() if "─" not in line]
    assert words[2] == ["ours:hra-r8", "–", "11.0", "[11.0–11.0]", "1.10", "0.03", "2.00", "2.00", "ok"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize("point", ["", "tokens"])
def test_the_chart(point: str) -> None:
    rows = [
        row(n, [t], **({point: 2**i} if point else {})) for n in ("frozen", "ours:hra-r8") for i, t in enumerate((1.0, 2.0))
    ]
    compare(rows)
    for r in rows:
        r.setting.update({"model": "m", "targets": "qv", "adapted_modules": 1, "dtype": "bf16", "compiled": False})
        r.setting.update({"shape": {}, "batch": 1, "tokens": 2, "device": "d", "versions": {}})
    name = reporting.plot_name("step", rows[0].setting)
    assert name == "step-m-qv-bf16-1x2.png"
    assert reporting.plot(Path(name), "step", rows)
    assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_runs_are_added_to_the_file_and_nothing_else_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("layer", "merge"):
        assert command(kind, "ours:lora-r2") == 0
    runs = reporting.read_runs(Path("out/bench.json"))
    assert [run["kind"] for run in runs] == ["layer", "merge"]
    Path("out/bench.json").write_text('{"mine": 1}')
    assert command("layer", "ours:lora-r2") == 2
    assert "--output-dir" in capsys.readouterr().err and Path("out/bench.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["stepp"], ["stepp", "step"], id="kind"),
        pytest.param(["step", "--contenders", "ours:dora-r8"], ["'ours:dora-r8'", "frozen", "peft:{bone"], id="method"),
        pytest.param(["step", "--contenders", "ours:hra"], ["'ours:hra'", "r8"], id="no-rank"),
        pytest.param(["step", "--contenders", ""], ["''"], id="nobody"),
        pytest.param(["step", "--model", "gpt-9"], ["gpt-9", "llama-3b"], id="model"),
        pytest.param(["layer", "--features", "12"], ["--features", "4096x11008"], id="features"),
        pytest.param(["step", "--rounds", "0"], ["--rounds", "from 1"], id="rounds"),
        pytest.param(["step", "--device", "tpu"], ["'tpu'", "cuda"], id="device"),
        pytest.param(["decode", "--model", "bert-tiny", "--device", "cpu"], ["bert-tiny", "llama"], id="decode-bert"),
        pytest.param(["decode", "--cuda-graph"], ["--cuda-graph", "decode"], id="decode-graph"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and ": error: " in err.splitlines()[-1]
    assert all(word in err for word in said), err


def test_a_captured_step_reads_each_batch_where_the_first_was(monkeypatch):
    """With substitutes for a GPU's streams and graphs: what is captured runs on one place, into which batches are copied."""
    seen: list[list[float]] = []

    class Graph:
        def replay(self) -> None:
            seen.append(place[0]["x"].tolist())

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    place: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    batches = [{"x": torch.tensor([float(i)])} for i in range(3)]
    run = benches.captured(place.append, batches[0])
    for batch in (*batches[1:], batches[0]):
        run(batch)
    assert seen == [[1.0], [2.0], [0.0]]
    assert [b["x"].item() for b in batches] == [0.0, 1.0, 2.0]
    assert all(p is place[0] for p in place) and len(place) == 4


def test_the_batch_of_a_captured_step_is_the_same_batch() -> None:
    preset = PRESETS["llama-tiny"].with_layers(1)
    model = build(preset, CPU, torch.float32)
    batch = preset.family.batch(preset.shape, 2, 5, CPU, torch.float32)
    static = preset.family.static(batch)
    assert static["attention_mask"].shape == (1, 1, 5, 5)
    torch.testing.assert_close(preset.family.loss(model, static), preset.family.loss(model, batch))


def test_a_cpu_has_no_graphs():
    with pytest.raises(HalotuneError, match="cuda_graph: a CPU has none"):
        BenchConfig(contenders=(), cuda_graph=True)
