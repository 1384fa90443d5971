"""The experts' FP8 product, compiled for Hopper without one: nothing spills, and products are waited for once a group.

In silence the assembler puts a wait behind every ``wgmma`` where it cannot follow the groups in flight: with sums of
several sizes in one tile, or with a group that is in flight at the end of a loop's body.
"""

import re
from pathlib import Path

import pytest
from support.disassembled import sass

from ownpath.kernels.fp8_experts.choose import SHAPES, make
from ownpath.kernels.fp8_experts.config import ExpertGemmConfig, QuantizeRowsConfig, part_sizes
from ownpath.kernels.fp8_experts.read_back_config import ReadBackConfig

PRODUCT = make(SHAPES[2][1], 4096, 2048, wide=False).down


@pytest.mark.parametrize("config", [PRODUCT], ids=lambda config: config.name)
def test_a_product_waits_once_for_each_group(config: ExpertGemmConfig, binary: Path) -> None:
    text = sass(binary)
    # Two K blocks in the loop and two behind it, for every size of tile.
    groups = sum(4 * config.num_m64 * len(part_sizes(size, config.parts)) for size in config.n_sizes)
    assert text.count("QGMMA") == 4 * groups
    assert text.count("WARPGROUP.DEPBAR") == groups
    assert not re.search(r"\b(STL|LDL)\b", text)


@pytest.mark.parametrize("config", [QuantizeRowsConfig(True), QuantizeRowsConfig(False), ReadBackConfig()])
def test_quantisers_move_16_bytes_and_spill_nothing(config: object, binary: Path) -> None:
    text = sass(binary)
    assert len(re.findall(r"LDG\.E\.128", text)) == 2
    assert re.search(r"STG\.E\.128", text)
    assert "F2FP.SATFINITE.E4M3" in text
    assert not re.search(r"\b(STL|LDL)\b", text)
