"""Test sizes of the experts' FP8 kernels: number of experts, top k, hidden size, expert width."""

from ownpath.kernels.cases import KernelCase

NUM_TOKENS = (1, 7, 33, 150, 300, 1100)
CASES = tuple(
    KernelCase("fp8_experts", "x".join(map(str, sizes)), sizes, NUM_TOKENS)
    for sizes in ((16, 4, 1024, 512), (8, 2, 256, 512))
)
