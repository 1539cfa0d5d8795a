"""One process, several devices: `device_map` splits a Llama, accelerate's hooks bring tensors from one part to the next.

Without two GPUs the other part of the model lies on the disk, and runs on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halotune
from halotune import PeftModel
from halotune.core.layer import AdaptedLayer
from halotune.engine.forward import prepare as preparing

from .cases import METHODS, batch, configured, llama, randomized, same, steps, trained

GPUS = torch.cuda.device_count()
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices, to split a model between them")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
every_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True)
class Places:
    """Where the parts of a model go. Inputs, and the model in one piece, are on the first."""

    names: tuple[Any, ...]
    folder: Path

    @property
    def first(self) -> torch.device:
        return torch.device(self.names[0])

    @property
    def moves(self) -> bool:
        return "disk" not in self.names

    def base(self, **sizes: Any) -> nn.Module:
        """Two blocks for each place. Sizes are those of which every method takes any layer."""
        return llama(num_hidden_layers=2 * len(self.names), vocab_size=40, **sizes)

    def map(self) -> dict[str, Any]:
        """Blocks in pairs; the norm with the last of them, and the output layer, which gets its input, with the first."""
        first, last = self.names[0], self.names[-1]
        blocks = {f"model.layers.{i}": self.names[i // 2] for i in range(2 * len(self.names))}
        ends = {"model.embed_tokens": first, "model.rotary_emb": first, "lm_head": first}
        return {**ends, **blocks, "model.norm": last if self.moves else first}

    def split(self, base: nn.Module, prefix: str = "", **others: Any) -> Any:
        from accelerate import dispatch_model

        places = {f"{prefix}{name}": place for name, place in (self.map() | others).items()}
        return dispatch_model(base, places, main_device=self.names[0], offload_dir=self.folder / "disk")

    def auto(self) -> nn.Module:
        """Loaded as people load what is too large for one device."""
        from transformers import LlamaForCausalLM

        base = self.base()
        base.save_pretrained(self.folder / "base")
        size = sum(p.numel() * p.element_size() for p in base.parameters())
        how = {} if self.moves else {"max_memory": {"cpu": size // 2}, "offload_folder": self.folder / "disk"}
        return LlamaForCausalLM.from_pretrained(self.folder / "base", device_map="auto", **how).train()


@pytest.fixture(params=[pytest.param("gpus", marks=[pytest.mark.gpu, needs_two]), "disk"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    return Places(tuple(range(GPUS)) if request.param == "gpus" else ("cpu", "disk"), tmp_path)


def put_on(base: nn.Module, method: str, **options: Any) -> Any:
    return randomized(halotune.get_peft_model(base, configured(method, target_modules=TARGETS, **options)))


def in_one_piece(places: Places, method: str, **options: Any) -> Any:
    return put_on(places.base().to(places.first), method, **options)


def layers(model: nn.Module) -> list[AdaptedLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]


def assert_in_place(model: Any) -> None:
    """Every adapter lies where its layer runs, and no part of the base has moved."""
    found = set()
    for layer in layers(model):
        (here,) = {p.device for p in layer.adapters.parameters()}
        assert here == layer.base.device
        found.add(layer.base_layer.weight.device)
    assert len(found) > 1


def loaded_at_once(places: Places, method: str) -> Any:
    return put_on(places.auto(), method)


def split_first(places: Places, method: str) -> Any:
    return put_on(places.split(places.base()), method)


def split_afterwards(places: Places, method: str) -> Any:
    return places.split(put_on(places.base(), method), "base_model.model.")


def checkpointed(places: Places, method: str) -> Any:
    model = split_first(places, method)
    model.enable_input_require_grads()
    base = model.get_base_model()  # transformers has two names for it
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    return model


def as_weights(places: Places, method: str) -> Any:
    """W' of all layers of one shape on one device at once."""
    model = split_first(places, method)
    model.set_adapter_form("weights")
    return model


