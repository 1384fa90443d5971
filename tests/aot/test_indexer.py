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
    pages = (torch.zeros(1, 64 * key_bytes, dtype=torch.uint8) for key_bytes in (132, 68))
    pools, angles_TF = (torch.zeros(64, 128).bfloat16(), *pages), torch.zeros(2, 32)
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
    assert names.count("index_scores_kernel") == 12
    assert names.count("select_kernel") == len(TABLES)


def test_tables_of_any_width_are_one_form() -> None:
    """Steps with chunks cut them to what they need, and none may compile."""
    query = IndexQuery(torch.zeros(2, 64, 128).bfloat16(), torch.zeros(2, 64), torch.zeros(2, 32), torch.zeros(2, 32))
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(scores, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)
        for width in (1, 7, 16):
            scores.INDEX_SCORES(query, torch.zeros(64, 128).bfloat16(), rows_of(width))
    assert len({(one.signature, one.constants, one.divisible) for one in launches}) == 1


def test_nothing_spills(compiled: list[Compiled]) -> None:
    assert not {one.launch.constants: one.stack_bytes for one in compiled if one.stack_bytes}


def test_three_programs_share_an_sm(compiled: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in compiled)


def test_programs_of_pages_share_an_sm(compiled: list[Compiled]) -> None:
    """As many as the grid is made for."""
    forms = [(dict(one.launch.constants).get("FORM"), one) for one in compiled]
    paged = [(scores.PROGRAMS_PER_SM[form], one) for form, one in forms if form]
    assert len(paged) == 8
    for number, one in paged:
        assert 128 * one.registers * number <= 65536
        assert (one.shared_bytes + 1024) * number <= 228 * 1024


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


def test_fp4_codes_become_numbers_in_registers(compiled: list[Compiled]) -> None:
    """Keys go from memory to shared memory to a product's registers, and nowhere between; a multiplication of two
    codes at a time."""
    fp4 = [one for one in compiled if dict(one.launch.constants).get("FORM") == scores.FP4_PAGES.value]
    assert len(fp4) == 4
    for one in fp4:
        loop = one.intermediate[one.intermediate.index("scf.for") :]
        assert "local_alloc" not in loop.partition("scf.yield")[0]
        assert "HMUL2.BF16" in one.sass()


def test_counts_use_one_instruction_a_warp(compiled: list[Compiled]) -> None:
    for one in compiled:
        if one.launch.name == "select_kernel":
            assert "redux.sync.add.s32" in one.ptx
