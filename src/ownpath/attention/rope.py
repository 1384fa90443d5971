"""Rotary position embedding of the trailing channels, interleaved pairs, and its inverse.

DeepSeek-V4 uses two tables. Sliding-window layers: base ``rope_theta``, no scaling. Compressing layers (query, window
keys, compressor, indexer): base ``compress_rope_theta`` with YaRN interpolation and no mscale.
Keys are values too, so that attention outputs carry rotated channels: the inverse rotation at the query's position
takes them back before the output projection.

Legend: T tokens, R rotary channels, F = R/2 frequencies.
"""

import math
from dataclasses import dataclass

import torch

from ownpath.config import ModelConfig, Yarn
from ownpath.numerics import rotate_pairs


def rotary_frequencies(rotary_dim: int, theta: float, yarn: Yarn | None) -> torch.Tensor:
    """Returns the radians per position of each channel pair, float32 [F].

    With YaRN, pairs that turn more than ``beta_fast`` times over the original context keep their frequency, pairs
    that turn less than ``beta_slow`` times are divided by ``factor``, with a linear ramp over pair index between.
    Source: YaRN (arXiv 2309.00071), section 3.2, as DeepSeek-V4's published inference code applies it.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    freqs_F = 1.0 / (theta**exponents)
    if yarn is None:
        return freqs_F

    def pair_that_turns(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rotary_dim - 1)
    width = max(high - low, 0.001)  # a ramp of no width would divide by zero
    interpolated_F = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return freqs_F / yarn.factor * interpolated_F + freqs_F * (1 - interpolated_F)


@dataclass(frozen=True)
class Rotation:
    """cos and sin of each row's angles, float32 [T, F]."""

    cos_TF: torch.Tensor
    sin_TF: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates the last R channels of x [T, ..., >=R] in pairs (2i, 2i+1); other channels pass unchanged."""
        return rotate_pairs(x, self.cos_TF, self.sin_TF)

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the inverse rotation: by the negative angle."""
        return rotate_pairs(x, self.cos_TF, -self.sin_TF)

    @property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), for kernels that undo the rotation."""
        return self.cos_TF, self.sin_TF

    @classmethod
    def none(cls, num_rows: int, device: torch.device) -> "Rotation":
        """Returns rotations of no channel: a row has no angle."""
        return cls(torch.empty(num_rows, 0, device=device), torch.empty(num_rows, 0, device=device))


@dataclass(frozen=True)
class Rope:
    """One table of frequencies [F] on the model's device."""

    freqs_F: torch.Tensor

    def at(self, positions_T: torch.Tensor) -> Rotation:
        """Returns the rotation of each position; angles in float32, as every public implementation computes them."""
        angles_TF = positions_T[:, None].to(torch.float32) * self.freqs_F
        return Rotation(angles_TF.cos(), angles_TF.sin())

    @classmethod
    def for_layer(cls, config: ModelConfig, compressing: bool, device: torch.device) -> "Rope":
        theta = config.compress_rope_theta if compressing else config.rope_theta
        freqs_F = rotary_frequencies(config.qk_rope_head_dim, theta, config.yarn if compressing else None)
        return cls(freqs_F.to(device))
