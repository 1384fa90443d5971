"""The cache writes of a decode step compile for sm_90 as their launchers launch them. Nothing is run."""

from dataclasses import replace

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.conformance.entries import draw_step, with_pages
from ownpath.kernels.angles import launch as angles
from ownpath.kernels.angles.types import Frequencies
from ownpath.kernels.entries import checks
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.launch import ENTRIES
from ownpath.kernels.entries.types import KeyRounding
from ownpath.numerics import INDEX_FORMS

CPU = torch.device("cpu")
PROGRAMS_PER_SM = 3
"""At least; a program has 128 threads."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch: of each kind of layer, at few and many rows, rounded and in pages, with several rows of a
    request; and a step's angles."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        for module in (checks, angles):
            patch.setattr(module, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for case in (case for case in CASES if case.tiny and case.sizes[0] == 512):
            for num_rows in (2, 65):
                step = draw_step(case, num_rows, CPU)
                fewer = replace(step.weights, keys=KeyRounding.FP8, index_keys=KeyRounding.FP4)
                ENTRIES(*step.arguments)
                ENTRIES(*step.arguments[:4], fewer)
                for index_format in INDEX_FORMS:
                    ENTRIES(*with_pages(step, index_format).arguments[:4], fewer)
            several = draw_step(case, 2, CPU, positions=[126, 127], group=2)
            ENTRIES(*several.arguments)
            ENTRIES(*with_pages(several).arguments)
        positions_T = torch.zeros(2, dtype=torch.int32)
        angles.STEP_ANGLES.run(positions_T, angles.STEP_ANGLES.prepare(Frequencies(torch.ones(32), torch.ones(32))))
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def test_nothing_spills_and_programs_share_a_multiprocessor(compiled: list[Compiled]) -> None:
    assert {one.launch.name for one in compiled} == {"entries_kernel", "step_angles_kernel"}
    # The range reduction of large angles has its digits in local memory.
    assert not [one.launch for one in compiled if one.stack_bytes and one.launch.name == "entries_kernel"]
    assert all(one.registers <= 65536 // (128 * PROGRAMS_PER_SM) for one in compiled)


def test_several_rows_of_a_request_have_a_kernel(compiled: list[Compiled]) -> None:
    assert {dict(one.launch.constants).get("SPARE") for one in compiled} == {None, 0, 8}


def test_launches_overlap_with_their_neighbours(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.wait" in one.ptx
        assert "griddepcontrol.launch_dependents" in one.ptx


def test_shared_entries_are_announced_behind_a_barrier(compiled: list[Compiled]) -> None:
    """The counter is released and acquired for the whole device, and what others wrote is read past the L1 cache."""
    shared = [one for one in compiled if dict(one.launch.constants).get("RATIO") == 128]
    assert shared
    for one in shared:
        before, counter, after = one.ptx.partition("atom.global.gpu.acq_rel.add")
        assert counter
        assert "bar.sync" in before
        assert "ld.global.cg" in after


def test_angles_are_as_precise_as_torch(compiled: list[Compiled]) -> None:
    """No approximate sine: the toolkit's function, with full range reduction."""
    (found,) = (one for one in compiled if one.launch.name == "step_angles_kernel")
    assert "sin.approx" not in found.ptx
    assert "cos.approx" not in found.ptx
