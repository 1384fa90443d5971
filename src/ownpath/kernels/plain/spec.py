"""Weights stored unquantised: dense products by cuBLAS or a batch-invariant kernel, experts by the torch reference."""

from ownpath.formats import BF16, FP32
from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "torch.plain_linear",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: cuBLAS, float32 sums, kept in float32 where the model asks for it",
        "plain.cublas:PLAIN_LINEAR",
        min_sm=80,
        rounds_weight=True,
        evidence=Evidence("plain.ref:plain_linear", "tests/gpu/test_plain_linear.py", "python bench/small_ops.py"),
    ),
    KernelSpec(
        "triton.plain_linear_invariant",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: one tile and one order of sums for every number of tokens",
        "plain.invariant:PLAIN_LINEAR",
        min_sm=90,
        activations=("bfloat16", "float32"),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bplain_linear_kernel\b",),
        rounds_weight=True,
        evidence=Evidence("plain.ref:plain_linear", "tests/gpu/test_plain_linear.py", "python bench/small_ops.py"),
    ),
    KernelSpec(
        "ref.plain_linear",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: a matrix product in the activations' dtype",
        "plain.ref:PLAIN_LINEAR",
        rounds_weight=True,
        is_default=True,
    ),
    KernelSpec(
        "ref.plain_moe",
        OpKind.MOE,
        (BF16, FP32),
        "PlainMoE",
        "row_major",
        "stored unquantised: torch's products per expert, float32 sums and combine",
        "plain.ref:PLAIN_MOE",
        is_default=True,
    ),
)
