"""Rotary angles and turns in float64, from the config's figures alone.

Legend: T tokens, F frequencies.
"""

import math

import torch
from torch import Tensor

from ownpath.config import ModelConfig, Yarn


def frequencies(config: ModelConfig, *, compressing: bool) -> Tensor:
    """Radians per position of each pair of channels, float64 [F].

    Pair i of F turns by theta^(-i / F) a position. In compressing layers theta is another, and YaRN divides the
    frequencies of pairs that turn less than ``beta_slow`` times over the original context by ``factor``, leaves those
    above ``beta_fast`` turns, and goes linearly over the pairs between.
    """
    theta = config.compress_rope_theta if compressing else config.rope_theta
    num_pairs = config.qk_rope_head_dim // 2
    pairs_F = torch.arange(num_pairs, dtype=torch.float64)
    freqs_F = theta ** -(pairs_F / num_pairs)
    if not compressing or config.yarn is None:
        return freqs_F
    first, last = _ramp(config.yarn, theta, num_pairs)
    slowed_F = ((pairs_F - first) / max(last - first, 0.001)).clamp(0, 1)
    return freqs_F * (1 - slowed_F + slowed_F / config.yarn.factor)


def _ramp(yarn: Yarn, theta: float, num_pairs: int) -> tuple[int, int]:
    """The pairs between which the frequencies go over, in whole pairs, outwards."""

    def pair_of(turns: float) -> float:
        radians = 2 * math.pi * turns / yarn.original_max_position_embeddings
        return -num_pairs * math.log(radians, theta)

    return max(math.floor(pair_of(yarn.beta_fast)), 0), min(math.ceil(pair_of(yarn.beta_slow)), 2 * num_pairs - 1)


def turned(x: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """The last 2F channels of x [T, ..., H] turned in pairs of neighbours; the others as they are."""
    num_rotary = 2 * cos_TF.shape[-1]
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    cos, sin = cos_TF.view(shape), sin_TF.view(shape)
    first, second = x[..., -num_rotary::2], x[..., x.shape[-1] - num_rotary + 1 :: 2]
    y = x.clone()
    y[..., -num_rotary::2] = first * cos - second * sin
    y[..., x.shape[-1] - num_rotary + 1 :: 2] = first * sin + second * cos
    return y
