"""ZeRO-3 through accelerate, on two processes of the CPU; `test_zero3.py` launches it for every method:

DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true torchrun --nproc-per-node 2 -m tests.distributed.zero3 METHOD
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from halotune import HalotuneError

from .cases import adapted, batch, same, steps, trained

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # small parameters are put away too
    },
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "torch_adam": True}},
}


def case(accelerator: Any, method: str, folder: Path) -> None:
    from accelerate.utils import DummyOptim

    options = {"orthogonality_weight": 0.1} if method == "hra" else {}
    rank, one, given = dist.get_rank(), adapted(method), adapted(method, **options)
    expected = steps(adapted(method), lambda step: [batch(r + step) for r in range(2)])
    model, optimizer = accelerator.prepare(given, DummyOptim(trained(given).values(), lr=0.01))
    inner = accelerator.unwrap_model(model)
    one.save_pretrained(folder / f"one-{rank}")
    wanted = load_file(folder / f"one-{rank}" / "adapter_model.safetensors")

    def check(name: str) -> None:
        dist.barrier()
        found = load_file(folder / name / "adapter_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(t, wanted[key]) for key, t in found.items()), name

    inner.save_pretrained(folder / "gathered")
    check("gathered")
    inner.save_pretrained(folder / "state", is_main_process=rank == 0, state_dict=accelerator.get_state_dict(model))
    check("state")
    if not method.startswith(("bat", "oft")):
        inner.export("lora", folder / "lora")
        one.export("lora", folder / f"lora-{rank}")
        dist.barrier()
        found = load_file(folder / "lora" / "adapter_model.safetensors")
        for key, t in load_file(folder / f"lora-{rank}" / "adapter_model.safetensors").items():
            same(found[key], t, what=f"exported: {key}")
    with pytest.raises(HalotuneError, match="holds a part of its weight"):
        inner.merge_adapter()
    if method == "hra":
        with pytest.raises(HalotuneError, match="Shard the model with FSDP2"):
            inner.penalty()
    for step, (losses, _, _) in enumerate(expected):
        loss = model(**batch(rank + step)).loss
        same(loss, losses[rank], what=f"step {step}: the loss")
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    inner.load_adapter(folder / "gathered", "default", is_trainable=True)
    inner.save_pretrained(folder / "again")
    check("again")


def main(method: str) -> None:  # one for each launch: a second engine of DeepSpeed's meets what is left of the first
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    torch.set_num_threads(1)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ZERO3))
    folder: list[Any] = [TemporaryDirectory().name if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    case(accelerator, method, Path(folder[0]) / method)
    dist.barrier()
    if dist.get_rank() == 0:
        print(method, "ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
