"""What people do in training under FSDP2, on two processes: it gives what one process gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from .cases import adapted, batch, failures, llama, same, trained, whole
from .launch import spawn
from .test_fsdp2 import sharded


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


# -- losses


def penalty(rank: int) -> None:
    """HRA's, added to the loss: of the parameters, so the same in every process, and not more of it for more of them."""
    how = {"orthogonality_weight": 0.1}
    for way in ("block", "root", "layer"):
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

    for method in ("hra", "bat"):
        losses, wanted = losses_and_gradients(skipping(adapted(method)), range(2))
        model = sharded(skipping(adapted(method)), "block")
        model.set_reduce_scatter_unused_params(True)
        (loss,), found = losses_and_gradients(model, range(rank, rank + 1))
        same(loss, losses[rank], what=f"{method}: loss")
        agree(found, wanted)


CASES = {f.__name__: f for f in (mixed_precision, penalty, idle_layer)}


def case(rank: int, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES[name](rank)


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    return spawn(2, failures, [(name,) for name in CASES], case, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name: str, found: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found):
        if (name,) in failed:
            pytest.fail(f"process {rank}: {failed[name,]}")
