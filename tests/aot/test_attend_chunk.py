"""Attention of chunks compiles for sm_90 as its launcher launches it. Nothing runs."""

import re

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.conformance.chunks import make_chunk_inputs
from ownpath.kernels.attend import checks
from ownpath.kernels.chunks.cases import CASES
from ownpath.kernels.chunks.launch import ATTEND_CHUNK_HOPPER

SHARED_BYTES = 232448  # what one program may use on sm_90
TINY = [case for case in CASES if case.tiny]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of the tiny cases."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(checks, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for case in TINY:
            ATTEND_CHUNK_HOPPER(*make_chunk_inputs(case, torch.device("cpu")).arguments)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def own(compiled: list[Compiled]) -> list[Compiled]:
    return [one for one in compiled if one.launch.name == "attend_chunk_hopper_kernel"]


def test_one_compilation_serves_every_size(hopper: list[Compiled]) -> None:
    """Of rows, requests, heads, blocks and selections: one for each ratio, and of Triton's form for few heads and for
    FP8 pages."""
    assert len(own(hopper)) == 3
    assert len(hopper) == 3 + 5 + 2


def test_shared_memory_fits(hopper: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in hopper)


def test_hoppers_own_form_spills_nothing(hopper: list[Compiled]) -> None:
    assert not [one.launch for one in own(hopper) if one.stack_bytes]


def test_warpgroups_share_the_products(hopper: list[Compiled]) -> None:
    """Half of a tile's keys, or half of the channels, in one instruction; no product twice."""
    for one in own(hopper):
        shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", one.ptx)
        assert sorted(shapes) == ["m64n256k16"] * 4 + ["m64n32k16"] * 32


def test_keys_come_by_asynchronous_copies(hopper: list[Compiled]) -> None:
    for one in own(hopper):
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", one.ptx)
        assert not re.search(r"cp\.async\.ca\.shared\.global", one.ptx)
