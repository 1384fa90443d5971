"""The bound of a layer's keys, and of scores by it."""

import math

import pytest
import torch

from ownpath.kernels.attend.types import SAFE_SCORE, AttendWeights
from ownpath.kernels.norms.ref import rms_norm
from ownpath.model.key_norms import largest_key_norm


def weights_of(norm: float) -> AttendWeights:
    return AttendWeights(torch.zeros(4), 512**-0.5, 1e-6, largest_norm=norm)


def test_no_normed_key_is_longer() -> None:
    """Whatever goes into the norm: also all of it in the largest channel."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(512, generator=g)
    params = {"layers.0.attn.kv_norm.weight": weight, "layers.0.attn.compressor.norm.weight": 2 * weight}
    bound = largest_key_norm(params, "layers.0.attn", 512)
    x = torch.randn(64, 512, generator=g) * 10.0 ** torch.arange(-3, 5).repeat(8)[:, None]
    x[0] = 0
    x[0, weight.abs().argmax()] = 1e6
    longest = rms_norm(x, 2 * weight, 1e-6).norm(dim=1).max()
    assert longest <= bound <= 1.07 * longest


def test_a_layer_without_a_compressor_has_its_own_norm_alone() -> None:
    params = {"mtp.0.attn.kv_norm.weight": torch.tensor([0.5, -3.0])}
    assert largest_key_norm(params, "mtp.0.attn", 2) == pytest.approx(3 * 2**0.5 * (1 + 2**-4))


def test_scores_are_bounded_up_to_the_safe_one() -> None:
    """By the longest query and key: sqrt(512) each, and the scale takes one of them away."""
    at_most = SAFE_SCORE * math.log(2) / (1 + 2**-6)
    assert weights_of(0.999 * at_most).is_bounded
    assert not weights_of(1.001 * at_most).is_bounded
    assert not weights_of(math.inf).is_bounded
    assert not weights_of(math.nan).is_bounded
