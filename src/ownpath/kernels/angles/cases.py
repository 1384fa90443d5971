"""Test and bench sizes: rotary pairs."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("step_angles", "published", (32,), (1, 8, 32, 128), bench=True),
    KernelCase("step_angles", "narrow", (24,), (5,), tiny=True),
)
