"""Test and bench sizes: hidden, mixing logits (24, or 4 after the last sublayer), parts of the incoming output."""

from ownpath.kernels.cases import KernelCase

FEW, MANY = (1, 2, 3, 4, 5, 7, 16), (17, 33, 64, 129, 255, 1024)
CASES = (
    KernelCase("hyper_boundary", "tiny", (256, 24, 1), (1, 3, 5, 17), tiny=True),
    KernelCase("hyper_boundary", "odd", (392, 24, 1), (2, 6), tiny=True),
    KernelCase("hyper_boundary", "first", (256, 24, 0), (1, 6), tiny=True),
    KernelCase("hyper_boundary", "two parts", (256, 24, 2), (1, 3, 17), tiny=True),
    KernelCase("hyper_boundary", "two parts", (256, 24, 2), (3,), tiny=True, kernel="triton.hyper_boundary_invariant"),
    KernelCase("hyper_boundary", "last", (256, 4, 1), (1, 6), tiny=True),
    KernelCase("hyper_boundary", "tiny", (256, 24, 1), (1, 17), tiny=True, kernel="triton.hyper_boundary_invariant"),
    KernelCase("hyper_boundary", "flash", (4096, 24, 1), (*FEW, *MANY, 4096), bench=True),
    KernelCase(
        "hyper_boundary", "flash", (4096, 24, 1), (1, 64, 255), bench=True, kernel="triton.hyper_boundary_invariant"
    ),
    KernelCase("hyper_boundary", "flash two parts", (4096, 24, 2), (1, 8, 33, 300, 1087), bench=True),
    KernelCase("hyper_boundary", "flash two parts", (4096, 24, 2), (5,), kernel="triton.hyper_boundary_invariant"),
    KernelCase("hyper_boundary", "flash last", (4096, 4, 1), (1, 64, 1055)),
    KernelCase("hyper_boundary", "flash first", (4096, 24, 0), (1, 64, 1055)),
    KernelCase("hyper_boundary", "uneven", (4104, 24, 2), (1055,)),
    KernelCase("hyper_boundary", "pro", (7168, 24, 1), (*FEW, *MANY), bench=True),
)
