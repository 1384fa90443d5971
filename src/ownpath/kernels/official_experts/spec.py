"""Specs of routed experts that round as DeepSeek's published inference code does, by the torch reference."""

from collections.abc import Iterator

from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4, Format
from ownpath.kernels.spec import InputRounding, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_KERNELS = (
    ("ref.moe_quantized_inputs", "MOE_QUANTIZED_INPUTS", True, False, "quantised inputs of both products"),
    ("ref.moe_weight_first", "MOE_WEIGHT_FIRST", False, True, "routing weight before w2, products rounded"),
    (
        "ref.moe_official",
        "MOE_OFFICIAL",
        True,
        True,
        "quantised inputs of both products, routing weight before w2, products rounded",
    ),
)
"""(name, attribute of ``ref``, whether inputs are quantised, whether the weight comes first, what it does)."""
_FP8_EXPERTS = (
    ("ref.moe_fp8_inputs", "MOE_FP8_INPUTS", False, "both products' inputs in E4M3"),
    (
        "ref.moe_fp8_official",
        "MOE_FP8_OFFICIAL",
        True,
        "both products' inputs in E4M3, routing weight before w2, products rounded",
    ),
)
"""(name, attribute of ``ref``, whether the weight comes first, what it does)."""


def _specs() -> Iterator[KernelSpec]:
    stored = (((NVFP4,), Step.NVFP4_INPUTS), ((MXFP4, FP8_BLOCK, MXFP8), Step.FP8_INPUTS), ((BF16, FP32), None))
    for name, attribute, has_inputs, is_weight_first, what in _KERNELS:
        for formats, inputs in stored:
            if has_inputs and inputs is None:
                continue
            steps = {inputs} if has_inputs and inputs is not None else set()
            steps |= {Step.ROUTING_WEIGHT} if is_weight_first else set()
            rounding = InputRounding.EXACT
            if has_inputs:
                rounding = InputRounding.NVFP4 if inputs is Step.NVFP4_INPUTS else InputRounding.E4M3_POWER_OF_TWO
            yield _spec(name, attribute, formats, what, (frozenset(steps), rounding))
    # NVFP4 whose inputs are rounded as those of the MXFP4 that it was made from.
    for name, attribute, is_weight_first, what in _FP8_EXPERTS:
        steps = {Step.FP8_EXPERTS} | ({Step.ROUTING_WEIGHT} if is_weight_first else set())
        yield _spec(name, attribute, (NVFP4,), what, (frozenset(steps), InputRounding.E4M3_POWER_OF_TWO))


def _spec(
    name: str, attribute: str, formats: tuple[Format, ...], what: str, how: tuple[frozenset[Step], InputRounding]
) -> KernelSpec:
    return KernelSpec(
        name,
        OpKind.MOE,
        formats,
        "OfficialMoE",
        "row_major",
        f"torch, each expert decoded when it is hit: {what}",
        f"official_experts.ref:{attribute}",
        official=how[0],
        rounding=how[1],
    )


SPECS = tuple(_specs())
