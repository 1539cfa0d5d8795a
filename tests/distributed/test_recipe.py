"""Recipes that torchrun starts on all GPUs give the numbers of one process, which takes one GPU of all that it sees.

On processes of the CPU: `python -m tests.distributed.test_recipe sft N`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations.models import WORDS, encoder, tokenizer
from tests.recipes.problems import base_folder, write_problems

from .cases import same

GPUS = torch.cuda.device_count()


def launch(folder: Path, recipe: str, name: str, processes: int, **settings: Any) -> list[dict[str, Any]]:
    """The lines that a run has logged: started by torchrun, or alone, by itself."""
    output, file = folder / name, folder / f"{name}.json"
    file.write_text(json.dumps([[f"train_{recipe}", {**settings, "output": str(output)}]]))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *torchrun, "tests.recipes.jobs", str(file)]
    root = Path(__file__).parents[2]
    source = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": source}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def sft(folder: Path, rows: int) -> dict[str, Any]:
    base_folder(folder / "llama")
    write_problems(folder / "train.jsonl", range(rows))
    data = {"model": str(folder / "llama"), "template": "plain", "data": str(folder / "train.jsonl")}
    return {**data, "max_length": 96, "compile": False}


def nlu(folder: Path, rows: int) -> dict[str, Any]:
    """Of an encoder without dropout, of which each process would draw its own: is the first word one of the later ones?"""
    encoder("BertModel").save_pretrained(folder / "bert")
    tokenizer(folder / "bert")
    rng = random.Random(0)
    words = [[rng.randrange(3, WORDS) for _ in range(rng.randint(2, 6))] for _ in range(rows)]
    lines = [f"{' '.join(f'w{n}' for n in row)},{'late' if row[0] > 20 else 'early'}" for row in words]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines, ""]))
    return {"model": str(folder / "bert"), "task": "csv", "data": str(folder / "train.csv")}


RECIPES = {"sft": sft, "nlu": nlu}


def compare(folder: Path, recipe: str, processes: int, device: str) -> None:
    """Losses, norms of gradients, evaluations and the adapter; run.json says on what it was run."""
    data = {**RECIPES[recipe](folder, 20 * processes), "evaluation": 0.2}
    sizes = {"batch_size": 2 * processes, "max_steps": 6, "save_every": 3, "evaluate_every": 3}
    usual = {"tracker": "none", "device": device, "log_every": 1, "adapter": {"r": 4}}
    settings = {**data, **sizes, **usual}
    one, several = (launch(folder, recipe, name, n, **settings) for name, n in (("one", 1), ("several", processes)))
    assert [line["step"] for line in several] == [line["step"] for line in one] and len(one) == 8
    for a, b in zip(several, one, strict=True):
        found, wanted = (line.get("evaluation", line) for line in (a, b))
        for name in ("loss",) if "evaluation" in b else ("loss", "grad_norm", "learning_rate"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), (name, a, b)
    records = [json.loads((folder / name / "run.json").read_text()) for name in ("one", "several")]
    assert [record["hardware"]["processes"] for record in records] == [1, processes]
    two, due = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("several", "one"))
    assert two.keys() == due.keys() != set()
    for key, t in due.items():
        same(two[key], t, 1e-2, key)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices, for torchrun")
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_all_gpus(recipe: str, tmp_path: Path) -> None:
    if recipe == "sft":
        pytest.importorskip("trl", reason="train sft needs trl")
    compare(tmp_path, recipe, GPUS, "auto")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        compare(Path(name), sys.argv[1], int(sys.argv[2]), "cpu")
