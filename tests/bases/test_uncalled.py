"""Adapted layers that a pass does not call, though it runs what holds them, are named once; a pass in part is no such case."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import halotune
from halotune import HRAConfig, LoraConfig, PeftModel
from halotune.engine.injection.first_pass import Note


class Reader(nn.Module):
    """Reads a kernel, as a TDNN does."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.out, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.kernel.weight, self.kernel.bias))


class Experts(nn.Module):
    """Each token goes to one of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor, used: tuple[int, ...] = (0, 2)) -> Tensor:
        return x + self.gate(x).sum() + sum(self.experts[i](x) for i in used)


class Branches(nn.Module):
    """Two parts, of which a pass may run one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor, right: bool = False, checkpointed: bool = False) -> Tensor:
        part = self.right if right else self.left
        return checkpoint(part, x, use_reentrant=False) if checkpointed else part(x)  # type: ignore[return-value]


def adapted(model: nn.Module, targets: list[str] | str = "all-linear") -> PeftModel:
    return halotune.get_peft_model(model, HRAConfig(r=2, target_modules=targets))


def hooks(model: nn.Module) -> int:
    return sum(isinstance(h, Note) for m in model.modules() for h in m._forward_pre_hooks.values())


def test_they_are_named_once() -> None:
    model, x = adapted(Reader(), ["kernel", "out", "unused"]), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"^kernel, unused: not called in the first pass.*exclude_modules\.$") as caught:
        model(x)
    assert len(caught) == 1 and caught[0].filename == __file__
    model(x)
    assert not hooks(model)


def test_idle_experts_are_one_group() -> None:
    model, x = adapted(Experts()), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"^Idle in the first pass: experts \(2 of 4\); .*when they are called\.$") as caught:
        model(x)
    assert len(caught) == 1
    model(x, used=(1,))


def test_a_second_adapter_watches_its_own_layers() -> None:
    model, x = adapted(Reader(), ["out"]), torch.randn(2, 6)
    model(x)
    model.add_adapter("b", HRAConfig(r=2, target_modules=["out", "kernel"]))
    with pytest.warns(UserWarning, match=r"^kernel: not called in the first pass, though what holds it was"):
        model(x)
    assert not hooks(model)


def test_an_adapter_that_is_taken_out_is_not_missed() -> None:
    model, x = adapted(Reader(), ["out"]), torch.randn(2, 6)
    model.add_adapter("b", HRAConfig(r=2, target_modules=["kernel"]))
    model.delete_adapter("b")
    model(x)
    model.add_adapter("b", HRAConfig(r=2, target_modules=["kernel"]))
    with pytest.warns(UserWarning, match="^kernel: not called"):
        model(x)


def test_an_adapter_that_is_put_in_again_is_watched_again() -> None:
    model, x = adapted(Reader(), ["out"]), torch.randn(2, 6)
    model.delete_adapter("default")
    model.add_adapter("default", HRAConfig(r=2, target_modules=["out"]))
    model(x)
    assert not hooks(model)


@pytest.mark.parametrize("kwargs", [{}, {"right": True}, {"checkpointed": True}], ids=str)
def test_a_part_that_does_not_run_is_legitimate(kwargs: dict) -> None:
    adapted(Branches())(torch.randn(2, 6), **kwargs)


def test_a_part_called_alone_says_nothing() -> None:
    model, x = adapted(Reader(), ["kernel", "out"]), torch.randn(2, 6)
    model.get_base_model().out(x)
    with pytest.warns(UserWarning, match="^kernel: not called"):
        model(x)


def test_unloading_before_any_pass_leaves_no_hooks() -> None:
    plain = Reader()
    adapted(plain, ["kernel", "out"]).unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    plain(torch.randn(2, 6))


def test_copies_and_pickles_watch_for_themselves() -> None:
    model, x = adapted(Reader(), ["kernel", "out"]), torch.randn(2, 6)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), model):
        with pytest.warns(UserWarning, match="^kernel: not called") as caught:
            other(x)
        assert len(caught) == 1
        other(x)


def test_threads_share_one_warning() -> None:
    model, x = adapted(Reader(), ["kernel", "out"]), torch.randn(2, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=model, args=(x,)) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert [str(w.message)[:18] for w in caught] == ["kernel: not called"]


def test_a_model_inside_a_wrapper_of_torchs() -> None:
    model, x = adapted(nn.DataParallel(Reader()), ["kernel", "out"]), torch.randn(2, 6)
    with pytest.warns(UserWarning, match="^kernel: not called"):
        model(x)
    assert not hooks(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("part", ["model", "base", "block", "function"])
@torch.no_grad()
def test_compiled_code_says_nothing(part: str) -> None:
    """Its calls are not seen, and nothing is said of what was not seen."""
    plain = Branches()
    base = torch.compile(plain, backend="eager") if part == "base" else plain
    model, x = adapted(base), torch.randn(2, 6)  # type: ignore[arg-type]
    if part == "block":
        plain.left.compile(backend="eager")
    if part == "function":
        plain.forward = torch.compile(plain.forward, backend="eager")  # type: ignore[method-assign]
    run = torch.compile(model, backend="eager") if part == "model" else model
    for _ in range(2):
        run(x)


# -- models of transformers

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_generating() -> None:
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=None, pad_token_id=0))
    adapted(plain).generate(torch.tensor([[3, 4]]), max_new_tokens=2)
    seq2seq = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    plain = T5ForConditionalGeneration(seq2seq)
    model = adapted(plain)
    states = model.encoder(input_ids=torch.tensor([[3, 4]]))
    model(encoder_outputs=states, decoder_input_ids=torch.tensor([[0, 3]]))


def test_text_alone_in_a_vision_language_model() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", **SIZES},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **vision},
        image_token_index=31,
    )
    model = halotune.get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(target_modules="all-linear"))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert not hooks(model)


def test_what_has_no_effect_is_not_merged():
    """A layer whose weight is read runs without its adapter; in the weight, the adapter would change the output."""
    torch.manual_seed(0)
    model = halotune.get_peft_model(Reader(), LoraConfig(r=2, target_modules=["kernel", "out"]))
    x = torch.randn(3, 6)
    with pytest.warns(UserWarning, match="kernel: not called in the first pass"):
        model(x)
    model.merge_adapter()  # no delta yet: nothing to refuse
    model.unmerge_adapter()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * p.requires_grad)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(halotune.HalotuneError, match=r"^kernel: the model did not call this layer.*Nothing was merged"):
        model.merge_and_unload()
    assert all(map(torch.equal, before, model.parameters()))
    copied = copy.deepcopy(model)
    copied.get_base_model().kernel(x)  # somebody calls it
    copied.merge_adapter()
    assert copied.merged_adapters and not model.merged_adapters
