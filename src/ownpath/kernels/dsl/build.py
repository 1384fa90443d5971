"""Compiles kernels into the cache: ``python -m ownpath.kernels.dsl.build`` reads one line of JSON for each from stdin.

It is a separate process, because the DSL reads its target from the environment when it is imported.
"""

import json
import os
import sys
import tempfile
from typing import Any

from ownpath.kernels.attend.config_sm90 import AttendCombineConfig, AttendConfig
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import ARCH, COMPILER, store
from ownpath.kernels.fp8.config import QuantizeConfig, W8A8Config, W8A16Config
from ownpath.kernels.grouped.config import GroupedFp8Config
from ownpath.kernels.nvfp4.config import COPY_THREADS, AlignConfig, CombineConfig, GemmConfig, PermuteConfig

FP8 = (W8A16Config, W8A8Config, QuantizeConfig, GroupedFp8Config)
ATTEND = (AttendConfig, AttendCombineConfig)
NVFP4 = (GemmConfig, AlignConfig, PermuteConfig, CombineConfig)
CONFIGS = {cls.__name__: cls for cls in (*NVFP4, *FP8, *ATTEND)}


def compiled(config: Config) -> tuple[Any, int, int]:
    """Returns the DSL's compiled function, threads per CTA and CTAs per cluster."""
    if isinstance(config, FP8):
        return compiled_fp8(config), config.num_threads, config.cluster
    if isinstance(config, ATTEND):
        return compiled_attend(config), config.num_threads, config.cluster
    from ownpath.kernels.nvfp4 import gemm_sm90, moe_sm90

    if isinstance(config, GemmConfig):
        return gemm_sm90.compile_gemm(config), config.num_threads, config.cluster
    if isinstance(config, AlignConfig):
        return moe_sm90.compile_align(config), config.num_threads, config.num_ctas
    if isinstance(config, CombineConfig):
        return moe_sm90.compile_combine(config), COPY_THREADS, 1
    assert isinstance(config, PermuteConfig)
    return moe_sm90.compile_permute(), COPY_THREADS, 1


def compiled_fp8(config: W8A16Config | W8A8Config | QuantizeConfig) -> Any:
    """Returns the DSL's compiled function of an FP8 kernel."""
    from ownpath.kernels.fp8 import quantize_sm90, w8a8_sm90, w8a16_sm90
    from ownpath.kernels.grouped import fp8_sm90

    if isinstance(config, GroupedFp8Config):
        return fp8_sm90.compile_grouped(config)
    if isinstance(config, W8A16Config):
        return w8a16_sm90.compile_w8a16(config)
    if isinstance(config, W8A8Config):
        return w8a8_sm90.compile_w8a8(config)
    return quantize_sm90.compile_quantize(config)


def compiled_attend(config: AttendConfig | AttendCombineConfig) -> Any:
    """Returns the DSL's compiled function of an attention kernel."""
    from ownpath.kernels.attend import attend_sm90, combine_sm90

    if isinstance(config, AttendConfig):
        return attend_sm90.compile_attend(config)
    return combine_sm90.compile_combine()


def build(config: Config) -> None:
    """Compiles one kernel into the cache."""
    function, num_threads, cluster = compiled(config)
    entry = next(line.split()[2].split("(")[0] for line in function.__ptx__.splitlines() if ".visible .entry" in line)
    facts = {"entry": entry, "num_threads": num_threads, "cluster": cluster, "compiler": COMPILER, "arch": ARCH}
    store(config, bytes(function.__cubin__), facts)


def main() -> None:
    """Compiles the kernel of each line of stdin and prints its name when it is done."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"ARCH": ARCH, "KEEP_PTX": "1", "KEEP_CUBIN": "1", "DUMP_DIR": scratch}
        os.environ.update({f"CUTE_DSL_{key}": value for key, value in settings.items()})
        for line in sys.stdin:
            kind, fields = json.loads(line)
            fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            config = CONFIGS[kind](**fields)
            build(config)
            print(config.name, flush=True)


if __name__ == "__main__":
    main()
