"""Test and bench sizes: half of a gate_up row."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("swiglu", "tiny", (136,), (1, 5), tiny=True),
    KernelCase("swiglu", "flash shared", (2048,), (1, 64, 4096), bench=True),
    KernelCase("swiglu", "pro shared", (3072,), (1, 255)),
)
