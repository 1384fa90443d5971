"""Columns of a stored matrix that one rank takes: joined in place, whatever piece of the file a buffer holds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.plan.sharding import Region
from ownpath.weights.operands import Destination
from ownpath.weights.targets import CopyTarget

ROWS = 37


@pytest.mark.parametrize("region", [Region(1, 0, 8), Region(1, 8, 16), Region(1, 12, 16), Region(1, 0, 16), None])
@pytest.mark.parametrize("piece", [1, 7, 16, 64, 131, 16 * ROWS])
def test_pieces_of_any_length_join_to_the_region(region: Region | None, piece: int) -> None:
    whole = np.random.default_rng(piece).integers(0, 256, (ROWS, 16), np.uint8)
    info = TensorInfo("w2", "U8", whole.shape, Path("shard"))
    columns = slice(None) if region is None else slice(region.start, region.stop)
    wanted = whole[:, columns].reshape(-1)
    found, taken = np.zeros_like(wanted), np.zeros(wanted.size, int)
    target = CopyTarget(info, Destination("w2", torch.empty(0), region=region), found, 0, None)
    for first in range(0, whole.size, piece):
        data = whole.reshape(-1)[first : first + piece].copy()
        offset, count = target.join(first, data)
        found[offset : offset + count] = data[:count]
        taken[offset : offset + count] += 1
    assert (found == wanted).all()
    assert (taken == 1).all(), "not each byte once"
