"""DDP, FSDP1 and what else people do with FSDP2, on two processes: right, or refused in words."""

from __future__ import annotations

import functools
import tempfile
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import halotune
from halotune import HalotuneError

from .cases import adapted, batch, configured, failures, llama, randomized, same, steps, trained, whole
from .launch import spawn
from .test_fsdp2 import sharded


def fsdp1(model: Any, use_orig_params: bool = True) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    block = type(model.get_base_model().model.layers[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={block})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, auto_wrap_policy=policy, device_id=cpu)


WRAPPED = {
    "ddp": DistributedDataParallel,
    "ddp-static": functools.partial(DistributedDataParallel, static_graph=True),
    "ddp-unused": functools.partial(DistributedDataParallel, find_unused_parameters=True),
    "fsdp1": fsdp1,
}


def train(rank: int, method: str, how: str) -> None:
    """Losses depend on the gradients of the step before, so those of three steps say that the gradients are right."""
    expected = steps(adapted(method), lambda step: [batch(r + step) for r in range(2)], n=3)
    model = WRAPPED[how](adapted(method))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step, (losses, norm, _) in enumerate(expected):
        loss = model(**batch(rank + step)).loss
        same(loss, losses[rank], what=f"step {step}: the loss")
        loss.backward()
        clip = getattr(model, "clip_grad_norm_", None)
        found = clip(0.1) if clip else torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        same(found, norm, what=f"step {step}: the norm of all gradients")
        optimizer.step()
        optimizer.zero_grad()


def fsdp1_limits(rank: int) -> None:
    with pytest.raises(ValueError, match="uniform `requires_grad`"):  # torch's own
        fsdp1(adapted("hra"), use_orig_params=False)
    model = adapted("hra", orthogonality_weight=0.1)
    folder = f"{tempfile.mkdtemp()}/adapter"
    model.save_pretrained(folder)
    model = fsdp1(model)
    model(**batch(rank)).loss.backward()
    calls: list[Any] = [
        model.module.merge_adapter,
        lambda: model.module.export("lora", "none"),
        lambda: model.module.load_adapter(folder, "default"),
    ]
    for call in calls:
        with pytest.raises(HalotuneError, match="FSDP1 has flattened the parameters"):
            call()
    with pytest.raises(HalotuneError, match="Shard the model with FSDP2"):
        model.module.penalty()


def pefts_policy(rank: int) -> None:
    """What transformers' Trainer wraps by under FSDP1: it asks leaf modules for a trained weight."""
    peft_other = pytest.importorskip("peft.utils.other")
    from torch.distributed.fsdp import FullyShardedDataParallel

    one, model = adapted("hra"), adapted("hra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
        policy = peft_other.fsdp_auto_wrap_policy(model)
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu)
    same(model(**batch(rank)).loss, one(**batch(rank)).loss, what="loss")


def peft_sped_up(rank: int) -> None:
    """FSDP2 leaves parameters their sizes, FSDP1 does not."""
    peft = pytest.importorskip("peft")

    def made() -> Any:
        return randomized(peft.get_peft_model(llama(), peft.HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))

    one, two = made(), halotune.speed_up(made())
    losses = [one(**batch(r)).loss for r in range(2)]
    torch.stack(losses).mean().backward()
    for part in (*two.get_base_model().model.layers, two):
        fully_shard(part)
    loss = two(**batch(rank)).loss
    loss.backward()
    same(loss, losses[rank], what="loss")
    for name, p in trained(two).items():
        same(whole(p.grad), trained(one)[name].grad, what=name)
    flat = fsdp1(halotune.speed_up(made()))
    with pytest.raises(HalotuneError, match=r"FSDP1 has flattened peft's parameters.*Shard the model with FSDP2"):
        for _ in range(2):
            flat(**batch(rank)).loss.backward()


def half_precision_base(rank: int) -> None:
    """bf16 and fp32 in one unit: only what is trained has to have one dtype."""
    model: Any = adapted("hra", llama().to(torch.bfloat16))
    losses = [model(**batch(r)).loss for r in range(2)]
    torch.stack(losses).mean().backward()
    wanted = {name: whole(p.grad) for name, p in trained(model).items()}
    model = sharded(adapted("hra", llama().to(torch.bfloat16)), "block")
    loss = model(**batch(rank)).loss
    loss.backward()
    same(loss, losses[rank], what="loss")
    for name, p in trained(model).items():
        assert p.dtype is torch.float32
        same(whole(p.grad), wanted[name], what=name)


