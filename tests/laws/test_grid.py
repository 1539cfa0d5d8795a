"""The grid leaves nothing out."""

import math

import pytest

from halotune import LoHaConfig
from halotune.core.base import base_for
from halotune.methods.loha.ops import low_rank_is_cheaper
from halotune.methods.registry import method_of, methods

from .cases import BASES, VARIANTS


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.peft_type)
def test_every_method_and_every_adapter_class_is_tested(method):
    shape = base_for(BASES[0].build()).shape
    made = {type(method.create(shape, v.config)) for v in VARIANTS if method_of(v.config.peft_type) is method}
    assert made == set(method.adapters), "add a Variant to cases.py"


def test_names_are_unique():
    for cases in (VARIANTS, BASES):
        assert len({c.name for c in cases}) == len(cases)


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.name)
def test_the_variants_mean_what_their_names_say(base):
    shape = base_for(base.build()).shape
    tokens = math.prod(base.size) // (shape.in_channels * shape.groups)
    named = {v.name: v for v in VARIANTS}
    assert shape.in_features % named["bone-r3"].config.r == 0
    assert shape.in_features % named["bone-r7"].config.r != 0
    for v in VARIANTS:
        if isinstance(v.config, LoHaConfig):
            assert low_rank_is_cheaper(tokens, shape.out_features, shape.in_features, v.config.r) is not v.dense
