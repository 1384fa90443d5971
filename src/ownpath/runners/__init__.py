"""Runners: an operand in its planned layout with the kernel that uses it, behind one call."""

from ownpath.runners.companions import HyperBoundary, HyperWeights, Mix, RMSNorm, Router, SharedKeyAttention, SwiGLU
from ownpath.runners.fp8 import Fp8Linear
from ownpath.runners.linear import (
    ConcatLinear,
    GroupedLinear,
    Linear,
    Nvfp4Linear,
    PlainLinear,
    WideLinear,
)
from ownpath.runners.mlp import SwigluMlp
from ownpath.runners.moe import Fp8MoE, Nvfp4MoE, PlainMoE
from ownpath.runners.official import IndexQuantizer, KeyQuantizer

__all__ = [
    "ConcatLinear",
    "Fp8Linear",
    "Fp8MoE",
    "GroupedLinear",
    "HyperBoundary",
    "HyperWeights",
    "IndexQuantizer",
    "KeyQuantizer",
    "Linear",
    "Mix",
    "Nvfp4Linear",
    "Nvfp4MoE",
    "PlainLinear",
    "PlainMoE",
    "RMSNorm",
    "Router",
    "SharedKeyAttention",
    "SwiGLU",
    "SwigluMlp",
    "WideLinear",
]
