"""What people do in training under FSDP2, on two processes: it gives what one process gives."""

from __future__ import annotations

import functools
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

import halotune
from halotune import HalotuneError, PeftModel

from .cases import adapted, batch, configured, failures, llama, randomized, same, trained, whole
from .launch import spawn
from .test_checkpoints import fsdp2_on_cpus, shared_folder
from .test_fsdp2 import report, sharded


def losses_and_gradients(model: Any, ranks: range, extra: Any = lambda model: 0.0) -> tuple[list[Any], dict[str, Any]]:
    """Of the mean over the batches of these ranks, and of what is added to it."""
    losses = [model(**batch(r)).loss for r in ranks]
    (torch.stack(losses).mean() + extra(model)).backward()
    return losses, {name: whole(p.grad) for name, p in trained(model).items()}


def agree(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        same(found[name], grad, tolerance, f"the gradient of {name}")


# -- precision


def mixed_precision(rank: int) -> None:
    """Parameters are gathered in bf16, and gradients reduced in fp32: what one process with adapters in bf16 computes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for method in ("hra", "bat", "lora"):
        losses, grads = [], []
        for r in range(2):
            one = adapted(method, llama().to(torch.bfloat16)).to(torch.bfloat16)
            (loss,), found = losses_and_gradients(one, range(r, r + 1))
            losses.append(loss)
            grads.append({name: g.float() for name, g in found.items()})
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(adapted(method, llama().to(torch.bfloat16)), "block", mp_policy=policy)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
        same(loss, losses[rank], what=f"{method}: loss")
        assert all(p.dtype is p.grad.dtype is torch.float32 for p in trained(model).values())
        agree(found, {name: (g + grads[1][name]) / 2 for name, g in grads[0].items()})
        optimizer.step()
        ids = batch(rank)["input_ids"]
        assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def in_four_bits(method: str, folder: Path, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": dtype, "bnb_4bit_compute_dtype": dtype}
    kind = BitsAndBytesConfig(load_in_4bit=True, **how)
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=kind, device_map="cpu", dtype=dtype)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype is dtype
    return adapted(method, base)


def four_bits(rank: int) -> None:
    """A base of bitsandbytes' nf4, whose packed weights are stored as floats, so that they are sharded like others."""
    with shared_folder() as folder:
        if rank == 0:
            llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
        dist.barrier()
        for method, dtype in (
            ("hra", torch.float32),
            ("bat", torch.float32),
            ("loha", torch.bfloat16),
            ("oft", torch.bfloat16),
        ):
            made = functools.partial(in_four_bits, method, folder / "base", dtype)
            losses, wanted = losses_and_gradients(made(), range(2))
            model = sharded(made(), "block")
            packed = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
            assert packed.to_local().numel() * 2 == packed.numel() == 64 * 64 // 2 // dtype.itemsize
            (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
            same(loss, losses[rank], what=f"{method}: loss")
            agree(found, wanted, 1e-5 if dtype is torch.float32 else 1e-2)
            with pytest.raises(HalotuneError, match="holds a part of its weight"):
                model.merge_adapter()
            model.save_pretrained(folder / method)
            dist.barrier()
            again = PeftModel.from_pretrained(made().unload(), folder / method, is_trainable=True)
            same(again(**batch(rank)).loss, losses[rank], what=f"{method}: loaded")


def own_precision(rank: int) -> None:
    """Adapters in fp32 that are one unit, beside blocks with a policy of bf16: they are gathered and reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for method in ("hra", "bat", "lora"):
        each = [losses_and_gradients(adapted(method, llama().to(torch.bfloat16)), range(r, r + 1)) for r in range(2)]
        model = adapted(method, llama().to(torch.bfloat16))
        halotune.shard_adapters(model)
        for unit in (*model.get_base_model().model.layers, model):
            fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
        same(loss, each[rank][0][0], what=f"{method}: loss")
        assert all(p.dtype is p.grad.dtype is torch.float32 for p in trained(model).values())
        agree(found, {name: (g + each[1][1][name]) / 2 for name, g in each[0][1].items()})


# -- losses


def passes(rank: int) -> None:
    """Adapters as one unit, and passes that are not one forward and its backward each."""
    for method in ("hra", "lora"):
        one, model = adapted(method), sharded(adapted(method), "adapters-block")
        for given in (one, model):
            ranks = range(2) if given is one else range(rank, rank + 1)
            first, second = ([given(**batch(r + step)).loss for r in ranks] for step in range(2))
            for losses in (first, second):  # two forward passes before their backwards
                torch.stack(losses).mean().backward()
            with torch.no_grad():  # one between backward and clipping; then one that is not run backward
                given(**batch(rank))
            torch.nn.utils.clip_grad_norm_(given.parameters(), 0.1)
        agree({n: whole(p.grad) for n, p in trained(model).items()}, {n: p.grad for n, p in trained(one).items()})
        for given in (one, model):
            optimizer = torch.optim.SGD(trained(given).values(), lr=1.0)
            given(**batch(rank))
            optimizer.step()
        with torch.no_grad():  # a part of the model is called too, outside of any pass of the model
            for call in (lambda m: m, lambda m: m.get_base_model().model):
                found, due = (call(m)(batch(rank)["input_ids"])[0] for m in (model, one))
                same(found, due, what=f"{method}: after a step")


def refused(rank: int) -> None:
    """`shard_adapters` comes after adapters and before blocks, once."""
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(HalotuneError, match="LlamaForCausalLM has no adapters"):
        halotune.shard_adapters(llama())
    model = adapted("hra")
    fully_shard(model.get_base_model().model.layers[0])
    with pytest.raises(HalotuneError, match=r"sharded already, .* before fully_shard of any block"):
        halotune.shard_adapters(model)
    model = adapted("hra")
    halotune.shard_adapters(model)
    with pytest.raises(HalotuneError, match="sharded already"):
        halotune.shard_adapters(model)


def penalty(rank: int) -> None:
    """HRA's, added to the loss: of the parameters, so the same in every process, and not more of it for more of them."""
    how = {"orthogonality_weight": 0.1}
    for way in ("block", "root", "layer", "adapters-block"):
        losses, wanted = losses_and_gradients(adapted("hra", **how), range(2), lambda m: m.penalty())
        model = sharded(adapted("hra", **how), way)
        same(model.penalty(), adapted("hra", **how).penalty(), what=f"{way}: the penalty")
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1), lambda m: m.penalty())
        same(loss, losses[rank], what=f"{way}: loss")
        agree(found, wanted)


