"""The boundary of many tokens, whose first launch has tokens as columns, interpreted at few and small ones."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from ownpath.conformance.operations import judge, make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.hyper import launch
from ownpath.kernels.hyper.tiles import COLUMN_TILES, MANY_TILES
from ownpath.kernels.registry import KERNELS

KERNEL = KERNELS["triton.hyper_boundary"]
TILES = replace(COLUMN_TILES, tokens=8, slices_at_once=1)  # an interpreter takes its time


@pytest.mark.parametrize(("num_mix", "num_parts"), [(24, 2), (24, 0), (4, 1)])
def test_columns(num_mix: int, num_parts: int) -> None:
    """Right by the judgement of every boundary, with a ragged last block, and the same streams as rows of tokens."""
    num_tokens = TILES.tokens + 3
    case = KernelCase("hyper_boundary", "columns", (2 * TILES.channels, num_mix, num_parts), (num_tokens,))
    inputs = make_inputs(case, num_tokens, torch.device("cpu"))
    with mock.patch.object(launch, "choose_tiles", return_value=TILES):
        found = KERNEL(*inputs)
    judge(case, found, inputs)
    with mock.patch.object(launch, "choose_tiles", return_value=MANY_TILES):
        assert torch.equal(found.x_TSD, KERNEL(*inputs).x_TSD)
