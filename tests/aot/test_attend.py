"""Decode attention compiles for sm_90 as its launcher launches it: nothing spills where keys are read. Nothing runs."""

import re
from dataclasses import replace

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.conformance.attend import make_attend_inputs
from ownpath.kernels.attend import checks
from ownpath.kernels.attend.cases import AttendCase
from ownpath.kernels.attend.launch import ATTEND, ATTEND_INVARIANT

SHARED_BYTES = 232448  # what one program may use on sm_90
CASES = (
    AttendCase("16 heads, split", 4, 4, 700, 128),
    AttendCase("16 heads, split, fp8", 4, 128, 9000, fp8=True),
    AttendCase("64 heads", 64, 0, 300),
    AttendCase("64 heads, split", 64, 4, 700, 512),
    AttendCase("64 heads, fp8", 64, 0, 300, fp8=True),
    AttendCase("64 heads, split, fp8", 64, 128, 70000, fp8=True),
)
LONGER = (CASES[2], CASES[5])
"""Also for longer rings, of several rows of a request."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of these cases, compiled for sm_90."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(checks, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for case in CASES:
            kernel = ATTEND if case.num_heads == 4 else ATTEND_INVARIANT
            kernel(*make_attend_inputs(case, 2, torch.device("cpu")).arguments)
        for case in LONGER:
            ATTEND_INVARIANT(*make_attend_inputs(case, 2, torch.device("cpu"), group=2).arguments)
        official = make_attend_inputs(CASES[0], 2, torch.device("cpu"))
        ATTEND(*replace(official, weights=replace(official.weights, is_stepwise=True)).arguments)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def kinds(compiled: list[Compiled], **wanted: object) -> list[Compiled]:
    """The attention launches with these constants."""
    attend = [one for one in compiled if one.launch.name == "attend_kernel"]
    return [one for one in attend if wanted.items() <= dict(one.launch.constants).items()]


def test_every_form_is_there(compiled: list[Compiled]) -> None:
    """One compilation serves every number of rows, heads, blocks, selected entries and splits."""
    assert len(kinds(compiled, STEPWISE=False, SPARE=0)) == len(CASES)
    assert len(kinds(compiled, STEPWISE=False, SPARE=8)) == len(LONGER)
    assert len(kinds(compiled, STEPWISE=True)) == 1
    assert len(compiled) == len(CASES) + len(LONGER) + 1 + 2  # and one merge for each ratio that splits


def test_shared_memory_fits(compiled: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in compiled)


def test_few_heads_and_merging_spill_nothing(compiled: list[Compiled]) -> None:
    small = [one for one in compiled if one.launch.name != "attend_kernel"] + kinds(compiled, N=16)
    assert not [one.launch for one in small if one.stack_bytes]


def test_64_heads_spill_nothing_between_products(compiled: list[Compiled]) -> None:
    """Queries and results are spilt around the loop over BF16 keys, a few registers that it does not use in it."""
    for one in kinds(compiled, N=64, FP8=False):
        sass = one.sass()
        assert not re.search(r"\b(STL|LDL)\b", sass[sass.index("HGMMA") : sass.rindex("HGMMA")])


def test_decoding_spills_little(compiled: list[Compiled]) -> None:
    for one in kinds(compiled, N=64, FP8=True):
        assert one.stack_bytes <= 320


def test_products_use_the_tensor_cores(compiled: list[Compiled]) -> None:
    for one in kinds(compiled, N=64):
        assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in one.ptx
    for one in kinds(compiled, N=16):
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in one.ptx


def test_keys_come_by_asynchronous_copies(compiled: list[Compiled]) -> None:
    """16 bytes at a time; a row's place is read a tile before the row."""
    for one in kinds(compiled):
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", one.ptx)
        assert not re.search(r"cp\.async\.ca\.shared\.global \[.*\], \[.*\], 0x8", one.ptx)


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx
