"""Test and bench sizes: groups, heads per group, head dim, rotary channels, rows."""

from dataclasses import dataclass, replace

from ownpath.kernels.cases import KernelCase

_CASES = (
    KernelCase("grouped_linear", "tiny", (2, 2, 512, 64, 128), (1, 5, 17), tiny=True),
    KernelCase("grouped_linear", "no angles", (2, 2, 512, 0, 128), (1, 33), tiny=True),
    KernelCase("grouped_linear", "short heads", (3, 4, 64, 32, 64), (1, 33), tiny=True),
    KernelCase(
        "grouped_linear", "tiny", (2, 2, 512, 64, 128), (1, 17), tiny=True, kernel="triton.grouped_linear_invariant"
    ),
    KernelCase(
        "grouped_linear", "flash", (8, 8, 512, 64, 1024), (1, 33, 255), kernel="triton.grouped_linear_invariant"
    ),
    KernelCase(
        "grouped_linear",
        "flash",
        (8, 8, 512, 64, 1024),
        (1, 8, 16, 17, 32, 33, 64, 127, 128, 255, 1024, 4096),
        bench=True,
    ),
)

CASES = (*_CASES, *(replace(case, tokens=case.tokens[:3], kernel="triton.grouped_linear_invariant") for case in _CASES))


@dataclass(frozen=True)
class GroupedFp8Case:
    """Sizes as above, the kind of scales as ``Fp8Case``, and numbers of rows. bench: timed, too."""

    label: str
    sizes: tuple[int, int, int, int, int]
    scales: str
    tokens: tuple[int, ...]
    bench: bool = False


FP8_CASES = (
    GroupedFp8Case("tiny", (2, 2, 512, 64, 128), "e8m0", (1, 5, 17, 64)),
    GroupedFp8Case("short heads", (3, 4, 128, 32, 256), "float32", (1, 8, 33, 128, 129)),
    GroupedFp8Case("wide scales", (2, 2, 256, 64, 128), "e8m0-wide", (1, 16, 65)),
    GroupedFp8Case("flash, float32 scales", (8, 8, 512, 64, 1024), "float32", (1, 17, 64, 130)),
    GroupedFp8Case(
        "flash", (8, 8, 512, 64, 1024), "e8m0", (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 255, 511, 1024), bench=True
    ),
    GroupedFp8Case("flash, half", (4, 8, 512, 64, 1024), "e8m0", (1, 8, 16, 17, 33, 64, 65), bench=True),
    GroupedFp8Case("flash, no angles", (8, 8, 512, 0, 1024), "e8m0", (1, 8, 17, 64, 128), bench=True),
    GroupedFp8Case("pro", (16, 8, 512, 64, 1024), "e8m0", (1, 8, 32, 128), bench=True),
)
