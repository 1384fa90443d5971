"""Hopper's decode attention compiled without a GPU: it fits an SM, spills next to nothing, and multiplies as meant."""

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import triton.backends.nvidia.compiler as nvidia  # for the disassembler it carries

from ownpath.kernels.attend.choose_sm90 import reachable_configs
from ownpath.kernels.attend.config_sm90 import LAUNCH_REGISTERS, MAX_SMEM, AttendCombineConfig, AttendConfig
from ownpath.kernels.dsl.cache import compile_missing, stem

PAGES = AttendConfig(64, selected=True, split=True, fp8=True)
CONFIGS = (
    PAGES,
    AttendConfig(2, merges=True),
    AttendConfig(64, selected=True, split=True, fp8=True, spare=8),
    AttendCombineConfig(),
)
ATTEND = [config for config in CONFIGS if isinstance(config, AttendConfig)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These kernels, compiled once into a cache of their own."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
        compile_missing(CONFIGS)
    return folder


@lru_cache(maxsize=16)
def disassembled(option: str, binary: Path) -> str:
    """Returns the toolkit's output for a kernel, cached."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout


def cuobjdump(option: str, cache: Path, config: AttendConfig | AttendCombineConfig, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("OWNPATH_KERNEL_CACHE", str(cache))
    return disassembled(option, stem(config).with_suffix(".cubin"))


def test_calls_launch_what_is_listed() -> None:
    assert set(CONFIGS) <= {*reachable_configs(is_invariant=False), *reachable_configs(is_invariant=False, spare=8)}
    assert set(reachable_configs(is_invariant=True)) <= set(reachable_configs(is_invariant=False))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_it_fits_an_sm(
    config: AttendConfig | AttendCombineConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = cuobjdump("-res-usage", cache, config, monkeypatch)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    registers, stack, shared = map(int, found.groups())
    # A few words that no loop over keys uses.
    assert stack <= 32
    assert shared <= MAX_SMEM
    assert registers * config.num_threads <= 65536


@pytest.mark.parametrize("config", ATTEND, ids=lambda config: config.name)
def test_warpgroups_ask_for_no_more_registers_than_a_cta_has(
    config: AttendConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks for more than others leave waits for ever; one that asks for fewer than it has, or releases more,
    does what nobody defines."""
    assert sum(config.registers) <= 3 * LAUNCH_REGISTERS
    sass = cuobjdump("-sass", cache, config, monkeypatch)
    found = {kind: [int(count, 16) for count in re.findall(rf"USETMAXREG\.{kind}\.CTAPOOL [^;]*?(0x\w+)", sass)]
             for kind in ("TRY_ALLOC", "DEALLOC")}  # fmt: skip
    assert min(found["TRY_ALLOC"]) > LAUNCH_REGISTERS > max(found["DEALLOC"])
    assert sorted(found["TRY_ALLOC"] + found["DEALLOC"]) == sorted(config.registers)


@pytest.mark.parametrize("config", ATTEND, ids=lambda config: config.name)
def test_products_stay_asynchronous(config: AttendConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 instructions a tile for scores, 4 + 4 for values; scores and values of neighbouring tiles are in flight at
    once, and a stage is released when the older ones are done."""
    sass = cuobjdump("-sass", cache, config, monkeypatch)
    assert len(re.findall(r"HGMMA\.64x64x16\.F32\.BF16", sass)) == 2 * 32
    assert len(re.findall(r"HGMMA\.64x256x16\.F32\.BF16", sass)) == 3 * 4
    assert "WARPGROUP.DEPBAR.LE gsb0, 0x2" in sass
    products = sass[sass.index("HGMMA") : sass.rindex("HGMMA")]
    assert len(re.findall(r"\bSTL\b", products)) == 0


@pytest.mark.parametrize("config", ATTEND, ids=lambda config: config.name)
def test_queries_and_keys_are_on_their_way_together(
    config: AttendConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's 16 units of queries are copied to shared memory, and so are BF16 keys: 16 a half. Of a tile in FP8
    pages it has 18 units in registers, and the next 18 follow half by half."""
    sass = cuobjdump("-sass", cache, config, monkeypatch)
    assert len(re.findall(r"LDGSTS\.E\.\S*BYPASS\S*128", sass)) == 16 + 32 * (not config.fp8)
    assert len(re.findall(r"LDG\.E\.NA\.\S*128", sass)) == 36 * config.fp8
    assert ("UCGABAR" in sass) == config.merges


def test_a_pair_of_codes_takes_four_instructions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread bytes, move bits, mask, scale: 8 pairs of 14 units. What moves them is no shift, whose pipe is busy."""
    sass = cuobjdump("-sass", cache, PAGES, monkeypatch)
    loading = sass[sass.index("USETMAXREG") : sass.rindex("HMUL2.BF16")]
    pairs = 8 * 14
    assert len(re.findall(r"PRMT \S+ \S+ 0x(?:4140|4342), RZ", loading)) == pairs
    assert len(re.findall(r"LOP3\.LUT \S+ \S+ 0x87f087f0, RZ, 0xc0", loading)) == pairs
    # 4 units of two halves are multiplied again where a scale is above 2^7.
    assert sass.count("HMUL2.BF16") == pairs + 2 * 4 * 4
    assert not re.search(r"LEA \S+ \S+ 0x78007800", loading)
    assert "MEMBAR" not in loading
