"""`train sft`: the head under the chunked loss, the data, and what a user sees before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("trl")
pytest.importorskip("jsonargparse")
pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from halotune import HRAConfig, LoHaConfig, get_peft_model  # noqa: E402
from halotune.core.errors import HalotuneError  # noqa: E402
from halotune.integrations.trl import AdapterSFTTrainer  # noqa: E402
from halotune.recipes import SFTConfig, train_sft  # noqa: E402
from halotune.recipes.common.run import read_lines  # noqa: E402
from halotune.recipes.sft import compile_blocks, read_data, thrifty_inductor  # noqa: E402

from .problems import base_folder, problem, sft_arguments, tiny_llama, tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("sft") / "base")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chats(n: int) -> list[dict[str, Any]]:
    pairs = [problem(i) for i in range(n)]
    return [
        {"messages": [{"role": "user", "content": p["question"]}, {"role": "assistant", "content": p["answer"]}]} for p in pairs
    ]


def config(base: Path, folder: Path, **changes: Any) -> SFTConfig:
    usual: dict[str, Any] = {"model": str(base), "template": "plain", "max_length": 128, "batch_size": 4, "adapter": {"r": 4}}
    run = {"output": str(folder / "run"), "max_steps": 2, "log_every": 1, "tracker": "none", "device": "cpu"}
    return SFTConfig(**{**usual, **run, **changes})


# -- the head


def trainer(model: Any, folder: Path) -> AdapterSFTTrainer:
    ids = torch.randint(5, 400, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": i, "labels": [-100] * (k % 4) + i[k % 4 :]} for k, i in enumerate(ids)]
    data = datasets.Dataset.from_list(rows)
    return AdapterSFTTrainer(
        model, args=sft_arguments(folder), train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )


HEADS = {
    "rotated": HRAConfig(r=4, target_modules=["q_proj", "lm_head"], init_weights=False, task_type="CAUSAL_LM"),
    "added to": LoHaConfig(r=2, target_modules=["q_proj", "lm_head"], init_weights=False, task_type="CAUSAL_LM"),
    "fully fine-tuned": HRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_trained_head_learns_under_the_chunked_loss(kind: str, tmp_path: Path) -> None:
    """Loss and gradients are those of the model's own forward, and the head moves."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), HEADS[kind])
    made = trainer(model, tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    counted = (batch["labels"][:, 1:] != -100).sum()
    own = model(**batch, use_cache=False).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chunked = made.compute_loss(model, dict(batch), num_items_in_batch=counted)
    chunked.backward()
    assert chunked.item() == pytest.approx(own.item(), rel=1e-5)
    head = [n for n in expected if "lm_head" in n]
    assert head and expected.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in head}
    made.train()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in head)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a tensor made inside has had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(
            [self.most, *(t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t))]
        )
        return out


@pytest.mark.parametrize("kind", [None, *HEADS])
def test_the_logits_are_never_there(kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in training nor in evaluation; a tile of them is a quarter here."""
    config = HEADS[kind] if kind else HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 8192)  # of the vocabulary; TRL's is 32,768
    vocabulary = 4 * 8192
    model = get_peft_model(tiny_llama(vocab_size=vocabulary), config)
    made = trainer(model, tmp_path)
    rows = {name: t.repeat(8, 2) for name, t in next(iter(made.get_train_dataloader())).items()}
    logits = rows["input_ids"].numel() * vocabulary
    with Largest() as training:
        made.compute_loss(model, dict(rows)).backward()
    model.eval()
    with Largest() as evaluation:
        made.prediction_step(model, dict(rows), prediction_loss_only=True)
    model.merge_adapter()  # which is refused of a layer that is not called
    model.unmerge_adapter()
    assert 0.2 * logits < evaluation.most < 0.3 * logits and training.most < 0.3 * logits
    with Largest() as whole:
        model(**rows)
    assert whole.most >= logits


def test_trained_parameters_keep_their_precision_on_a_quantized_base(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().is_loaded_in_4bit = True
    model.is_loaded_in_4bit = True
    trainer(model, tmp_path)
    assert all(torch.equal(start[n], p) for n, p in model.named_parameters() if p.requires_grad)


# -- the recipe


@pytest.mark.parametrize("kind", ["messages", "pairs", "text"])
def test_rows_of_every_kind_are_learned(kind: str, base: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = chats(24)
    if kind == "pairs":
        rows = [{"prompt": r["messages"][0]["content"], "response": r["messages"][1]["content"]} for r in rows]
    if kind == "text":
        rows = [{"text": r["messages"][1]["content"]} for r in rows]
    record = train_sft(config(base, tmp_path, data=write(tmp_path / "rows.jsonl", rows), evaluation=0.25))
    assert record["rows"] == {"train": 18, "evaluation": 6, "cut": 0} and record["status"] == "finished"
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["loss"] > 0 and line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert record["results"]["last"]["loss"] == pytest.approx(-record["results"]["last"]["log_likelihood"])
    assert "num_tokens" not in record["results"]["last"]


def test_packing_changes_no_evaluation(base: Path, tmp_path: Path) -> None:
    """A loss is the mean over tokens, whichever rows they stand in."""
    data = write(tmp_path / "rows.jsonl", chats(16))
    held = write(tmp_path / "held.jsonl", chats(9))
    found = []
    for packing in (True, False):
        own = {"output": str(tmp_path / f"packing-{packing}"), "packing": packing, "learning_rate": 1e-9}
        found.append(train_sft(config(base, tmp_path, data=data, evaluation=held, **own))["results"]["last"]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_dry_run_shows_what_counts_and_writes_nothing(base: Path, tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "rows.jsonl", chats(8))
    train_sft(config(base, tmp_path, data=data), dry_run=True)
    text = capsys.readouterr().out
    assert "How many" in text and "in all?\n⟦" in text and "</s>⟧" in text and "trained parameters: " in text
    assert not (tmp_path / "run").exists()


def test_the_rows_held_out_are_the_same_for_all_seeds(tmp_path: Path) -> None:
    """So that deviations over seeds are those of training, not of the questions."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {n}", "response": str(n)}) + "\n" for n in range(20)))
    found = [read_data(SFTConfig(model="m", data=str(file), evaluation=0.25, seed=seed)) for seed in (0, 1)]
    assert found[0] == found[1] and [len(rows) for rows in found[0]] == [15, 5, 0]
    with pytest.raises(HalotuneError, match=r"evaluation: 0\.9 of 1 rows leaves nothing to learn from"):
        read_data(SFTConfig(model="m", data=str(file), evaluation=0.9, max_rows=1))