def idle_layer(rank: int) -> None:
    """One that the batch of one process does not reach."""

    def skipping(model: Any) -> Any:
        """A block's MLP runs only in batches of two."""
        mlp = model.get_base_model().model.layers[1].mlp
        run = mlp.forward
        mlp.forward = lambda x: run(x) if len(x) == 2 else x
        return model

    for method, way in (("hra", "block"), ("bat", "block"), ("hra", "adapters-block"), ("bat", "adapters-block")):
        losses, wanted = losses_and_gradients(skipping(adapted(method)), range(2))
        model = sharded(skipping(adapted(method)), way)
        model.set_reduce_scatter_unused_params(True)
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
        same(loss, losses[rank], what=f"{method}: loss")
        agree(found, wanted)


def accumulated(rank: int) -> None:
    """Gradients of two batches, reduced with the second: FSDP2's own way, and accelerate's."""
    from accelerate import Accelerator

    one = adapted("bat")
    torch.stack([one(**batch(r + step)).loss for r in range(2) for step in range(2)]).mean().backward()
    wanted = {name: p.grad for name, p in trained(one).items()}
    for way in ("block", "adapters-block"):
        model = sharded(adapted("bat"), way)
        for step in range(2):
            model.set_requires_gradient_sync(step == 1)
            (model(**batch(rank + step)).loss / 2).backward()
        agree({name: whole(p.grad) for name, p in trained(model).items()}, wanted)
    with fsdp2_on_cpus():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        given = adapted("bat")
        model, _ = accelerator.prepare(given, torch.optim.AdamW(trained(given).values()))
        for step in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch(rank + step)).loss)
        agree({name: whole(p.grad) for name, p in trained(model).items()}, wanted)


