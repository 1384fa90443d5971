"""Hopper's decode attention compiled without a GPU: it fits an SM, spills next to nothing, and multiplies as meant."""

import re
from pathlib import Path

import pytest
from support.covering import covering, slow_beside
from support.disassembled import sass, usage

from ownpath.kernels.attend.choose_sm90 import reachable_configs
from ownpath.kernels.attend.config_sm90 import LAUNCH_REGISTERS, MAX_SMEM, AttendCombineConfig, AttendConfig

PAGES = AttendConfig(64, selected=True, split=True, fp8=True, spare=8)
CONFIGS = (
    PAGES,
    AttendConfig(2, merges=True),
    AttendConfig(64, selected=True, split=True, fp8=True),
    AttendCombineConfig(),
)
KEPT = covering(CONFIGS)
ATTEND = [config for config in CONFIGS if isinstance(config, AttendConfig)]


def test_calls_launch_what_is_listed() -> None:
    assert set(CONFIGS) <= {*reachable_configs(is_invariant=False), *reachable_configs(is_invariant=False, spare=8)}
    assert set(reachable_configs(is_invariant=True)) <= set(reachable_configs(is_invariant=False))


@pytest.mark.parametrize("config", slow_beside(KEPT, CONFIGS), ids=lambda config: config.name)
def test_it_fits_an_sm(config: AttendConfig | AttendCombineConfig, binary: Path) -> None:
    registers, stack, shared = usage(binary)
    # A few words that no loop over keys uses.
    assert stack <= 32
    assert shared <= MAX_SMEM
    assert registers * config.num_threads <= 65536


@pytest.mark.parametrize("config", slow_beside(KEPT, ATTEND), ids=lambda config: config.name)
def test_warpgroups_ask_for_no_more_registers_than_a_cta_has(config: AttendConfig, binary: Path) -> None:
    """One that asks for more than others leave waits for ever; one that asks for fewer than it has, or releases more,
    does what nobody defines."""
    assert sum(config.registers) <= 3 * LAUNCH_REGISTERS
    text = sass(binary)
    found = {kind: [int(count, 16) for count in re.findall(rf"USETMAXREG\.{kind}\.CTAPOOL [^;]*?(0x\w+)", text)]
             for kind in ("TRY_ALLOC", "DEALLOC")}  # fmt: skip
    assert min(found["TRY_ALLOC"]) > LAUNCH_REGISTERS > max(found["DEALLOC"])
    assert sorted(found["TRY_ALLOC"] + found["DEALLOC"]) == sorted(config.registers)


@pytest.mark.parametrize("config", slow_beside(KEPT, ATTEND), ids=lambda config: config.name)
def test_products_stay_asynchronous(config: AttendConfig, binary: Path) -> None:
    """32 instructions a tile for scores, 4 + 4 for values; scores and values of neighbouring tiles are in flight at
    once, and a stage is released when the older ones are done."""
    text = sass(binary)
    assert len(re.findall(r"HGMMA\.64x64x16\.F32\.BF16", text)) == 2 * 32
    assert len(re.findall(r"HGMMA\.64x256x16\.F32\.BF16", text)) == 3 * 4
    assert "WARPGROUP.DEPBAR.LE gsb0, 0x2" in text
    products = text[text.index("HGMMA") : text.rindex("HGMMA")]
    assert len(re.findall(r"\bSTL\b", products)) == 0


@pytest.mark.parametrize("config", slow_beside(KEPT, ATTEND), ids=lambda config: config.name)
def test_queries_and_keys_are_on_their_way_together(config: AttendConfig, binary: Path) -> None:
    """A thread's 16 units of queries are copied to shared memory, and so are BF16 keys: 16 a half. Of a tile in FP8
    pages it has 18 units in registers, and the next 18 follow half by half."""
    text = sass(binary)
    assert len(re.findall(r"LDGSTS\.E\.\S*BYPASS\S*128", text)) == 16 + 32 * (not config.fp8)
    assert len(re.findall(r"LDG\.E\.NA\.\S*128", text)) == 36 * config.fp8
    assert ("UCGABAR" in text) == config.merges


@pytest.mark.parametrize("config", [PAGES], ids=lambda config: config.name)
def test_a_pair_of_codes_takes_four_instructions(config: AttendConfig, binary: Path) -> None:
    """Spread bytes, move bits, mask, scale: 8 pairs of 14 units. What moves them is no shift, whose pipe is busy."""
    text = sass(binary)
    loading = text[text.index("USETMAXREG") : text.rindex("HMUL2.BF16")]
    pairs = 8 * 14
    assert len(re.findall(r"PRMT \S+ \S+ 0x(?:4140|4342), RZ", loading)) == pairs
    assert len(re.findall(r"LOP3\.LUT \S+ \S+ 0x87f087f0, RZ, 0xc0", loading)) == pairs
    # 4 units of two halves are multiplied again where a scale is above 2^7.
    assert text.count("HMUL2.BF16") == pairs + 2 * 4 * 4
    assert not re.search(r"LEA \S+ \S+ 0x78007800", loading)
    assert "MEMBAR" not in loading
