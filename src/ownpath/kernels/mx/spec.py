"""Specs for weights with an E8M0 scale per 1 x 32 (MXFP4, MXFP8), by the torch reference, from what is stored."""

from ownpath.formats import MXFP4, MXFP8, Format
from ownpath.kernels.spec import KernelSpec, behind_quantizer
from ownpath.official import Step
from ownpath.ops import OpKind

_NOT_FAST = {
    MXFP4: "exact for any scales; other kernels read MXFP4 as NVFP4, whose scales span 18 powers of two",
    MXFP8: "no faster kernel reads a scale per 1 x 32: those for E4M3 have one per 128 x 128",
}


def _linear(fmt: Format) -> KernelSpec:
    name = fmt.name.lower()
    why = f"decoded exactly, float32 sums; {_NOT_FAST[fmt]}"
    return KernelSpec(
        f"ref.{name}_linear", OpKind.LINEAR, (fmt,), "MxLinear", "row_major", why, f"mx.ref:{fmt.name}_LINEAR"
    )


def _moe(fmt: Format) -> KernelSpec:
    name = fmt.name.lower()
    why = f"each expert decoded exactly when it is hit, float32 sums and combine; {_NOT_FAST[fmt]}"
    return KernelSpec(f"ref.{name}_moe", OpKind.MOE, (fmt,), "MxMoE", "row_major", why, f"mx.ref:{fmt.name}_MOE")


SPECS = (
    _linear(MXFP4),
    _moe(MXFP4),
    _linear(MXFP8),
    _moe(MXFP8),
    *(behind_quantizer(_linear(fmt), Step.FP8_INPUTS) for fmt in (MXFP4, MXFP8)),
)