def reference(rank: int) -> None:
    """A loss beside the base model's own, as preference tuning has it."""

    def losses(model: Any, ranks: range) -> list[Any]:
        out = []
        for r in ranks:
            with torch.no_grad(), model.disable_adapter():
                own = model(**batch(r)).loss
            out.append((model(**batch(r)).loss - own).square())
        return out

    one, model = adapted("hra"), sharded(adapted("hra"), "block")
    expected, found = losses(one, range(2)), losses(model, range(rank, rank + 1))
    torch.stack(expected).mean().backward()
    found[0].backward()
    same(found[0], expected[rank], what="loss")
    agree({n: whole(p.grad) for n, p in trained(model).items()}, {n: p.grad for n, p in trained(one).items()})


# -- what is trained


def accelerates_units(rank: int) -> None:
    """accelerate makes units of embeddings and head, too, and moves a model by way of the meta device; also in its bf16."""
    from accelerate import Accelerator

    head, tied = {"target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}
    for options, sizes, precision in ((head, {}, "no"), ({}, tied, "no"), (head, {}, "bf16")):
        dtype, tolerance = (torch.float32, 1e-5) if precision == "no" else (torch.bfloat16, 2e-2)  # autocast is on
        one, given = (adapted("hra", llama(**sizes).to(dtype), **options) for _ in range(2))
        losses, wanted = losses_and_gradients(one, range(2))
        with fsdp2_on_cpus(cpu_ram_efficient_loading=True, mixed_precision_policy=None if precision == "no" else precision):
            accelerator = Accelerator(cpu=True, mixed_precision=precision)
            model, optimizer = accelerator.prepare(given, torch.optim.AdamW(trained(given).values()))
            (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
            same(loss, losses[rank], tolerance, "loss")
            agree(found, wanted, tolerance)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            assert all(p.dtype is torch.float32 for p in trained(model).values())


def more_than_adapters(rank: int) -> None:
    """A head that is trained whole, and biases, in the base's units."""
    from safetensors.torch import load_file

    head = {"modules_to_save": ["lm_head"], "exclude_modules": ["lm_head"]}
    for options in (head, {"bias": "all"}):
        made = [adapted("hra", llama(attention_bias=True), **options) for _ in range(3)]
        one, model, other = made[0], sharded(made[1], "block"), sharded(randomized(made[2], 5), "block")
        losses, wanted = losses_and_gradients(one, range(2))
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
        same(loss, losses[rank], what="loss")
        agree(found, wanted)
        with shared_folder() as folder:
            one.save_pretrained(folder / f"one-{rank}")
            model.save_pretrained(folder / "two")
            dist.barrier()
            tensors, due = (load_file(folder / f / "adapter_model.safetensors") for f in ("two", f"one-{rank}"))
            assert tensors.keys() == due.keys() and all(torch.equal(t, due[key]) for key, t in tensors.items())
            other.load_adapter(folder / "two", "default", is_trainable=True)
            same(other(**batch(rank)).loss, losses[rank], what="loaded")


def several_adapters(rank: int) -> None:
    """Saved, one more loaded, weights swapped, combined, chosen by sample, taken out: as in one process."""
    for way in ("block", "adapters-block"):
        _several_adapters(rank, way)


def _several_adapters(rank: int, way: str) -> None:

    def made() -> Any:
        model = adapted("hra")
        model.add_adapter("b", configured("lora"))
        model.set_adapter("b")
        randomized(model, 3)
        model.set_adapter(["default", "b"])
        return model

    one, two = made(), sharded(made(), way)

    def check(what: str, **options: Any) -> None:
        for model in (one, two):
            model.zero_grad()
        models = [(one, r) for r in range(2)] + [(two, rank)]
        losses = [model(**batch(r), **{k: v[: 2 + r] for k, v in options.items()}).loss for model, r in models]
        same(losses[2], losses[rank], what=what)
        torch.stack(losses[:2]).mean().backward()
        losses[2].backward()
        agree({n: whole(p.grad) for n, p in trained(two).items()}, {n: whole(p.grad) for n, p in trained(one).items()})

    check("both", adapter_names=["default", "b", "__base__"])
    with shared_folder() as folder:
        two.save_pretrained(folder / "two")
        randomized(one, 4).save_pretrained(folder / f"one-{rank}")  # other numbers
        for model in (one, two):
            halotune.hotswap_adapter(model, folder / f"one-{rank}")
            model.load_adapter(folder / "two" / "b", "b", is_trainable=True)
        check("swapped")
        for model in (one, two):
            model.load_adapter(folder / "two" / "b", "c")  # frozen: all of it in every process
            model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum", "lora")
            model.set_adapter(["c", "sum"], inference_mode=True)
        same(two(**batch(rank)).loss, one(**batch(rank)).loss, what="combined")
    for model in (one, two):
        for name in ("c", "sum", "b"):
            model.delete_adapter(name)
        model.set_adapter("default")
    check("one again")


# -- meshes, and processes that do not come


def hybrid(rank: int) -> None:
    """Replicated over one dimension of the mesh, sharded over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicated", "sharded"))
    one, model = adapted("bat"), sharded(adapted("bat"), "block", mesh=mesh)
    losses, wanted = losses_and_gradients(one, range(2))
    (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
    same(loss, losses[rank], what="loss")
    agree(found, wanted)
    with shared_folder() as folder, torch.no_grad():
        model.save_pretrained(folder)
        dist.barrier()
        model.load_adapter(folder, "default", is_trainable=True)
        for change in (model.merge_adapter, model.unmerge_adapter):
            change()
            same(model(**batch(rank)).loss, losses[rank], what=change.__name__)


def alone(rank: int) -> None:
    """Saving by the first process alone is an error in words, after a while."""
    from halotune.engine import gathering

    model = sharded(adapted("hra"), "block")
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
            patch.setattr(gathering, "WAIT", 0.2)
            with pytest.raises(HalotuneError, match="every process has to take part, and not all 2 did within"):
                model.save_pretrained(Path(folder) / "a")
            assert not (Path(folder) / "a").exists()
    else:
        time.sleep(0.5)
        dist.barrier()  # that of the other's save_pretrained


ALL = [
    mixed_precision,
    own_precision,
    four_bits,
    passes,
    refused,
    penalty,
    idle_layer,
    accumulated,
    reference,
    accelerates_units,
]
ALL += [more_than_adapters, several_adapters, hybrid, alone]
CASES = {f.__name__: f for f in ALL}
NEEDED = {"four_bits": "bitsandbytes"}


def case(rank: int, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES[name](rank)


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    names = [(name,) for name in CASES if find_spec(NEEDED.get(name, "torch"))]
    return spawn(2, failures, names, case, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name: str, found: list[dict[tuple[Any, ...], str]]) -> None:
    if not find_spec(needed := NEEDED.get(name, "torch")):
        pytest.skip(f"needs {needed}")
    for rank, failed in enumerate(found):
        if (name,) in failed:
            pytest.fail(f"process {rank}: {failed[name,]}")


if __name__ == "__main__":
    names = [(name,) for name in sys.argv[1:] or CASES]
    report(spawn(2, failures, names, case, timeout=120), names)
