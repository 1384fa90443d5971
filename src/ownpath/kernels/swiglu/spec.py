"""The clamped activation between two products."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.swiglu",
        OpKind.SWIGLU,
        (),
        "SwiGLU",
        "row_major",
        "one launch, float32 inside",
        "swiglu.launch:SWIGLU",
        min_sm=90,
        dim_multiple=8,
        activations=("bfloat16", "float32"),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bswiglu_kernel\b",),
        evidence=Evidence("swiglu.ref:swiglu", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
    ),
    KernelSpec(
        "ref.swiglu",
        OpKind.SWIGLU,
        (),
        "SwiGLU",
        "row_major",
        "torch, at least float32 inside",
        "swiglu.ref:SWIGLU",
        is_default=True,
    ),
)
