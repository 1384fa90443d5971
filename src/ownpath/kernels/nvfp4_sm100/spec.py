"""NVFP4 weights and activations (W4A4) for Blackwell, dense and routed experts. Compiled and interpreted, never run."""

from dataclasses import replace

from ownpath.formats import NVFP4
from ownpath.kernels.spec import Evidence, InputRounding, KernelSpec
from ownpath.ops import OpKind

_NOT_RUN = "compiled and interpreted, never run on a device: compared with its torch twin when it is loaded"
_PRODUCT = (r"\bquantize_kernel\b", r"\bgemm_w4a4_kernel\b")
_TEST = "tests/gpu/test_w4a4_sm100.py"

_LINEAR = KernelSpec(
    "triton.nvfp4_linear_w4a4_sm100",
    OpKind.LINEAR,
    (NVFP4,),
    "Nvfp4LinearW4A4",
    "scales_128x4",
    f"W4A4: activations quantised with the checkpoint's input_scale, block-scaled tensor cores; {_NOT_RUN}",
    "nvfp4_sm100.linear:nvfp4_linear_w4a4",
    min_sm=100,
    end_sm=104,
    dim_multiple=64,
    activations=("bfloat16",),
    packages=("triton",),
    launches=_PRODUCT,
    rounding=InputRounding.NVFP4,
    evidence=Evidence("nvfp4_sm100.ref:nvfp4_linear_w4a4", _TEST, "ownpath bench linear"),
)
_MOE = KernelSpec(
    "triton.nvfp4_moe_w4a4_sm100",
    OpKind.MOE,
    (NVFP4,),
    "Nvfp4MoEW4A4",
    "scales_128x4",
    f"W4A4 per expert, SwiGLU and its quantisation inside the first product; {_NOT_RUN}",
    "nvfp4_sm100.moe:nvfp4_moe_w4a4",
    min_sm=100,
    end_sm=104,
    dim_multiple=128,
    activations=("bfloat16",),
    packages=("triton",),
    launches=(*_PRODUCT, r"\bgate_up_w4a4_kernel\b", r"\bcombine_kernel\b"),
    rounding=InputRounding.NVFP4,
    evidence=Evidence("nvfp4_sm100.ref:nvfp4_moe_w4a4", _TEST, "ownpath bench moe"),
)

SPECS = (
    _LINEAR,
    replace(
        _LINEAR,
        name="triton.nvfp4_linear_w4a4_sm100_invariant",
        why=f"as triton.nvfp4_linear_w4a4_sm100, with one width of tiles; {_NOT_RUN}",
        entry="nvfp4_sm100.linear:nvfp4_linear_w4a4_invariant",
        is_batch_invariant=True,
    ),
    _MOE,
    replace(
        _MOE,
        name="triton.nvfp4_moe_w4a4_sm100_invariant",
        why=f"as triton.nvfp4_moe_w4a4_sm100, with one width of tiles; {_NOT_RUN}",
        entry="nvfp4_sm100.moe:nvfp4_moe_w4a4_invariant",
        is_batch_invariant=True,
    ),
)
