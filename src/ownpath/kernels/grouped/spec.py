"""``wo_a``: one matrix per group of heads, behind the inverse rotation of attention's output."""

from dataclasses import replace

from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8
from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_FAST = KernelSpec(
    "triton.grouped_linear",
    OpKind.GROUPED,
    (BF16,),
    "GroupedLinear",
    "row_major",
    "inverse rotation in registers on the way to the tensor cores, one launch",
    "grouped.launch:GROUPED_LINEAR",
    min_sm=90,
    dim_multiple=64,
    activations=("bfloat16",),
    packages=("triton",),
    launches=(r"\brope_grouped_kernel\b",),
    rounds_weight=True,
    evidence=Evidence("grouped.ref:rope_grouped_linear", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
)
_INVARIANT = replace(
    _FAST,
    name="triton.grouped_linear_invariant",
    why="as triton.grouped_linear, with one tile and one order of sums for every number of tokens",
    entry="grouped.launch:GROUPED_LINEAR_INVARIANT",
    is_batch_invariant=True,
)
_FP8 = KernelSpec(
    "cute.grouped_linear_fp8_sm90",
    OpKind.GROUPED,
    (FP8_BLOCK,),
    "Fp8GroupedLinear",
    "blocks_64x128",
    "W8A16 as stored: exact decode, float32 sums, scale per 128 x 128; inverse rotation in shared memory, one launch",
    "grouped.fp8_launch:GROUPED_FP8",
    min_sm=90,
    end_sm=100,
    dim_multiple=128,
    activations=("bfloat16",),
    launches=(r"groupedfp8_sm90",),
    evidence=Evidence(
        "grouped.ref:rope_grouped_linear_fp8", "tests/gpu/test_grouped_fp8.py", "python bench/small_ops.py"
    ),
)
_FP8_INVARIANT = replace(
    _FP8,
    name="cute.grouped_linear_fp8_sm90_invariant",
    why="as cute.grouped_linear_fp8_sm90, with one order of sums for every number of tokens",
    entry="grouped.fp8_launch:GROUPED_FP8_INVARIANT",
    is_batch_invariant=True,
)
_REFERENCE = KernelSpec(
    "ref.grouped_linear",
    OpKind.GROUPED,
    (BF16, FP32),
    "GroupedLinear",
    "row_major",
    "inverse rotation, then a batched matrix product over head groups, no scale anywhere",
    "grouped.ref:GROUPED_LINEAR",
    rounds_weight=True,
    is_default=True,
)


def _decoding_spec(kernel: KernelSpec, why: str) -> KernelSpec:
    """Returns the spec for a weight with block scales that is decoded when loaded."""
    return replace(kernel, formats=(FP8_BLOCK, MXFP8, MXFP4), layout="dequantized", why=why, is_default=False)


SPECS = (
    _FP8,
    _FP8_INVARIANT,
    _FAST,
    _decoding_spec(
        _FAST,
        "decoded to BF16 at load (exact for E8M0 scales); inverse rotation in registers, one launch",
    ),
    _INVARIANT,
    _decoding_spec(_INVARIANT, _INVARIANT.why),
    _REFERENCE,
    _decoding_spec(
        _REFERENCE,
        "decoded at load as DeepSeek's own conversion does: to BF16 (exact) for E8M0 scales, else FP32",
    ),
)
