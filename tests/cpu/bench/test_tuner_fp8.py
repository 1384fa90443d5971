"""The FP8 products' tuner: its candidates are kernels that fit the matrices they are tried on, the rule's first."""

import pytest
import torch

from ownpath.bench.check import rel_l2
from ownpath.bench.shapes import linear_shape
from ownpath.bench.tune import load_family
from ownpath.bench.tuners import fp8
from ownpath.bench.tuners.fp8 import FEW, MANY, SMS, Fp8Family
from ownpath.conformance.bounds import MAX_REL_L2
from ownpath.kernels.fp8.choose import knobs_config, w8a8_shape, w8a16_shape
from ownpath.kernels.fp8.config import W8A8Config, W8A16Config
from ownpath.kernels.fp8.ref import fp8_w8a8, fp8_w8a16

MOST = 12
"""Candidates in a case: every one is compiled, checked and timed."""


def test_every_case_has_kernels_that_fit_it() -> None:
    tuner = Fp8Family("cpu")
    assert len(tuner.candidates) == 10 * len(FEW + MANY)
    for case, configs in tuner.candidates.items():
        tokens, _, cols = (int(part.split("=")[1]) for part in case.split(","))
        kernels = [knobs_config(config, cols // 128) for config in configs]
        assert 4 <= len(kernels) <= MOST, case
        assert len(set(kernels)) == len(kernels), case
        if tokens in FEW:
            assert all(isinstance(kernel, W8A16Config) and kernel.num_n == tokens for kernel in kernels)
        else:
            assert all(isinstance(kernel, W8A8Config) for kernel in kernels)


def test_the_rule_s_choice_is_the_first() -> None:
    tuner = Fp8Family("cpu")
    for case, configs in tuner.candidates.items():
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        if tokens in FEW:
            rule = w8a16_shape(tokens, (rows // 64, cols // 128, True, False), SMS, wgmma=tokens >= 32)
            assert knobs_config(configs[0], cols // 128) == rule


def test_long_prompts_are_offered_a_tile_that_fills_one_wave() -> None:
    """1536 rows and 2048 tokens: 12 row tiles x 11 tiles of 192 tokens are an H200's 132 SMs, none left."""
    tried = Fp8Family("cpu").candidates["tokens=2048,rows=1536,cols=4096"]
    kernels = [knobs_config(config, 32) for config in tried]
    assert w8a8_shape(3, 1, 1, ragged=False) in kernels
    full = [kernel for kernel in kernels if isinstance(kernel, W8A8Config) and kernel.grid(2048, 24, SMS) == SMS]
    assert {kernel.m64_per_tile for kernel in full if kernel.num_tiles(2048, 24) * kernel.cluster_n == SMS} == {3}
    assert {kernel.cluster_n for kernel in full} == {1, 2}


def test_answers_are_compared_with_the_product_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' torch twins pass the tuner's check, and twice their answer does not."""
    monkeypatch.setattr(fp8, "num_calls", lambda _: 1)
    tuner = Fp8Family("cpu")
    shape = linear_shape("wqa_wkv")
    _, (weight,) = tuner._operands(shape)
    assert (weight.folded, weight.ragged) == (True, False), "the table's entries serve such weights only"
    for tokens in (FEW[0], MANY[0]):
        out = torch.full((tokens, shape.out_features), torch.nan, dtype=torch.bfloat16)
        x = tuner._activations(tokens, shape.in_features)
        if tokens in FEW:
            fp8_w8a16(x, weight, out)
        else:
            fp8_w8a8(x, weight, out, torch.empty(0))
        reference = tuner._reference(shape, tokens)
        assert rel_l2(out, reference) <= MAX_REL_L2
        assert rel_l2(2 * out, reference) > 0.9


def test_it_does_not_tune_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="not on cpu"):
        load_family("fp8", "cpu")
