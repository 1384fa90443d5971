"""RMS norm over the last dimension."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.rms_norm",
        OpKind.NORM,
        (),
        "RMSNorm",
        "row_major",
        "a row stays in registers between its sum of squares and its scaling",
        "norms.launch:RMS_NORM",
        min_sm=90,
        dim_multiple=8,
        activations=("bfloat16", "float32"),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\brms_norm_kernel\b",),
        evidence=Evidence("norms.ref:rms_norm", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
    ),
    KernelSpec(
        "ref.rms_norm",
        OpKind.NORM,
        (),
        "RMSNorm",
        "row_major",
        "torch, at least float32 inside",
        "norms.ref:RMS_NORM",
        is_default=True,
    ),
    KernelSpec(
        "ref.rms_norm_stepwise",
        OpKind.NORM,
        (),
        "RMSNorm",
        "row_major",
        "torch on the activations' dtype, every operation rounded",
        "norms.ref:RMS_NORM_STEPWISE",
        official=frozenset({Step.Q_HEAD_NORM}),
        is_batch_invariant=True,
    ),
)
