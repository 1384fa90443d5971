"""Test and bench sizes: head dim, rotary pairs, ratio, head dim of index entries (0: none), blocks of a row's table."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("entries", "swa", (512, 32, 0, 0, 4), (1, 8, 32, 128), bench=True),
    KernelCase("entries", "csa", (512, 32, 4, 128, 4), (1, 8, 32, 128), bench=True),
    KernelCase("entries", "hca", (512, 32, 128, 0, 4), (1, 8, 32, 128), bench=True),
    KernelCase("entries", "swa narrow", (64, 8, 0, 0, 3), (5,), tiny=True),
    KernelCase("entries", "csa narrow", (128, 32, 4, 64, 3), (9,), tiny=True),
    KernelCase("entries", "hca narrow", (128, 32, 128, 0, 3), (5,), tiny=True),
    KernelCase("entries", "csa", (512, 32, 4, 128, 3), (5,), tiny=True),
    KernelCase("entries", "hca", (512, 32, 128, 0, 3), (2,), tiny=True),
)