def test_bad_rows_are_listed(base: Path, tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "rows.jsonl", [*chats(8), {"messages": []}, {"x": 1}])
    with pytest.raises(HalotuneError, match=r"rows.jsonl, line 9: .*--skip-bad-rows"):
        train_sft(config(base, tmp_path, data=data))
    record = train_sft(config(base, tmp_path, data=data, skip_bad_rows=True))
    assert record["skipped"]["count"] == 2 and "line 10" in record["skipped"]["rows"][1]
    assert "left out: " in capsys.readouterr().err


def test_a_base_without_a_template_says_what_to_do(base: Path, tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match=r"no chat template.*--template: alpaca, chatml, plain"):
        train_sft(config(base, tmp_path, data=write(tmp_path / "rows.jsonl", chats(4)), template="auto"))


def test_an_answer_that_never_begins(base: Path, tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="max_length: of no row"):
        train_sft(config(base, tmp_path, data=write(tmp_path / "rows.jsonl", chats(4)), max_length=10))


def test_blocks_are_compiled_where_it_pays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(**changes: Any) -> bool:
        return config(base, tmp_path, data="rows.jsonl", **{"device": "auto", **changes}).compiled

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not compiled() and compiled(compile=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiled() and not compiled(compile=False) and not compiled(device="cpu")
    assert not any(compiled(**own) for own in ({"packing": False}, {"quant": "nf4"}, {"deterministic": True}))


def test_activations_are_offloaded_where_it_costs_no_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offloads(**changes: Any) -> bool:
        return config(base, tmp_path, data="rows.jsonl", **{"device": "auto", **changes}).offloads

    with pytest.raises(HalotuneError, match="offload_activations: is for CUDA devices"):
        offloads(device="cpu", offload_activations=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not offloads() and offloads(gradient_checkpointing=True) and offloads(offload_activations=True)
    assert not offloads(gradient_checkpointing=True, compile=False)
    assert not offloads(gradient_checkpointing=True, compile=True, device="cpu")
    assert not offloads(gradient_checkpointing=True, offload_activations=False)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")  # its own, while it traces
def test_compiled_blocks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_llama(), HRAConfig(r=4, target_modules="all-linear", init_weights=False))
    ids = torch.arange(3, 40)[None]
    plain = model(ids, use_cache=False).logits
    names = list(model.state_dict())
    compiled: list[Any] = []
    usual = torch.nn.Module.compile

    def traced(module: torch.nn.Module, backend: Any) -> None:
        compiled.append(module)
        usual(module, backend="aot_eager")  # the graphs, without a C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compile_blocks(model)
    assert len(compiled) == 2 and list(model.state_dict()) == names
    assert torch.allclose(model(ids, use_cache=False).logits, plain, atol=1e-5)
    with pytest.raises(HalotuneError, match=r"has no repeated blocks\. Leave out --compile"):
        compile_blocks(get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])))


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")  # its own, while it traces
def test_compiled_blocks_keep_no_more_than_products_and_attention_need(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    inductor = aot_autograd(fw_compiler=eager, bw_compiler=eager, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", inductor)  # its graphs, without a C++ compiler

    def trained(backend: Any) -> tuple[int, list[torch.Tensor], int]:
        torch.compiler.reset()
        graphs.clear()
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), HRAConfig(r=4, target_modules="all-linear"))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        compile_blocks(model)
        for block in model.get_base_model().model.layers:  # type: ignore[union-attr]
            block.compile(backend=backend)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(torch.arange(3, 259)[None] % 60, use_cache=False).logits.square().mean()
        loss.backward()
        called = [str(n.target) for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
        products = sum("mm" in name or "attention" in name for name in called)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return sum(size for place, size in kept.items() if place not in own), gradients, products

    kept, gradients, products = trained(thrifty_inductor)
    usual = trained(inductor)
    assert kept <= 0.9 * usual[0] and products == usual[2] > 0
    for ours, theirs in zip(gradients, usual[1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
