"""Specs for E4M3 weights in 128 x 128 blocks: dense products on Hopper, routed experts by the torch reference."""

from ownpath.formats import FP8_BLOCK
from ownpath.kernels.spec import Evidence, InputRounding, KernelSpec, behind_quantizer
from ownpath.official import Step
from ownpath.ops import OpKind

PREFILL_FROM = 129
"""Number of rows from which linears on Hopper quantise their activations: with fewer, W8A16 is faster, and exact."""

_EVIDENCE = Evidence("fp8.ref:fp8_linear", "tests/gpu/test_fp8_linear.py", "ownpath bench fp8")

_LINEARS = (
    KernelSpec(
        "cute.fp8_linear_sm90",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "blocks_64x128",
        f"W8A16 below {PREFILL_FROM} rows: exact decode, float32 sums, scale per 128 x 128; from there W8A8: "
        "activations to E4M3 with a scale per 1 x 128, FP8 tensor cores, float32 promotion per 128 of K",
        "fp8.linear:fp8_linear",
        min_sm=90,
        end_sm=100,
        dim_multiple=8,
        activations=("bfloat16",),
        launches=(r"w8a(16|8)_sm90",),
        rounding=InputRounding.E4M3,
        rounds_from=PREFILL_FROM,
        is_default=True,
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "cute.fp8_linear_w8a16_sm90_invariant",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "blocks_64x128",
        "W8A16 for any number of rows: exact decode, float32 sums, one order of sums for every number of tokens",
        "fp8.linear:fp8_linear_invariant",
        min_sm=90,
        end_sm=100,
        dim_multiple=8,
        activations=("bfloat16",),
        is_batch_invariant=True,
        launches=(r"w8a16_sm90",),
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "ref.fp8_linear",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "row_major",
        "W8A16: E4M3 x block scale decoded, float32 sums",
        "fp8.ref:FP8_LINEAR",
        is_default=True,
    ),
)
_MOE = KernelSpec(
    "ref.fp8_moe",
    OpKind.MOE,
    (FP8_BLOCK,),
    "Fp8MoE",
    "row_major",
    "W8A16 per expert: E4M3 x block scale decoded for the experts that are hit, float32 sums and combine",
    "fp8.ref:FP8_MOE",
    is_default=True,
)

SPECS = (*_LINEARS, _MOE, *(behind_quantizer(kernel, Step.FP8_INPUTS) for kernel in _LINEARS))
