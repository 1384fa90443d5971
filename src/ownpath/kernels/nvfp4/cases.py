"""Test and bench sizes. Linears: rows and columns of the weight. Experts: number, top k, hidden size, expert width."""

from ownpath.kernels.cases import KernelCase

NUM_TOKENS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127, 128, 129, 255, 1024, 4096, 6144, 8192)
_LINEARS = ((1536, 4096), (4096, 2048), (640, 256), (192, 384), (64, 128))
_EXPERTS = ((16, 4, 1024, 512), (8, 2, 256, 256), (3, 2, 128, 384), (64, 6, 512, 128))

CASES = (
    *(KernelCase("nvfp4_linear", "x".join(map(str, sizes)), sizes, NUM_TOKENS) for sizes in _LINEARS),
    *(KernelCase("nvfp4_moe", "x".join(map(str, sizes)), sizes, NUM_TOKENS) for sizes in _EXPERTS),
)
