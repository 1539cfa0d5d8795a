"""Writes what peft makes of experts: `python make_fixtures.py FOLDER` under the peft that is to be recorded.

Nothing of halotune is imported, so that any version of peft can run it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

EXPERTS = 3


class Experts(nn.Module):
    """As transformers stores them, and no more than peft looks at."""

    def __init__(self, n_in: int, n_out: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *((n_in, n_out) if transposed else (n_out, n_in))))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *((n_out, n_in) if transposed else (n_in, n_out))))


class Model(nn.Module):
    def __init__(self, n_in: int, n_out: int, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(n_in, n_out, transposed)


CASES = {"wide": (4, 6, False), "transposed": (4, 6, True), "square": (5, 5, False)}


def main(folder: Path) -> None:
    for name, (n_in, n_out, transposed) in CASES.items():
        torch.manual_seed(0)
        model = Model(n_in, n_out, transposed)
        before = {n: p.detach().clone() for n, p in model.experts.named_parameters()}
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names)
        adapted = peft.get_peft_model(model, config)
        torch.manual_seed(1)
        for n, p in adapted.named_parameters():
            if "lora_" in n:
                nn.init.normal_(p)
        out = folder / f"peft_{peft.__version__}_{name}"
        adapted.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)
        merged = adapted.merge_and_unload()
        deltas = {n: p.detach() - before[n] for n, p in merged.experts.named_parameters()}
        save_file({n: t.contiguous() for n, t in deltas.items()}, out / "deltas.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
