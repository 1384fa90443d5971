"""NVFP4 weights with 16-bit activations (W4A16), dense and routed experts, for Hopper; MXFP4 weights too."""

from dataclasses import replace

from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.spec import Evidence, KernelSpec, behind_quantizer
from ownpath.official import Step
from ownpath.ops import OpKind

_LINEAR_EVIDENCE = Evidence("nvfp4.ref:nvfp4_linear", "tests/gpu/test_nvfp4_linear.py", "ownpath bench linear")
_MOE_EVIDENCE = Evidence("nvfp4.ref:nvfp4_moe", "tests/gpu/test_nvfp4_moe.py", "ownpath bench moe")

_LINEAR = KernelSpec(
    "cute.nvfp4_linear",
    OpKind.LINEAR,
    (NVFP4,),
    "Nvfp4Linear",
    "packed_64x128",
    "W4A16 on wgmma: codes decoded exactly in registers, float32 sums, global scale per row; tiles from a table",
    "nvfp4.linear:nvfp4_linear",
    min_sm=90,
    end_sm=100,
    dim_multiple=128,
    activations=("bfloat16",),
    launches=(r"gemm_sm90",),
    is_default=True,
    evidence=_LINEAR_EVIDENCE,
)
_MOE = KernelSpec(
    "cute.nvfp4_moe",
    OpKind.MOE,
    (NVFP4,),
    "Nvfp4MoE",
    "packed_64x128",
    "W4A16 on tensor cores: align, gate_up and SwiGLU, down, combine; few rows: both in one launch, then a sum",
    "nvfp4.moe:nvfp4_moe",
    min_sm=90,
    end_sm=100,
    dim_multiple=128,
    activations=("bfloat16",),
    launches=(r"gemm_sm90|sliced_sm90", r"moe_sm90|sliced_sum_sm90"),
    is_default=True,
    evidence=_MOE_EVIDENCE,
)
_LINEARS = (
    _LINEAR,
    replace(
        _LINEAR,
        name="cute.nvfp4_linear_invariant",
        why="as cute.nvfp4_linear, with K never split: one order of sums for every number of tokens",
        entry="nvfp4.linear:nvfp4_linear_invariant",
        is_batch_invariant=True,
        is_default=False,
    ),
    KernelSpec(
        "ref.nvfp4_linear",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4Linear",
        "row_major",
        "W4A16: E2M1 x E4M3 decoded exactly, float32 sums, global scale per shard after the product",
        "nvfp4.ref:NVFP4_LINEAR",
        is_default=True,
    ),
)
_MOES = (
    _MOE,
    replace(
        _MOE,
        name="cute.nvfp4_moe_invariant",
        why="as cute.nvfp4_moe, with experts' outputs summed in float32 for every number of tokens",
        entry="nvfp4.moe:nvfp4_moe_invariant",
        is_batch_invariant=True,
        is_default=False,
    ),
    KernelSpec(
        "ref.nvfp4_moe",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoE",
        "row_major",
        "W4A16 per expert: exact decode, gate and up keep their own global scales, float32 combine",
        "nvfp4.ref:NVFP4_MOE",
        is_default=True,
    ),
)


def _for_mxfp4(kernel: KernelSpec) -> KernelSpec:
    """Returns the spec for MXFP4 weights: codes are the same, block scales are converted to E4M3 when loaded."""
    layout = "nvfp4_scales" if kernel.layout == "row_major" else kernel.layout
    why = f"MXFP4 on disk, its scales written as NVFP4's at load (exact, or an error); then {kernel.why}"
    return replace(kernel, formats=(MXFP4,), layout=layout, why=why, is_default=False, converts_scales=True)


SPECS = (
    *_LINEARS,
    *_MOES,
    *map(_for_mxfp4, (*_LINEARS, *_MOES)),
    *(behind_quantizer(kernel, Step.NVFP4_INPUTS) for kernel in _LINEARS),
)