WAYS = [loaded_at_once, split_first, split_afterwards, checkpointed, as_weights]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
@every_method
def test_training(places: Places, method: str, way: Callable[[Places, str], Any]) -> None:
    """Losses, gradients, their norm and the optimizer's steps are those of the model on one device."""

    def batches(step: int) -> list[dict[str, Tensor]]:
        return [batch(step, places.first)]

    expected, model = steps(in_one_piece(places, method), batches), way(places, method)
    found = steps(model, batches)
    assert_in_place(model)
    for step, (one, two) in enumerate(zip(expected, found, strict=True)):
        same(two[0], one[0], 1e-4 if step else 1e-5, f"step {step}: the loss")  # Adam takes the signs of small gradients
        same(two[1], one[1], 1e-4, f"step {step}: the norm of all gradients")
        assert one[2].keys() == two[2].keys()
        for name, grad in one[2].items():
            same(two[2][name], grad, 1e-4, f"step {step}: the gradient of {name}")


@every_method
@torch.no_grad()
def test_merging(places: Places, method: str) -> None:
    one, model = in_one_piece(places, method).eval(), split_first(places, method).eval()
    given = batch(1, places.first)
    plain = [layer.merged_weight([]).clone() for layer in layers(model)]
    logits, expected = model(**given).logits, one(**given).logits
    same(logits, expected, what="logits")
    reports = [m.merge_adapter().total().to_dict() for m in (model, one)]
    assert reports[0] == pytest.approx(reports[1], rel=1e-3) and reports[0]["delta"] > 0
    same(model(**given).logits, expected, what="merged")
    with model.disable_adapter(), one.disable_adapter():
        base = model(**given).logits
        same(base, one(**given).logits, what="disabled")
    assert (base - logits).norm() > 0.01 * logits.norm()
    model.unmerge_adapter()
    assert torch.equal(model(**given).logits, logits)
    assert all(torch.equal(layer.merged_weight([]), W) for layer, W in zip(layers(model), plain, strict=True))
    assert_in_place(model)
    out = model.merge_and_unload()
    same(out(**given).logits, expected, what="unloaded")
    assert len({p.device for p in out.parameters()}) > 1


@every_method
def test_generation(places: Places, method: str) -> None:
    """In evaluation, in training's mode between two steps, and with whole weights kept."""
    ids = batch(1, places.first)["input_ids"]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    one, model = in_one_piece(places, method), split_first(places, method)
    expected = one.eval().generate(input_ids=ids, **how)
    for kept in (0, 1):
        model.cache_weights(gib=kept)
        assert torch.equal(model.eval().generate(input_ids=ids, **how), expected)
        model.train()(**batch(0, places.first)).loss.backward()


@every_method
def test_files(places: Places, method: str) -> None:
    """Saved from a split model and loaded, in one piece and split; swapped in; exported."""
    given, model = batch(1, places.first), split_first(places, method)
    loss = model(**given).loss
    model.save_pretrained(places.folder / "split")
    in_one_piece(places, method).save_pretrained(places.folder / "one")
    found, due = (load_file(places.folder / f / "adapter_model.safetensors") for f in ("split", "one"))
    assert found.keys() == due.keys() and all(torch.equal(t, due[key]) for key, t in found.items())
    for base in (places.base().to(places.first), places.split(places.base())):
        again = PeftModel.from_pretrained(base, places.folder / "split", is_trainable=True).train()
        same(again(**given).loss, loss, what="loaded")
    assert_in_place(again)
    randomized(again, 2)
    with pytest.raises(AssertionError):
        same(again(**given).loss, loss)
    halotune.hotswap_adapter(again, places.folder / "split")
    same(again(**given).loss, loss, what="swapped in")
    again.load_adapter(places.folder / "split", "b", is_trainable=True)
    again.set_adapter("b")
    same(again(**given).loss, loss, what="a second one")
    assert_in_place(again)
    if method not in ("bat", "oft"):  # whose deltas are of full rank
        model.export("lora", places.folder / "lora")
        exported = PeftModel.from_pretrained(places.base().to(places.first), places.folder / "lora")
        same(exported(**given).loss, loss, 1e-4, "exported")


