"""The NVFP4 kernels that the table and the rules pick, compiled for Hopper without one.

They fit an SM, nothing spills, weights reach the tensor cores from registers, and products overlap with decoding: the
assembler has not put a full wait behind every ``wgmma``, which it does in silence when registers run short.
"""

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import triton.backends.nvidia.compiler as nvidia  # for the disassembler it carries

from ownpath.kernels.dsl.cache import compile_missing, stem
from ownpath.kernels.nvfp4.choose import choose_linear, moe_choice, moe_table
from ownpath.kernels.nvfp4.config import MAX_SHARED_BYTES, AlignConfig, CombineConfig, GemmConfig, PermuteConfig
from ownpath.kernels.nvfp4.sliced_config import SlicedConfig, SlicedSumConfig


def gemms() -> list[GemmConfig]:
    found = [choose_linear(count, 4096, 4096, False).gemm for count in (1, 64, 2048)]
    found.append(choose_linear(1, 32768, 1024, False).gemm)
    for shape in ((4096, 2048), (7168, 3072)):
        for _, knobs in moe_table(*shape):
            choice = moe_choice(knobs, *shape, wide=False)
            found += [choice.gate_up, choice.down]
    return list({config.name: config for config in found}.values())


SLICED = (SlicedConfig(1, 5, 4), SlicedConfig(2, 5, 4), SlicedConfig(4, 4, 4, wide_ids=True, mapped=True, num_shared=1))
HELPERS = (
    *SLICED,
    SlicedSumConfig(),
    SlicedSumConfig(True, True, 1),
    AlignConfig(False, False, 0, few=1),
    AlignConfig(True, True, 1, few=2),
    AlignConfig(True, True, 1),
    AlignConfig(False, False, 0, 8),
    PermuteConfig(),
    CombineConfig(0, True),
    CombineConfig(1, False),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels, compiled once into a cache of their own."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
        compile_missing([*gemms(), *HELPERS])
    return folder


@lru_cache(maxsize=256)
def tool(name: str, *options: str) -> str:
    """Returns the output of a tool of the toolkit; each kernel is disassembled once."""
    command = [str(Path(nvidia.__file__).parent / "bin" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def binary(cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(cache))
    return str(stem(request.getfixturevalue("config")).with_suffix(".cubin"))


@pytest.mark.parametrize("config", [*gemms(), *HELPERS], ids=lambda config: config.name)
def test_it_fits_without_spilling(config: GemmConfig, binary: str) -> None:
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", binary))
    assert found
    registers, stack, shared = map(int, found.groups())
    # Eight bytes: a slot the compiler reserves and the code does not use.
    assert stack <= 8
    assert "LDL" not in tool("nvdisasm", "-c", binary)
    assert shared <= MAX_SHARED_BYTES
    if isinstance(config, GemmConfig):
        assert registers * config.num_threads <= 65536


@pytest.mark.parametrize("config", SLICED, ids=lambda config: config.name)
def test_slices_share_an_sm_and_wait_for_no_memory(config: SlicedConfig, binary: str) -> None:
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", tool("cuobjdump", "-res-usage", binary))
    assert found
    registers, shared = map(int, found.groups())
    assert -(-registers // 8) * 8 * config.num_threads * config.per_sm <= 65536
    # The driver keeps 1 KiB of each CTA's shared memory for itself.
    assert shared - 1024 <= config.smem_bytes <= config.max_smem_bytes
    code = tool("nvdisasm", "-c", binary)
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", code)) == 8 + 8, "a stage of gate and up, and one of down"
    assert "MEMBAR" not in code, "activations go to the cluster without fences"


@pytest.mark.parametrize("config", gemms(), ids=lambda config: config.name)
def test_decoding_overlaps_with_the_tensor_cores(config: GemmConfig, binary: str) -> None:
    code = tool("nvdisasm", "-c", binary)
    products = len(re.findall(r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+", code))
    assert products == len(config.n_sizes) * config.num_m64 * config.num_steps, "weights come from registers"
    full_waits = code.count("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert full_waits == len(config.n_sizes), "one at the end of a tile; more: the assembler has serialised them"
    assert "F2F." not in code, "codes and scales are decoded by bits, not by conversions"


@pytest.mark.parametrize("config", gemms()[:1], ids=lambda config: config.name)
def test_half_selection_is_free(config: GemmConfig, binary: str) -> None:
    """Scales of two rows share a register: the multiplier picks halves, no instruction spreads them."""
    code = tool("nvdisasm", "-c", binary)
    assert re.search(r"HMUL2\.BF16_V2 R\d+, R\d+, R\d+(\.reuse)?\.H0_H0", code)
    assert re.search(r"HMUL2\.BF16_V2 R\d+, R\d+, R\d+(\.reuse)?\.H1_H1", code)
