"""Recognises NVFP4 weights that were cast from MXFP4 without loss.

ModelOpt can cast MXFP4 (one E8M0 scale for 32 values) to NVFP4 without loss: codes stay as they are, each power-of-two
scale is written twice, as an E4M3 scale for each half of its 32 values, and the power of two that E4M3 cannot reach
goes into the global scale. Such weights convert back exactly. Two neighbouring blocks of 16 always share one scale, so
that a K = 32 tensor-core step can use them unchanged.
"""

import torch

CHUNK_BYTES = 32 * 2**20
"""Scales compared at a time: each takes several bytes of memory meanwhile, and a layer's experts have 10^9."""


def is_lossless_cast(scale: torch.Tensor, global_scale: torch.Tensor) -> bool:
    """Returns True if block scales are powers of two, pairwise equal along K, and global scales are powers of two.

    A zero scale is not a power of two; the cast never writes one.

    Shapes: scale E4M3 [..., K/16]; global_scale float32, any shape.
    """
    if scale.shape[-1] % 2 or not _are_powers_of_two(global_scale):
        return False
    rows = scale.flatten(0, -2)
    rows_per_chunk = max(1, CHUNK_BYTES // rows.shape[1])
    head = rows[:64]  # stops at the first chunk of a checkpoint that was not cast
    return _is_cast(head) and all(_is_cast(chunk) for chunk in rows.split(rows_per_chunk))


def _is_cast(scale: torch.Tensor) -> bool:
    codes = scale.view(torch.uint8)
    pairs = codes.unflatten(-1, (-1, 2))
    is_normal_power = (codes >= 0x08) & ((codes & 0x07) == 0)
    is_subnormal_power = (codes == 0x01) | (codes == 0x02) | (codes == 0x04)
    return bool((pairs[..., 0] == pairs[..., 1]).all() & (is_normal_power | is_subnormal_power).all())


def _are_powers_of_two(values: torch.Tensor) -> bool:
    mantissa, _ = torch.frexp(values)
    return bool((mantissa == 0.5).all())
