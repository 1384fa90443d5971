"""Compiles the CuTe DSL kernels for Hopper, without a GPU, and hashes their machine code, to compare two versions.

    python tools/sass.py OUT.json [--few]        compiles every kernel that can be picked (--few: one for each branch)
    python tools/sass.py --compare A.json B.json

Symbol names contain the path of a kernel's module; they are replaced, so that moved code has the same hash. Needs the
compiler (``ownpath[cute]``) and the disassembler that Triton carries. All kernels take minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton.backends.nvidia.compiler as nvidia

from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import compile_missing, stem
from ownpath.kernels.fp8.choose import fp8_table, quantize_configs, w8a8_configs, w8a16_configs
from ownpath.kernels.fp8.config import QuantizeConfig, W8A8Config, W8A16Config, w8a8_stages, w8a16_stages
from ownpath.kernels.nvfp4.choose import choose_linear, fit, linear_config, linear_table, moe_choice, moe_table
from ownpath.kernels.nvfp4.config import AlignConfig, CombineConfig, GemmConfig, PermuteConfig
from ownpath.kernels.nvfp4.moe_sliced_config import SlicedConfig, SlicedSumConfig

SMS = 132
EXPERTS = ((4096, 2048), (7168, 3072), (256, 128))
"""Hidden size and width of V4-Flash's, V4-Pro's and the embedded model's experts."""
MATRICES = ((1536, 4096), (32768, 1024), (4096, 8192), (4096, 4096), (4096, 2048), (8192, 4096),
            (2048, 7168), (65536, 1536), (7168, 16384), (6144, 7168), (7168, 3072), (256, 128))  # fmt: skip
"""Rows and columns of their dense weights."""
TOKENS = (1, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096)


def moe_kernels() -> Iterator[Config]:
    """Yields the experts' two products for every entry of the table, and the kernels around them."""
    for hidden, inter in EXPERTS:
        for _, knobs in moe_table(hidden, inter):
            for wide in (False, True):
                choice = moe_choice(knobs, hidden, inter, wide)
                yield from (choice.gate_up, choice.down)
                if choice.sliced:
                    yield choice.sliced
    for num_shared in (0, 1):
        for mapped in (False, True):
            for wide_ids in (False, True):
                yield SlicedSumConfig(wide_ids, mapped, num_shared)
                yield from (AlignConfig(wide_ids, mapped, num_shared, few=halves) for halves in (1, 2))
                yield from (AlignConfig(wide_ids, mapped, num_shared, ctas) for ctas in (1, 8))
        yield from (CombineConfig(num_shared, wide) for wide in (False, True))
    yield PermuteConfig()


def linear_kernels() -> Iterator[Config]:
    """Yields NVFP4 products of dense weights: the table's, and the rules' for V4's matrices."""
    for entries in linear_table().values():
        yield from (linear_config(knobs) for _, knobs in entries)
    for rows, cols in MATRICES:
        for invariant in (False, True):
            yield from (choose_linear(tokens, rows, cols, invariant).gemm for tokens in TOKENS)


