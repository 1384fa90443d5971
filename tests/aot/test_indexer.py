"""The indexer's kernels compile for sm_90 as their launchers launch them: nothing spills. Nothing is run."""

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.scores import launch as scores
from ownpath.kernels.scores.types import IndexQuery, PagedRows
from ownpath.kernels.select import launch as select

SHARED_BYTES = 232448 // 3  # of one program on sm_90, when three share an SM
TABLES = ((32, 512), (128, 512), (512, 512), (4096, 1024), (12, 128))
"""Blocks of a table, and entries selected: rows in one program, chunks, the longest rows, the embedded model."""


def rows_of(width: int) -> PagedRows:
    return PagedRows(torch.zeros(2, dtype=torch.int32), torch.zeros(2, width, dtype=torch.int32))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of these shapes, compiled for sm_90."""
    pools, angles_TF = (torch.zeros(64, 128).bfloat16(), torch.zeros(1, 8448, dtype=torch.uint8)), torch.zeros(2, 32)
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        for module in (scores, select):
            patch.setattr(module, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for num_heads in (4, 64):
            query = IndexQuery(
                torch.zeros(2, num_heads, 128).bfloat16(), torch.zeros(2, num_heads), angles_TF, angles_TF
            )
            for keys in pools:
                for kernel in (scores.INDEX_SCORES, scores.INDEX_SCORES_FP4):
                    kernel(query, keys, rows_of(32))
        for width, topk in TABLES:
            select.SELECT(torch.zeros(2, 64 * width), rows_of(width), topk)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def test_every_kernel_is_there(compiled: list[Compiled]) -> None:
    names = [one.launch.name for one in compiled]
    assert names.count("index_scores_kernel") == 8
    assert names.count("select_kernel") == len(TABLES)


def test_nothing_spills(compiled: list[Compiled]) -> None:
    assert not {one.launch.constants: one.stack_bytes for one in compiled if one.stack_bytes}


def test_three_programs_share_an_sm(compiled: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in compiled)


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx


def test_scores_use_the_tensor_cores_and_copy_ahead(compiled: list[Compiled]) -> None:
    for one in compiled:
        if one.launch.name == "index_scores_kernel":
            assert "wgmma.mma_async" in one.ptx
            assert "cp.async.cg.shared.global" in one.ptx
            assert "max.NaN.f32" in one.ptx


def test_counts_use_one_instruction_a_warp(compiled: list[Compiled]) -> None:
    for one in compiled:
        if one.launch.name == "select_kernel":
            assert "redux.sync.add.s32" in one.ptx
