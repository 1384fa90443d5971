"""Attention of chunks compiles for sm_90 as its launcher launches it. Nothing runs."""

import math
import re
from dataclasses import replace

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.conformance.chunks import make_chunk_inputs
from ownpath.kernels.attend import checks
from ownpath.kernels.chunks.cases import CASES
from ownpath.kernels.chunks.launch import ATTEND_CHUNK_HOPPER

SHARED_BYTES = 232448  # what one program may use on sm_90
SCORES, WINDOW_SUMS, SUMS = 32, 8, 8
"""Products of a warpgroup: of the scores of a tile, of a window's values, of a tile's."""
TINY = [case for case in CASES if case.tiny]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of the tiny cases, and one whose scores nothing bounds."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(checks, "check_rank", lambda name, tensor, rank, runs_on_cpu: None)  # refuses what is on CPU
        for case in TINY:
            *given, weights = make_chunk_inputs(case, torch.device("cpu")).arguments
            ATTEND_CHUNK_HOPPER(*given, weights)
            if case.label == "flash CSA bf16":
                ATTEND_CHUNK_HOPPER(*given, replace(weights, largest_norm=math.inf))
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 90, folder) for launch in launches]


def own(compiled: list[Compiled]) -> list[Compiled]:
    return [one for one in compiled if one.launch.name != "attend_chunk_kernel"]


def is_window(one: Compiled) -> bool:
    return one.launch.name == "attend_chunk_window_kernel"


def test_one_compilation_serves_every_size(hopper: list[Compiled]) -> None:
    """Of rows, requests, heads, blocks and selections: one for each ratio and form of its entries, of Triton's form
    for few heads, and that of scores without a bound."""
    assert len(own(hopper)) == 5 + 1
    assert len(hopper) == 5 + 1 + 5


def test_shared_memory_fits(hopper: list[Compiled]) -> None:
    assert all(one.shared_bytes <= SHARED_BYTES for one in hopper)


def test_no_loop_over_keys_spills(hopper: list[Compiled]) -> None:
    """BF16 keys of tiles spill nowhere; windows spill some registers once a row."""
    for one in own(hopper):
        if is_window(one):
            loops = [multiplying_loop(one.sass(), SCORES + WINDOW_SUMS)]
        elif dict(one.launch.constants)["FP8"]:
            loops = [multiplying_loop(one.sass(), count) for count in (SCORES, SUMS)]
        else:
            loops = [] if one.stack_bytes == 0 else ["STL"]
        assert not any(re.search(r"\b(STL|LDL)\b", loop) for loop in loops)


def multiplying_loop(sass: str, num_products: int) -> str:
    """Returns the shortest loop that has so many products."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    found = []
    for number, (_, text) in enumerate(lines):
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and at.get(int(back[1], 16), number) < number:
            body = "\n".join(text for _, text in lines[at[int(back[1], 16)] : number])
            if body.count("HGMMA") == num_products:
                found.append(body)
    return min(found, key=len)


def test_warpgroups_share_the_products(hopper: list[Compiled]) -> None:
    """One warpgroup makes a tile's scores, two sum over values, of each half of the channels 128; of windows two do
    both, 64 of 128 keys and half of the channels each."""
    for one in own(hopper):
        shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", one.ptx)
        of_sums = ["m64n256k16"] * WINDOW_SUMS if is_window(one) else ["m64n128k16"] * SUMS
        assert sorted(shapes) == of_sums + ["m64n64k16"] * SCORES


def test_the_assembler_adds_no_waits(hopper: list[Compiled]) -> None:
    """Products wait where the source says so, not one behind the other for want of registers."""
    for one in own(hopper):
        assert one.sass().count("WARPGROUP.DEPBAR") == (2 if is_window(one) else 3)


def test_summing_warps_know_each_rows_tiles(hopper: list[Compiled]) -> None:
    """Triton's removal of equal values once took what the loop over rows carried for what it began with: all rows of a
    program had as many tiles as its first, which no test with equally long rows sees."""
    for one in own(hopper):
        if not is_window(one):
            summing = one.intermediate.split("default {")[1].split("partition0(")[0].splitlines()
            of_rows, of_tiles = (number for number, line in enumerate(summing) if "scf.for" in line)
            loads = sum("tt.load" in line for line in summing[of_rows:of_tiles])
            assert loads == (2 if dict(one.launch.constants)["RATIO"] == 4 else 1)


def test_keys_come_by_asynchronous_copies(hopper: list[Compiled]) -> None:
    for one in own(hopper):
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", one.ptx)
        assert not re.search(r"cp\.async\.ca\.shared\.global", one.ptx)
