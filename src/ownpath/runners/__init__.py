"""Runners: an operand in its planned layout and its kernel, behind one call."""

from ownpath.runners.companions import (
    HyperBoundary,
    HyperOut,
    HyperWeights,
    IndexQuantizer,
    KeyQuantizer,
    Mix,
    RMSNorm,
    Route,
    Router,
    RouterWeights,
    RouteWeights,
    SharedKeyAttention,
    SwiGLU,
)
from ownpath.runners.decode import CacheEntries, DecodeAttention, IndexScores, RotaryAngles, Select
from ownpath.runners.grouped import Fp8GroupedLinear, GroupedLinear, GroupedRunner
from ownpath.runners.linear import (
    ConcatLinear,
    Fp8Linear,
    Linear,
    Nvfp4Linear,
    Nvfp4LinearW4A4,
    PlainLinear,
    QuantizedLinear,
    WideLinear,
)
from ownpath.runners.mlp import SwigluMlp
from ownpath.runners.moe import Fp8MoE, Nvfp4MoE, Nvfp4MoEW4A4, PlainMoE
from ownpath.runners.runner import KernelRunner, Runner

__all__ = [
    "CacheEntries",
    "ConcatLinear",
    "DecodeAttention",
    "Fp8GroupedLinear",
    "Fp8Linear",
    "Fp8MoE",
    "GroupedLinear",
    "GroupedRunner",
    "HyperBoundary",
    "HyperOut",
    "HyperWeights",
    "IndexQuantizer",
    "IndexScores",
    "KernelRunner",
    "KeyQuantizer",
    "Linear",
    "Mix",
    "Nvfp4Linear",
    "Nvfp4LinearW4A4",
    "Nvfp4MoE",
    "Nvfp4MoEW4A4",
    "PlainLinear",
    "PlainMoE",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryAngles",
    "Route",
    "RouteWeights",
    "Router",
    "RouterWeights",
    "Runner",
    "Select",
    "SharedKeyAttention",
    "SwiGLU",
    "SwigluMlp",
    "WideLinear",
]
