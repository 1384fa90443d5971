"""Inputs for the comparisons with public implementations: random, at every tie, and with scales on E4M3 midpoints."""

import torch
from bit_oracles import E2M1_TIES, E4M3_TIES
from torch import Tensor


def random_weights() -> list[Tensor]:
    """Float32 and BF16 weights of several sizes; BF16 ones hit exact ties far more often."""
    g = torch.Generator().manual_seed(11)
    return [
        (torch.randn(64, 256, generator=g) * std).to(dtype).float()
        for std in (1.0, 0.02, 3e-4, 77.0)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def tie_matrix() -> tuple[Tensor, Tensor]:
    """Weights whose quotient by scale x global_scale is exactly every E2M1 tie, of both signs, for every power of two.

    Returns w [9, 16] and the global scale of its own amax, 2^-5: each row holds the 14 ties, a 6 and a 0.
    """
    row = torch.tensor([*E2M1_TIES, *(-tie for tie in E2M1_TIES), 6.0, 0.0])
    scales = torch.tensor([2.0**k for k in range(-4, 4)])
    w = torch.cat((row * scales[:, None], torch.zeros(1, 16)))
    w[8, 0] = 6 * 448 / 32
    return w, torch.tensor(2.0**-5)


def e4m3_midpoint_matrix() -> Tensor:
    """Blocks whose exact amax(block) * 448 / amax(w) lies on an E4M3 midpoint [119 + 1 rows of 16].

    There the order of float32 operations, not the rule, decides the byte.
    """
    amax = 7 * 1237.0
    midpoints = torch.tensor([0.0, *E4M3_TIES[7:]])
    w = torch.zeros(len(midpoints), 16)
    w[1:, 3] = -amax * midpoints[1:] / 448
    w[0, 0] = amax
    return w


def scale_bytes(scale: Tensor) -> Tensor:
    """Raw bytes of a float8 scale, as integers that can be subtracted."""
    return scale.view(torch.uint8).int()
