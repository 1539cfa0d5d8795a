"""Packed rows cost nothing in exactness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

# TRL sets checkpointing under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")

import trl  # noqa: E402

from halotune import HRAConfig, get_peft_model  # noqa: E402
from halotune.core.errors import HalotuneError  # noqa: E402
from halotune.integrations.trl import AdapterSFTTrainer  # noqa: E402
from halotune.recipes.language.packing import PackedCollator, check_isolation, fill, share_mask  # noqa: E402
from halotune.recipes.language.rows import Conversation  # noqa: E402
from halotune.recipes.language.tokens import IGNORED, encode_all, set_template  # noqa: E402

from .problems import problem, sft_arguments, tiny_llama, tokenizer  # noqa: E402

LENGTH = 256


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    tok = tokenizer()
    set_template(tok, "plain")
    found = [problem(n) for n in range(200)]
    pairs = [({"role": "user", "content": p["question"]}, {"role": "assistant", "content": p["answer"]}) for p in found]
    return encode_all(tok, [Conversation(list(pair), (1,)) for pair in pairs], LENGTH)[0]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return made


def packed(rows: list[dict[str, list[int]]]) -> Any:
    return trl.pack_dataset(datasets.Dataset.from_list(rows), LENGTH)


def total(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    """The summed loss over all tokens that count, and its gradients."""
    model.zero_grad()
    loss = torch.zeros(())
    for batch in batches:
        counted = (batch["labels"][:, 1:] != IGNORED).sum()
        part = model(**batch, use_cache=False).loss * counted
        part.backward()
        loss += part.detach()
    return loss.item(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "shared mask"])
@pytest.mark.parametrize("length", [None, LENGTH + 8])
def test_losses_and_gradients_are_the_unpacked_ones(attention, length, rows, model):
    if attention == "shared mask":
        share_mask(model.get_base_model())
    else:
        model.config._attn_implementation = attention
    some = rows[:12]
    joined = list(packed(some))
    assert max(len(row["seq_lengths"]) for row in joined) > 1
    together, grads = total(model, [PackedCollator(2, length)(joined)])
    single = [{k: torch.tensor([v]) for k, v in row.items()} for row in some]
    apart, expected = total(model, single)
    assert together == pytest.approx(apart, rel=1e-5)
    for found, wanted in zip(grads, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("shared", [False, True])
def test_the_numbers_of_a_mask_are_kept_once(shared, rows, model):
    """For backward; else every layer keeps its own."""
    if shared:
        share_mask(model.get_base_model())
    batch = PackedCollator(2)(list(packed(rows[:12])))
    n = batch["input_ids"].shape[1]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**batch, use_cache=False)
    masks = {t.untyped_storage().data_ptr() for t in kept if t.is_floating_point() and t.shape[-2:] == (n, n)}
    assert len(masks) == (1 if shared else model.config.num_hidden_layers)


def test_an_example_does_not_see_its_neighbour(rows, model):
    """Else the test above could hold of one whose influence is small."""
    share_mask(model.get_base_model())
    joined = next(row for row in packed(rows[:12]) if len(row["seq_lengths"]) > 1)
    batch = PackedCollator(2)([joined])
    first = joined["seq_lengths"][0]
    before = model(**batch, use_cache=False).logits[0, first:]
    batch["input_ids"][0, :first] = 7
    assert torch.equal(model(**batch, use_cache=False).logits[0, first:], before)


def test_nearly_all_tokens_are_real():
    """At the lengths that worked problems of GSM8K have, in rows of 1024."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.exp(5.2 + 0.4 * torch.randn(800, generator=rng)).int().clamp(max=1024).tolist()
    rows = datasets.Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n} for n in lengths])
    assert fill(trl.pack_dataset(rows, 1024), 1024) >= 0.95


def test_a_model_that_looks_over_the_border_is_found(model):
    check_isolation(model)
    model.config._attn_implementation = "eager"
    model.get_base_model().model.config.use_cache = True

    def leaky(input_ids, position_ids, **kwargs):  # takes no notice of where an example begins
        return whole(input_ids=input_ids, **kwargs)

    whole = model.forward
    model.forward = leaky
    with pytest.raises(HalotuneError, match="--packing false"):
        check_isolation(model)


def test_the_trainer_takes_packed_rows(rows, model, tmp_path):
    args = sft_arguments(tmp_path, per_device_train_batch_size=2, per_device_eval_batch_size=3, logging_steps=1)
    data = packed(rows)
    trainer = AdapterSFTTrainer(
        model,
        args=args,
        data_collator=PackedCollator(2, LENGTH),
        train_dataset=data,
        eval_dataset=packed(rows[:40]),
        processing_class=tokenizer(),
    )
    found = trainer.evaluate()["eval_loss"]
    singles = [{k: torch.tensor([v]) for k, v in row.items()} for row in rows[:40]]
    counted = sum((s["labels"][:, 1:] != IGNORED).sum().item() for s in singles)
    with torch.no_grad():
        expected = sum(model(**s).loss.item() * (s["labels"][:, 1:] != IGNORED).sum().item() for s in singles) / counted
    assert found == pytest.approx(expected, rel=1e-5)  # over tokens, not over batches
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and logged[0]["num_tokens"] == 2 * LENGTH
