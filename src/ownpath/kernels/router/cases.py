"""Test and bench sizes: experts, experts per token, and 1 where they are looked up by token."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("router", "tiny", (8, 2, 0), (1, 5), tiny=True),
    KernelCase("router", "flash", (256, 6, 0), (1, 7, 64, 1024, 4096), tiny=False, bench=True),
    KernelCase("router", "flash", (256, 6, 0), (1, 3), tiny=True),
    KernelCase("router", "pro", (384, 6, 0), (1, 3), tiny=True),
    KernelCase("router", "pro", (384, 6, 0), (64, 1024), bench=True),
    KernelCase("router", "by token", (256, 6, 1), (1, 5), tiny=True),
    KernelCase("router", "by token", (256, 6, 1), (64, 1024), bench=True),
)
