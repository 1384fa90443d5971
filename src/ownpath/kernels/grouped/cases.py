"""Test and bench sizes: groups, heads per group, head dim, rotary channels, rows."""

from dataclasses import replace

from ownpath.kernels.cases import KernelCase

_CASES = (
    KernelCase("grouped_linear", "tiny", (2, 2, 512, 64, 128), (1, 5, 17), tiny=True),
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
