"""FP8 kernels compiled for Hopper without one: they fit an SM, nothing spills, and the instructions are those meant."""

from pathlib import Path

import pytest
from support.covering import covering, slow_beside
from support.disassembled import sass, usage

from ownpath.kernels.fp8.choose import quantize_configs, w8a8_config, w8a8_configs, w8a16_config, w8a16_configs
from ownpath.kernels.fp8.config import CTA_SMEM, MAX_SMEM, Fp8Config, W8A8Config, W8A16Config
from ownpath.kernels.grouped.choose import choices

SMS = 132
# Row blocks, K blocks, scales folded, ragged: V4-Flash's shapes, float32 scales, uneven shards, the smallest.
WEIGHTS = ((24, 32, True, False), (512, 8, True, False), (64, 64, True, False), (64, 32, True, False),
           (64, 16, True, False), (24, 16, False, False), (14, 5, False, True), (2, 1, True, False))  # fmt: skip


def configs() -> list[Fp8Config]:
    """Returns every kernel that the table and the rules can choose for these weights."""
    found: list[Fp8Config] = [*quantize_configs(True), *quantize_configs(False)]
    for weight in WEIGHTS:
        found += [*w8a16_configs(weight, SMS, None, False), *w8a16_configs(weight, SMS, None, True)]
        found += w8a8_configs(weight)
    for folded in (True, False):
        found += [
            *choices((128, 32, folded), False),
            *choices((64, 32, folded), False),
            *choices((128, 32, folded), True),
        ]
    return list({config.name: config for config in found}.values())


KEPT = covering(configs())


@pytest.mark.parametrize("config", slow_beside(KEPT, configs()), ids=lambda config: config.name)
def test_it_fits_without_spilling(config: Fp8Config, binary: Path) -> None:
    registers, stack, shared = usage(binary)
    assert stack == 0
    per_sm = config.per_sm if isinstance(config, W8A16Config) else 1
    # The tool's figure includes the 1 KiB that every CTA costs beside its own.
    assert shared - 1024 <= CTA_SMEM[per_sm] <= MAX_SMEM // per_sm
    assert per_sm * shared <= 228 * 1024, "what a Hopper SM has, for all of its CTAs"
    assert registers * config.num_threads * per_sm <= 65536


@pytest.mark.parametrize(
    ("config", "instruction"),
    [
        (w8a16_config(8, WEIGHTS[1], SMS, is_batch_invariant=True), "HMMA.16816.F32.BF16"),
        (w8a16_config(64, WEIGHTS[5], SMS), "HGMMA.64x64x16.F32.BF16"),
        (w8a8_config(2048, WEIGHTS[1], SMS), "QGMMA.64x128x32.F32.E4M3.E4M3"),
        (choices((128, 32, True), False)[0], "HMMA.16816.F32.BF16"),
        (choices((128, 32, True), False)[-1], "HGMMA.64x128x16.F32.BF16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_uses_the_tensor_cores(config: W8A16Config | W8A8Config, instruction: str, binary: Path) -> None:
    text = sass(binary)
    assert instruction in text
    assert "UBLKCP" in text, "operands come by bulk copies"
    assert "STL" not in text


@pytest.mark.parametrize(
    "config",
    slow_beside(KEPT, (one for one in configs() if isinstance(one, W8A16Config) and one.wgmma and one.folded)),
    ids=lambda config: config.name,
)
def test_decoding_overlaps_with_the_tensor_cores(config: W8A16Config, binary: Path) -> None:
    assert sass(binary).count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == 1, (
        "one at the end; more: the assembler has serialised them"
    )
