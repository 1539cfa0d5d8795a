"""Adapters on experts that are spread over processes compute, and learn, what they do on one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halotune

from .launch import spawn

pytest.importorskip("transformers.distributed.expert_parallel")
STEPS = 2


def model_config() -> Any:
    from transformers import Qwen3MoeConfig

    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=48, head_dim=8)
    return Qwen3MoeConfig(
        vocab_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=False, **sizes,
    )  # fmt: skip


def configs(shared: bool) -> list[Any]:
    common: dict[str, Any] = {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": [],
        "expert_sharing": shared,
    }
    return [
        halotune.HRAConfig(r=4, orthogonality_weight=0.1, **common),
        halotune.LoHaConfig(r=2, **common),
        halotune.BoneConfig(r=8, **common),
        halotune.BoneConfig(r=8, init_weights="bat", **common),
        halotune.OFTConfig(oft_block_size=8, **common),
        halotune.LoraConfig(r=4, **common),
    ]


def trained(base: Any, folder: Path) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """Losses of some steps from a saved adapter, and the gradients of the first."""
    model = halotune.PeftModel.from_pretrained(base, folder, is_trainable=True)
    ids = torch.arange(24).view(3, 8) % 61
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses, first = [], {}
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        (loss + model.penalty()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        first = first or {n: full(g).clone() for n, g in grads.items()}
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        losses.append(loss.detach())
    return losses, first, model


def full(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def worker(rank: int, path: Path, folders: list[Path]) -> list[Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    out = []
    for folder in folders:
        base = Qwen3MoeForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, ep_size=2))
        assert base.model.layers[0].mlp.experts.num_experts == 2
        losses, grads, model = trained(base, folder)
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        model.save_pretrained(folder / "after", state_dict=state, is_main_process=rank == 0)
        with pytest.raises(halotune.HalotuneError, match="sharded"):
            model.merge_adapter()
        model.load_adapter(folder, "second")
        with pytest.raises(halotune.HalotuneError, match="combine them in a model on one process"):
            model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
        out.append((losses, grads))
    return out


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_expert_parallel_training_is_that_of_one_process(shared, tmp_path):
    from transformers import Qwen3MoeForCausalLM

    base = Qwen3MoeForCausalLM(model_config())
    base.save_pretrained(tmp_path / "base")
    folders = []
    for i, config in enumerate(configs(shared)):
        model = halotune.get_peft_model(copy.deepcopy(base), config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.1)
        folders.append(tmp_path / str(i))
        model.save_pretrained(folders[-1])
    found = spawn(2, worker, tmp_path / "base", folders)
    for i, folder in enumerate(folders):
        losses, grads, model = trained(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base"), folder)
        for rank in range(2):
            got_losses, got = found[rank][i]
            torch.testing.assert_close(got_losses, losses, atol=1e-5, rtol=1e-5)
            assert got.keys() == grads.keys()
            for name, due in grads.items():
                torch.testing.assert_close(got[name], due, atol=2e-6, rtol=2e-4, msg=f"{folder.name} {name}: ".__add__)
        after = halotune.PeftModel.from_pretrained(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base"), folder / "after")
        for (name, p), q in zip(model.named_parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(q, p, atol=1e-5, rtol=1e-4, msg=f"{name}: ".__add__)
