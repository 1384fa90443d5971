"""Sizes: half of a gate_up row."""

from ownpath.kernels.cases import Case

CASES = (
    Case("swiglu", "tiny", (136,), (1, 5), tiny=True),
    Case("swiglu", "flash shared", (2048,), (1, 64, 4096), bench=True),
    Case("swiglu", "pro shared", (3072,), (1, 255)),
)