def fp8_kernels() -> Iterator[Config]:
    """Yields FP8 products: the table's, and the rules' for V4's matrices, scales that do not fold, and uneven rows."""
    yield from (config for power_of_two in (False, True) for config in quantize_configs(power_of_two))
    shapes = {(2 * -(-rows // 128), -(-cols // 128)) for rows, cols in MATRICES} | set(fp8_table())
    for shape in sorted(shapes):
        for folded, ragged in ((True, False), (False, False), (False, True)):
            key = (*shape, folded, ragged)
            for invariant in (False, True):
                yield from w8a16_configs(key, SMS, None, invariant)
            yield from w8a8_configs(key)
    yield from (W8A8Config(2, 1, w8a8_stages(2, 1), 2, ragged=ragged) for ragged in (False, True))


def few_kernels() -> Iterator[Config]:
    """Yields a kernel for each branch of the kernels' code."""
    yield fit(GemmConfig(1, 1, 2, (16,), 1, cluster_k=4), 6)
    yield fit(GemmConfig(2, 1, 2, (64,), 1), 6)
    yield fit(GemmConfig(1, 2, 1, (64,), 1, cluster_m=2), 6)
    yield fit(GemmConfig(2, 2, 1, (128,), 1, stage_k=64, depth=2), 4)
    table = moe_table(4096, 2048)
    for at in (0, len(table) // 2, len(table) - 1):
        choice = moe_choice(table[at][1], 4096, 2048, at == 0)
        yield from (choice.gate_up, choice.down)
    yield from (SlicedConfig(1, 5, 4), SlicedConfig(2, 5, 4, True, True, 1), SlicedSumConfig())
    yield from (AlignConfig(False, False, 0, few=1), AlignConfig(True, True, 1), AlignConfig(False, False, 0, 8))
    yield from (CombineConfig(0, True), CombineConfig(1, False), PermuteConfig())
    for num_n, folded, ragged, wgmma in ((8, True, False, False), (16, False, True, False), (64, False, False, True)):
        stages = w8a16_stages(4, num_n)
        yield W8A16Config(4, num_n, stages, 1 + 3 * folded, folded, ragged, wgmma=wgmma)
    yield W8A16Config(2, 32, 4, 2, True, per_sm=2, wgmma=True)
    yield from (W8A8Config(2, 2, w8a8_stages(2, 2), 1), W8A8Config(2, 1, w8a8_stages(2, 1), 2, ragged=True))
    yield W8A8Config(2, 1, w8a8_stages(2, 1, 4), 1, 4)
    yield from (QuantizeConfig(power_of_two) for power_of_two in (False, True))


def disassemble(binary: Path) -> str:
    """Returns a kernel's SASS and resources with its symbols' names replaced."""
    folder = Path(nvidia.__file__).parent / "bin"
    name = json.loads(binary.with_suffix(".json").read_text())["entry"]
    tools = ((folder / "nvdisasm", "-c"), (folder / "cuobjdump", "-res-usage"))
    text = "".join(
        subprocess.run([*map(str, tool), str(binary)], capture_output=True, text=True, check=True).stdout
        for tool in tools
    )
    return text.replace(name, "KERNEL")


def hashes(configs: Iterable[Config], texts: Path | None) -> dict[str, str]:
    """Returns kernel name -> hash of its machine code. texts: a folder to write the code to."""
    chosen = {config.name: config for config in configs}
    compile_missing(chosen.values(), lambda done, total, name: print(f"{done}/{total} {name}", flush=True))
    found = {}
    for name, config in sorted(chosen.items()):
        text = disassemble(stem(config).with_suffix(".cubin"))
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if texts:
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{name}.sass").write_text(text, encoding="utf-8")
    return found


def compare(before: Path, after: Path) -> int:
    """Prints which kernels differ, of those that both files have."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    both = sorted(old.keys() & new.keys())
    different = [name for name in both if old[name] != new[name]]
    print(f"{len(both)} kernels compared, {len(both) - len(different)} identical", *different, sep="\n  ")
    for path, only in ((before, old.keys() - new.keys()), (after, new.keys() - old.keys())):
        if only:
            print(f"only in {path.name}: {len(only)}")
    return 1 if different else 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--few", action="store_true", help="one kernel for each branch of the code")
    parser.add_argument("--only", default="", metavar="PART", help="kernels whose names contain it")
    parser.add_argument("--texts", type=Path, metavar="DIR", help="write the disassembly too")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    if args.out is None:
        parser.error("OUT.json is missing")
    configs = few_kernels() if args.few else (*few_kernels(), *moe_kernels(), *linear_kernels(), *fp8_kernels())
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OWNPATH_KERNEL_CACHE", folder)
        chosen = [config for config in configs if args.only in config.name]
        args.out.write_text(json.dumps(hashes(chosen, args.texts), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
