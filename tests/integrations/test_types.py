"""When our classes take on PEFT's types, and that they keep them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from halotune import PeftModel, PeftModelForCausalLM

from .models import adapted

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


def test_copies_keep_the_type():
    model = adapted()
    assert isinstance(model, PeftModelForCausalLM) and isinstance(model, peft.PeftModel)
    ids = torch.arange(3, 9)[None]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and torch.equal(again(ids).logits, model(ids).logits)


def test_what_is_ours_stays_ours():
    """peft's class has methods of the same names; none of them may come first, and none of its state is there."""
    model = adapted()
    ours = {n for cls in (PeftModelForCausalLM, PeftModel) for n in vars(cls) if not n.startswith("__")}
    assert all(getattr(type(model), n) is not getattr(peft.PeftModel, n, None) for n in ours)
    assert "special_peft_forward_args" not in vars(model)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_who_uses_torch_alone_does_not_load_peft():
    code = (
        "import sys, torch, halotune\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "halotune.get_peft_model(model, halotune.HRAConfig(r=2, target_modules=['0']))\n"
        "print(*{'peft', 'transformers'} & sys.modules.keys())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
