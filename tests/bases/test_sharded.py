"""A base that a process group holds already: what would go wrong in silence is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halotune
from halotune import HalotuneError, HRAConfig


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process alone."""
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def config(**options) -> HRAConfig:
    return HRAConfig(r=2, target_modules=["0"], **options)


def test_adapters_inside_ddp_would_not_be_averaged() -> None:
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match="each process would train an adapter of its own. Put adapters in first"):
        halotune.get_peft_model(parallel, config())


@pytest.mark.parametrize("how", ["inference", "outside"])
def test_ddp_that_is_right_is_not_warned_of(how: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "inference":
            halotune.get_peft_model(DistributedDataParallel(model), config(inference_mode=True))
        else:
            DistributedDataParallel(halotune.get_peft_model(model, config()))


@torch.no_grad()
def test_a_part_of_a_weight_is_not_merged() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = halotune.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(init_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process has all of it
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(HalotuneError, match=r"this \w*Linear \(4, 4\) holds a part of its weight, .*halotune merge"):
        model.merge_adapter()
