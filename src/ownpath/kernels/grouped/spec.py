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
