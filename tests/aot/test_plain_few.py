"""The products with few rows of x compile for sm_90 as they are launched: weights come first, and nothing spills."""

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.plain.few import launch_few
from ownpath.kernels.plain.few_choose import TILES, FewTile, PlainTile

REGISTERS = 65536  # of a streaming multiprocessor
WIDTHS = (4096, 7168, 256)
"""V4-Flash's, V4-Pro's and the embedded model's hidden size."""

Tiled = tuple[PlainTile, int, Compiled]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Tiled]:
    """Every tile at every width."""
    folder, found = tmp_path_factory.mktemp("cubins"), []
    for tile in dict.fromkeys(tile for *_, tile in TILES):
        for width in WIDTHS:
            with recorded_launches() as launches:
                x, weight = torch.zeros(1, width).bfloat16(), torch.zeros(64, width).bfloat16()
                launch_few(x, weight, torch.zeros(1, 64), tile)
            found.append((tile, width, compile_launch(launches[0], 90, folder)))
    return found


def test_nothing_spills_and_a_program_fits(compiled: list[Tiled]) -> None:
    for tile, width, one in compiled:
        assert not one.stack_bytes, (tile, width)
        assert 32 * tile.warps_for(width) * one.registers <= REGISTERS, (tile, width)


def test_weights_are_loaded_before_the_kernel_waits(compiled: list[Tiled]) -> None:
    """All steps that a warp holds ahead, 16 bytes a lane; nothing but the sums passes through shared memory."""
    for tile, width, one in compiled:
        if not isinstance(tile, FewTile):
            continue
        before, _, after = one.sass().partition("ACQBULK")
        halves = -(-tile.live // 8)  # a load reads 8 rows
        ahead = min(tile.ahead, tile.chunks_for(width))
        assert before.count("LDG.E.128") == halves * ahead, (tile, width)
        x_first, _, _ = after.partition("HMMA.16816.F32.BF16")
        x_ahead = min(tile.x_ahead, tile.chunks_for(width))
        assert x_first.count("LDG.E.128") >= max(1, tile.tokens // 8) * x_ahead, (tile, width)
        assert "HMMA.16816.F32.BF16" in after
        assert "LDSM" not in after
        sums = 4 * tile.warps_for(width) * tile.rows * tile.tokens
        assert one.shared_bytes <= sums, (tile, width)


def test_all_weights_are_loaded_first_without_tensor_cores(compiled: list[Tiled]) -> None:
    for tile, width, one in compiled:
        if isinstance(tile, FewTile) or width < 4096:
            continue
        before, _, after = one.sass().partition("ACQBULK")
        parts, threads = tile.constants(width), 32 * tile.warps
        loads = parts["CHUNKS"] * max(1, tile.live * parts["CHUNK"] // (8 * threads))
        assert before.count("LDG.E.128") == loads, (tile, width)
        assert "FFMA" in after or "FMUL" in after


def test_launches_overlap_with_their_neighbours(compiled: list[Tiled]) -> None:
    for _, _, one in compiled:
        assert dict(one.launch.options)["launch_pdl"]
        assert "griddepcontrol.launch_dependents" in one.ptx
