"""Rotation of the last channels by position, and back."""

import math

import torch
from torch import Tensor

from ownpath.config import ModelConfig


def frequencies(config: ModelConfig, ratio: int) -> Tensor:
    """Radians a position for each pair of channels, float32: YaRN's in layers that compress, plain ones elsewhere."""
    dim, yarn = config.qk_rope_head_dim, config.yarn
    theta = config.compress_rope_theta if ratio else config.rope_theta
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None or not ratio:
        return plain
    lengths = (
        yarn.original_max_position_embeddings / (turns * 2 * math.pi) for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = (dim * math.log(length) / (2 * math.log(theta)) for length in lengths)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def rotated(x: Tensor, positions: Tensor, config: ModelConfig, ratio: int) -> Tensor:
    """x [T, ..., H] with its last channels turned in pairs by position times frequency, angles in float32."""
    return _turned(x, positions, config, ratio, 1)


def rotated_back(x: Tensor, positions: Tensor, config: ModelConfig, ratio: int) -> Tensor:
    """The inverse of ``rotated``."""
    return _turned(x, positions, config, ratio, -1)


def _turned(x: Tensor, positions: Tensor, config: ModelConfig, ratio: int, sign: int) -> Tensor:
    dim = config.qk_rope_head_dim
    angles = positions[:, None].float() * frequencies(config, ratio).to(x.device)
    angles = angles.view(len(positions), *[1] * (x.ndim - 2), dim // 2)
    turn = torch.complex(angles.cos().to(x.dtype), angles.sin().to(x.dtype) * sign)
    pairs = torch.view_as_complex(x[..., -dim:].contiguous().unflatten(-1, (dim // 2, 2)))
    return torch.cat((x[..., :-dim], torch.view_as_real(pairs * turn).flatten(-2)), -1)
