"""Routed experts on Hopper's FP8 tensor cores: 4-bit weights with power-of-two scales, E4M3 activations.

Chosen only where quantised inputs are demanded (``official.Step``: FP8_INPUTS, for NVFP4 FP8_EXPERTS): the published
code rounds them so.
"""

from dataclasses import replace

from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.spec import Evidence, InputRounding, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_MXFP4 = KernelSpec(
    "cute.fp8_experts",
    OpKind.MOE,
    (MXFP4,),
    "Fp8InputsMoE",
    "packed_e4m3_64x128",
    "W4A8 on FP8 tensor cores: codes exact in E4M3, both products' inputs in E4M3, a power-of-two scale per 1 x 128",
    "fp8_experts.moe:fp8_experts",
    min_sm=90,
    end_sm=100,
    dim_multiple=256,
    activations=("bfloat16",),
    official=frozenset({Step.FP8_INPUTS}),
    launches=(r"fp8_expertsgemm_sm90", r"moe_sm90"),
    rounding=InputRounding.E4M3_POWER_OF_TWO,
    evidence=Evidence(
        "official_experts.ref:moe_quantized_inputs", "tests/gpu/test_fp8_experts_gpu.py", "ownpath bench moe"
    ),
)
_NVFP4 = replace(
    _MXFP4,
    formats=(NVFP4,),
    why=f"for NVFP4 that was made from MXFP4: {_MXFP4.why}; refused at load where a block scale is no power of two",
    official=frozenset({Step.FP8_EXPERTS}),
)


def _invariant(kernel: KernelSpec) -> KernelSpec:
    return replace(
        kernel,
        name="cute.fp8_experts_invariant",
        why=f"as cute.fp8_experts, with experts' outputs summed in float32 for every number of tokens: {kernel.why}",
        entry="fp8_experts.moe:fp8_experts_invariant",
        is_batch_invariant=True,
    )


SPECS = (_MXFP4, _NVFP4, _invariant(_MXFP4), _invariant(_NVFP4))
