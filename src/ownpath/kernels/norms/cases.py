"""Test and bench sizes: width, heads (0: rows only), width of the tensor that rows or all heads are sliced from."""

from ownpath.kernels.cases import KernelCase

CASES = (
    KernelCase("rms_norm", "hidden", (4096, 0, 4096), (1, 64, 4096), bench=True),
    KernelCase("rms_norm", "slice of wqa_wkv", (1024, 0, 1536), (1, 3), tiny=True),
    KernelCase("rms_norm", "slice of wqa_wkv", (1024, 0, 1536), (64, 255, 4096), bench=True),
    KernelCase("rms_norm", "heads, no weight", (512, 4, 512), (1, 33), tiny=True),
    KernelCase("rms_norm", "heads, no weight", (512, 64, 512), (1, 64, 1024), bench=True),
    KernelCase("rms_norm", "heads in queries", (512, 4, 2560), (1, 3), tiny=True),
    KernelCase("rms_norm", "heads in queries", (512, 64, 40960), (1, 64, 1024)),
    KernelCase("rms_norm", "pro hidden", (7168, 0, 7168), (1, 64)),
    KernelCase("rms_norm", "odd", (264, 0, 264), (1, 9), tiny=True),
)
