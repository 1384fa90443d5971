"""Concatenates fused shards into one matrix, for kernels that multiply by all of them at once."""

from collections.abc import Sequence

import torch

from ownpath.kernels.contract import StoredLinear


def fuse(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates rows; a single shard is returned as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def fuse_nvfp4(stored: StoredLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes uint8 [N, K/2], scales E4M3 [N, K/16], and a global scale for each row, float32 [N]."""
    codes, scales, rows = [], [], []
    for shard in stored.shards:
        assert shard.scale is not None
        assert shard.global_scale is not None
        codes.append(shard.qdata)
        scales.append(shard.scale)
        rows.append(shard.global_scale.expand(len(shard.qdata)))
    return fuse(codes).view(torch.uint8), fuse(scales), fuse(rows)
