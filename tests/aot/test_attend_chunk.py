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
NUM_PRODUCTS = 36
"""Of a tile, in one warpgroup: 32 of its scores, 4 of its sums over values. A window is two tiles; a row of more has its
first scores before the loop over tiles, and its last sums behind it."""
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


def test_no_loop_over_bf16_keys_spills(hopper: list[Compiled]) -> None:
    """Some registers are spilt once a row."""
    for one in own(hopper):
        if not dict(one.launch.constants).get("FP8"):
            num_products = 2 * NUM_PRODUCTS if is_window(one) else NUM_PRODUCTS
            assert not re.search(r"\b(STL|LDL)\b", multiplying_loop(one.sass(), num_products))


def multiplying_loop(sass: str, num_products: int) -> str:
    """Returns the shortest loop that has all products."""
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
    """Half of a tile's keys, or half of the channels, in one instruction; two tiles in the code."""
    for one in own(hopper):
        shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", one.ptx)
        assert sorted(shapes) == ["m64n256k16"] * 8 + ["m64n32k16"] * 64


def test_no_product_waits_for_the_one_before(hopper: list[Compiled]) -> None:
    """The assembler adds no waits of its own: there are those of the source alone."""
    for one in own(hopper):
        assert one.sass().count("WARPGROUP.DEPBAR") == (3 if is_window(one) else 4)


def test_keys_come_by_asynchronous_copies(hopper: list[Compiled]) -> None:
    for one in own(hopper):
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", one.ptx)
        assert not re.search(r"cp\.async\.ca\.shared\.global", one.ptx)