# -- more than one adapter, and more than adapters


def test_an_adapter_for_each_sample(places: Places) -> None:
    found = []
    for model in (in_one_piece(places, "hra"), split_first(places, "hra")):
        model.add_adapter("b", configured("lora", target_modules=TARGETS))
        model.set_adapter(["default", "b"])
        randomized(model, 3)
        loss = model(**batch(1, places.first), adapter_names=["b", "__base__", "default"]).loss
        loss.backward()
        found.append([loss, *(p.grad for p in trained(model).values())])
        model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum", "lora")
        model.set_adapter("sum")
        found[-1].append(model(**batch(1, places.first)).loss)
    assert_in_place(model)
    for two, one in zip(*reversed(found), strict=True):
        same(two, one, 1e-4)


def test_the_penalty_joins_the_loss(places: Places) -> None:
    """It is where the first layers are, as the loss is."""
    found = []
    for base in (places.base().to(places.first), places.split(places.base())):
        model = put_on(base, "hra", orthogonality_weight=0.1)
        loss = model(**batch(0, places.first)).loss + model.penalty()
        loss.backward()
        found.append([loss, *(p.grad for p in trained(model).values())])
    for two, one in zip(*reversed(found), strict=True):
        same(two, one, 1e-4)


def test_a_trained_output_layer(places: Places) -> None:
    """`modules_to_save`: the copy gets its input from another device."""
    found = []
    for base in (places.base().to(places.first), places.split(places.base())):
        config = configured("hra", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
        model = randomized(halotune.get_peft_model(base, config))
        found.append(steps(model, lambda step: [batch(step, places.first)]))
    for two, one in zip(*reversed(found), strict=True):
        same(two[0], one[0], 1e-4, "loss")
        same(two[1], one[1], 1e-4, "norm of the gradients")


# -- what lies on one device alone is prepared together


@pytest.mark.parametrize("others", [pytest.param("gpus", marks=[pytest.mark.gpu, needs_two]), "meta"])
@pytest.mark.parametrize("form", ["activations", "weights"])
@every_method
def test_each_device_prepares_for_its_layers(method: str, form: Any, others: str, tmp_path: Path, monkeypatch) -> None:
    """Without GPUs the other device is "meta", taken for one that has numbers."""
    places = Places(tuple(range(GPUS)) if others == "gpus" else ("cpu", "meta"), tmp_path)
    base = places.split(places.base(), lm_head=places.names[-1])
    if others == "meta":
        monkeypatch.setattr(preparing, "_is_at_hand", lambda t: True)
        base._hf_hook.io_same_device = False  # no output comes back from there
    model, calls, usual = put_on(base, method), [], preparing.prepare
    model.set_adapter_form(form)

    def prepare(preparation: Any, adapters: Any) -> Any:
        calls.append([t.device for tensors in adapters for t in tensors])
        return usual(preparation, adapters)

    monkeypatch.setattr(preparing, "prepare", prepare)
    y = model(input_ids=batch(0, places.first)["input_ids"]).logits
    assert y.requires_grad and y.shape == (2, 5, 40)
    assert all(len(set(devices)) == 1 for devices in calls)
    of = [[layer.base.device for layer in layers(model)], [devices[0] for devices in calls]]
    assert set(of[0]) == set(of[1]) and len(set(of[0])) == len(places.names)
    for device in set(of[0]):  # two blocks: q and o, gate and up … of both
        assert of[1].count(device) <= of[0].count(device) // 2


@pytest.mark.parametrize("train", [True, False])
@every_method
def test_a_layer_called_from_another_device(method: str, train: bool) -> None:
    """accelerate brings a layer's input to it: the adapters of it meet it there. Here on the meta device, without numbers."""
    from accelerate import dispatch_model

    base = dispatch_model(llama(vocab_size=40), {"model": "cpu", "lm_head": "meta"}, main_device="cpu", force_hooks=True)
    model = halotune.get_peft_model(base, configured(method, target_modules=["lm_head"])).train(train)
    x = torch.randn(2, 5, 16, requires_grad=True)
    y = model.get_base_model().lm_head(x)
    assert y.is_meta and y.shape == (2, 5, 40) and y.requires_grad


# -- half precision: kernels are launched on every device


@needs_two
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["activations", "weights"])
@every_method
def test_kernels_on_every_device(method: str, form: Any, tmp_path: Path) -> None:
    """In bf16, where kernels win: as near to fp32 as the model on one device. Backward runs on all devices at once."""
    places = Places(tuple(range(GPUS)), tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    exact = steps(put_on(places.base(**sizes).to(places.first), method), lambda step: [batch(step, places.first)], 1)

    def errors(base: nn.Module) -> list[float]:
        model = put_on(base, method)
        model.set_adapter_form(form)
        found = steps(model, lambda step: [batch(step, places.first)], 1)
        errors = [float((found[0][0].float() - exact[0][0]).abs().max() / exact[0][0].abs().max())]
        for name, grad in exact[0][2].items():
            errors.append(float((found[0][2][name] - grad).norm() / grad.norm()))
        return errors

    half = places.base(**sizes).to(torch.bfloat16)
    one, split = errors(copy.deepcopy(half).to(places.first)), errors(places.split(half))
    assert all(b <= 3 * a + 0.03 for a, b in zip(one, split, strict=True)), (one, split)


@needs_two
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_method
def test_replicas_on_every_device(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`DataParallel`: a thread for each device, all of which compile and launch at the same time."""
    places = Places(tuple(range(GPUS)), tmp_path)
    base = places.base(hidden_size=64, intermediate_size=96).to(places.first)
    exact, one, model = (put_on(copy.deepcopy(base).to(d), method) for d in (torch.float32, dtype, dtype))
    ids = torch.randint(37, (2 * GPUS, 6), device=places.first)

    def results(run: Callable[..., Any], parameters: dict[str, nn.Parameter]) -> list[Tensor]:
        loss = run(input_ids=ids, use_cache=False).logits.float().square().mean()
        grads = torch.autograd.grad(loss, list(parameters.values()))
        # In bf16 all gradients as one: of a single layer's, which may be small, rounding can be lucky in the one model alone.
        return [loss.detach(), *(grads if dtype is torch.float32 else [torch.cat([g.flatten() for g in grads])])]

    due = results(exact, trained(exact))
    for _ in range(2):
        alone, found = results(one, trained(one)), results(nn.DataParallel(model), trained(model))
        for a, b, c in zip(alone, found, due, strict=True):
            assert (b - c).norm() <= 3 * (a - c).norm() + (1e-3 if dtype is torch.float32 else 0.03) * c.norm()


# -- the Trainer


def test_the_trainer(places: Places) -> None:
    """In one process: it leaves a model that is split where it is."""
    from transformers import PrinterCallback, Trainer

    from tests.integrations.models import arguments, losses

    rng, found = torch.Generator().manual_seed(0), []
    ids = torch.randint(37, (16, 6), generator=rng).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for base in (places.base().to(places.first), places.split(places.base())):
        args = arguments(places.folder / "run", use_cpu=not places.moves, per_device_train_batch_size=4)
        args._n_gpu = min(args.n_gpu, 1)  # else the first one would be replicated
        trainer = Trainer(put_on(base, "hra"), args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found.append(torch.tensor(losses(trainer)))
    assert_in_place(trainer.model)
    assert getattr(trainer.model, "hf_device_map", None) == places.map() and len(found[0]) == 4
    same(found[1], found[0], 1e-4)
