"""Test and bench sizes: experts, experts per token, 1 where they are looked up by token; columns of ``route``."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("router", "tiny", (8, 2, 0), (1, 5), tiny=True),
    KernelCase("router", "flash", (256, 6, 0), (1, 7, 64, 1024, 4096), tiny=False, bench=True),
    KernelCase("router", "flash", (256, 6, 0), (1, 3), tiny=True),
    KernelCase("router", "pro", (384, 6, 0), (1, 3), tiny=True),
    KernelCase("router", "pro", (384, 6, 0), (64, 1024), bench=True),
    KernelCase("router", "by token", (256, 6, 1), (1, 5), tiny=True),
    KernelCase("router", "by token", (256, 6, 1), (64, 1024), bench=True),
    KernelCase("route", "tiny", (8, 2, 0, 256), (1, 5), tiny=True),
    KernelCase("route", "tiny by token", (8, 2, 1, 256), (1, 5), tiny=True),
    KernelCase("route", "least", (8, 2, 0, 8), (1, 4, 7), tiny=True),
    KernelCase("route", "odd", (20, 3, 0, 200), (2, 19), tiny=True),
    KernelCase("route", "odd by token", (20, 3, 1, 200), (2, 19), tiny=True),
    KernelCase("route", "flash", (256, 6, 0, 4096), (1, 2, 4, 5, 8, 17, 32, 64), bench=True),
    KernelCase("route", "flash by token", (256, 6, 1, 4096), (1, 8, 33), bench=True),
    KernelCase("route", "pro", (384, 6, 0, 7168), (1, 8, 32, 64), bench=True),
)
