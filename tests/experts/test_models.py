"""A handful of the model files; `python -m tests.experts.models` goes through all."""

import pytest

from .models import check, files

pytest.importorskip("transformers")
HANDFUL = ["mixtral", "gpt_oss", "aria", "nemotron_h", "qwen3_5_moe", "muse_spark"]


@pytest.mark.parametrize("name", HANDFUL)
@pytest.mark.filterwarnings("ignore")
def test_experts_and_their_model_are_right(name):
    if name not in files():
        pytest.skip("not in this transformers")
    for what, result in check(name).items():
        assert result.experts == "right", what
        assert result.model == "right", what