def two_adapters(rank: int) -> None:
    """The active one is changed between passes; the other is frozen, though it was when all was sharded."""

    def made() -> Any:
        model = adapted("hra")
        model.add_adapter("b", configured("lora"))
        model.set_adapter("b")
        randomized(model, 3)
        model.set_adapter("default")
        return model

    one, two = made(), sharded(made(), "block")
    for names in ("default", "b", ["default", "b"], "default"):
        for model in (one, two):
            model.set_adapter(names)
            model.zero_grad()
        losses = [one(**batch(r)).loss for r in range(2)]
        torch.stack(losses).mean().backward()
        loss = two(**batch(rank)).loss
        loss.backward()
        same(loss, losses[rank], what=f"{names}: loss")
        assert trained(one).keys() == trained(two).keys()
        for name, p in trained(two).items():
            same(whole(p.grad), whole(trained(one)[name].grad), what=f"{names}: {name}")


def interrupted(rank: int) -> None:
    """An exception in a pass leaves nothing behind that the next one would use."""
    one, model = adapted("hra"), sharded(adapted("hra"), "block")
    head = model.get_base_model().lm_head
    handle = head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(**batch(rank))
    handle.remove()
    same(model(**batch(rank)).loss, one(**batch(rank)).loss, what="the pass after it")


def different_seeds(rank: int) -> None:
    """Each process draws its own initialisation: what is sharded is still one adapter, which starts as the base."""
    base = llama()
    expected = base(**batch(0)).logits
    torch.manual_seed(rank)
    model = sharded(halotune.get_peft_model(base, configured("hra")), "block")
    same(model(**batch(0)).logits, expected, what="at the start")


def refused(rank: int) -> None:
    model = sharded(adapted("hra"), "layer")
    for call in (model.merge_and_unload, model.unload):
        with pytest.raises(HalotuneError, match=r"is a unit of FSDP2.*halotune merge"):
            call()
    with pytest.warns(UserWarning, match="sharded already.*an adapter of its own"):
        model.add_adapter("b", configured("lora"))
    experts: Any = sharded(adapted("hra-experts"), "block")
    with pytest.warns(UserWarning, match="an adapter of its own"):  # and not one that is spread, as by expert parallelism
        experts.add_adapter("b", configured("lora", target_modules=[], target_parameters=["experts.down_proj"]))
    assert not any(hasattr(p, "placements") for n, p in experts.named_parameters() if ".b." in n)
    tied = sharded(adapted("hra", llama(tie_word_embeddings=True), target_modules=["lm_head"]), "root")
    with pytest.raises(HalotuneError, match="shares its weight with another module, and the model is sharded"):
        tied.merge_adapter()


def grouped(rank: int) -> None:
    """Layers of one unit prepare together: HRA on a block, those of one input size at once."""
    from .costs import launches

    for way, groups in (("root", 2), ("block", 4), ("layer", 14)):
        assert launches(sharded(adapted("hra"), way), batch(0))[0] == groups


OTHERS = {
    f.__name__: f
    for f in (
        fsdp1_limits,
        pefts_policy,
        peft_sped_up,
        half_precision_base,
        two_adapters,
        interrupted,
        different_seeds,
        refused,
        grouped,
    )
}
CASES: list[tuple[str, ...]] = [(method, how) for how in ("ddp-static", "fsdp1") for method in ("hra", "loha", "bat", "lora")]
CASES += [
    ("oft", "fsdp1"),
    ("bone", "fsdp1"),
    ("lora-experts", "fsdp1"),
    ("hra-experts", "ddp-static"),
    ("hra", "ddp"),
    ("hra", "ddp-unused"),
    *[(name,) for name in OTHERS],
]


def case(rank: int, *what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OTHERS[what[0]](rank) if len(what) == 1 else train(rank, *what)


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    return spawn(2, failures, CASES, case, timeout=300)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_as_in_one_process(case: tuple[str, ...], found: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found):
        if case in failed:
            pytest.fail(f"process {rank}: {failed[case]}")
