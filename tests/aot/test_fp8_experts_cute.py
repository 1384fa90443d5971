"""The experts' FP8 product, compiled for Hopper without one: nothing spills, and products are waited for once a group.

In silence the assembler puts a wait behind every ``wgmma`` where it cannot follow the groups in flight: with sums of
several sizes in one tile, or with a group that is in flight at the end of a loop's body.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton.backends.nvidia.compiler as nvidia  # for the disassembler it carries

from ownpath.kernels.dsl.cache import compile_missing, stem
from ownpath.kernels.fp8_experts.choose import SHAPES, make
from ownpath.kernels.fp8_experts.config import QuantizeRowsConfig, part_sizes
from ownpath.kernels.fp8_experts.read_back_config import ReadBackConfig

PRODUCT = make(SHAPES[2][1], 4096, 2048, wide=False).down


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the product and the quantisers."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
        compile_missing([PRODUCT, QuantizeRowsConfig(True), QuantizeRowsConfig(False), ReadBackConfig()])
    return folder


def sass(folder: Path, config: object, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    cubin = f"{stem(config)}.cubin"
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def test_a_product_waits_once_for_each_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sass(folder, PRODUCT, monkeypatch)
    # Two K blocks in the loop and two behind it, for every size of tile.
    groups = sum(4 * PRODUCT.num_m64 * len(part_sizes(size, PRODUCT.parts)) for size in PRODUCT.n_sizes)
    assert text.count("QGMMA") == 4 * groups
    assert text.count("WARPGROUP.DEPBAR") == groups
    assert not re.search(r"\b(STL|LDL)\b", text)


@pytest.mark.parametrize("config", [QuantizeRowsConfig(True), QuantizeRowsConfig(False), ReadBackConfig()])
def test_quantisers_move_16_bytes_and_spill_nothing(
    config: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sass(folder, config, monkeypatch)
    assert len(re.findall(r"LDG\.E\.128", text)) == 2
    assert re.search(r"STG\.E\.128", text)
    assert "F2FP.SATFINITE.E4M3" in text
    assert not re.search(r"\b(STL|LDL)\b", text)
