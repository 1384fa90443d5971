"""FP8 kernels compiled for Hopper without one: they fit an SM, nothing spills, and the instructions are those meant."""

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import triton.backends.nvidia.compiler as nvidia  # for the disassembler it carries

from ownpath.kernels.dsl.cache import compile_missing, stem
from ownpath.kernels.fp8.choose import w8a8_config, w8a8_configs, w8a16_config, w8a16_configs
from ownpath.kernels.fp8.config import CTA_SMEM, MAX_SMEM, Fp8Config, QuantizeConfig, W8A8Config, W8A16Config
from ownpath.kernels.grouped.choose import choices

SMS = 132
# Row blocks, K blocks, scales folded, ragged: V4-Flash's shapes, float32 scales, uneven shards, the smallest.
WEIGHTS = ((24, 32, True, False), (512, 8, True, False), (64, 64, True, False), (64, 32, True, False),
           (64, 16, True, False), (24, 16, False, False), (14, 5, False, True), (2, 1, True, False))  # fmt: skip


def configs() -> list[Fp8Config]:
    """Returns every kernel that the table and the rules can choose for these weights."""
    found: list[Fp8Config] = [QuantizeConfig(power_of_two, num_k) for power_of_two in (True, False) for num_k in (1, 2)]
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels, compiled once into a cache of their own."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
        compile_missing(configs())
    return folder


def cuobjdump(option: str, cache: Path, config: Fp8Config, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(cache))
    return disassembled(option, stem(config).with_suffix(".cubin"))


@lru_cache(maxsize=256)
def disassembled(option: str, binary: Path) -> str:
    """Returns the toolkit's output for a kernel, cached."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.name)
def test_it_fits_without_spilling(config: Fp8Config, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = cuobjdump("-res-usage", cache, config, monkeypatch)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    registers, stack, shared = map(int, found.groups())
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
def test_it_uses_the_tensor_cores(
    config: W8A16Config | W8A8Config, instruction: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sass = cuobjdump("-sass", cache, config, monkeypatch)
    assert instruction in sass
    assert "UBLKCP" in sass, "operands come by bulk copies"
    assert "STL" not in sass


@pytest.mark.parametrize(
    "config",
    [config for config in configs() if isinstance(config, W8A16Config) and config.wgmma and config.folded],
    ids=lambda config: config.name,
)
def test_decoding_overlaps_with_the_tensor_cores(
    config: W8A16Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sass = cuobjdump("-sass", cache, config, monkeypatch)
    assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == 1, "one at the end; more: the assembler has serialised them"
