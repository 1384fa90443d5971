"""The NVFP4 kernels that the table and the rules pick, compiled for Hopper without one.

They fit an SM, nothing spills, weights reach the tensor cores from registers, and products overlap with decoding: the
assembler has not put a full wait behind every ``wgmma``, which it does in silence when registers run short.
"""

import re
from pathlib import Path

import pytest
from support.covering import covering, slow_beside
from support.disassembled import code, usage

from ownpath.kernels.nvfp4.choose import choose_linear, moe_choice, moe_table
from ownpath.kernels.nvfp4.config import MAX_SHARED_BYTES, AlignConfig, CombineConfig, GemmConfig, PermuteConfig
from ownpath.kernels.nvfp4.moe_sliced_config import SlicedConfig, SlicedSumConfig


def gemms() -> list[GemmConfig]:
    found = [choose_linear(count, 4096, 4096, False).gemm for count in (1, 64, 2048)]
    found.append(choose_linear(1, 32768, 1024, False).gemm)
    for shape in ((4096, 2048), (7168, 3072)):
        for _, knobs in moe_table(*shape):
            choice = moe_choice(knobs, *shape, wide=False)
            found += [choice.gate_up, choice.down]
    return list({config.name: config for config in found}.values())


KEPT = covering(gemms())
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


@pytest.mark.parametrize("config", [*slow_beside(KEPT, gemms()), *HELPERS], ids=lambda config: config.name)
def test_it_fits_without_spilling(config: GemmConfig, binary: Path) -> None:
    registers, stack, shared = usage(binary)
    # Eight bytes: a slot the compiler reserves and the code does not use.
    assert stack <= 8
    assert "LDL" not in code(binary)
    assert shared <= MAX_SHARED_BYTES
    if isinstance(config, GemmConfig):
        assert registers * config.num_threads <= 65536


@pytest.mark.parametrize("config", SLICED, ids=lambda config: config.name)
def test_slices_share_an_sm_and_wait_for_no_memory(config: SlicedConfig, binary: Path) -> None:
    registers, _, shared = usage(binary)
    assert -(-registers // 8) * 8 * config.num_threads * config.per_sm <= 65536
    # The driver keeps 1 KiB of each CTA's shared memory for itself.
    assert shared - 1024 <= config.smem_bytes <= config.max_smem_bytes
    text = code(binary)
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", text)) == 8 + 8, "a stage of gate and up, and one of down"
    assert "MEMBAR" not in text, "activations go to the cluster without fences"


@pytest.mark.parametrize("config", slow_beside(KEPT, gemms()), ids=lambda config: config.name)
def test_decoding_overlaps_with_the_tensor_cores(config: GemmConfig, binary: Path) -> None:
    text = code(binary)
    products = len(re.findall(r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+", text))
    assert products == len(config.n_sizes) * config.num_m64 * config.num_steps, "weights come from registers"
    full_waits = text.count("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert full_waits == len(config.n_sizes), "one at the end of a tile; more: the assembler has serialised them"
    assert "F2F." not in text, "codes and scales are decoded by bits, not by conversions"


@pytest.mark.parametrize("config", gemms()[1:2], ids=lambda config: config.name)
def test_half_selection_is_free(config: GemmConfig, binary: Path) -> None:
    """Scales of two rows share a register: the multiplier picks halves, no instruction spreads them."""
    text = code(binary)
    assert re.search(r"HMUL2\.BF16_V2 R\d+, R\d+, R\d+(\.reuse)?\.H0_H0", text)
    assert re.search(r"HMUL2\.BF16_V2 R\d+, R\d+, R\d+(\.reuse)?\.H1_H1", text)
