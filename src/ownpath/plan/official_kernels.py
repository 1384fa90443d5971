"""Contracts of official numerics: the catalogue's linears behind a quantiser, and references of the other steps."""

from collections.abc import Iterator
from dataclasses import replace

from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, NVFP4
from ownpath.official import Step
from ownpath.plan.kernel_spec import KernelSpec
from ownpath.plan.opspec import OpKind

_QUANTIZED = {
    "Fp8Linear": ("QuantizedFp8Linear", Step.FP8_INPUTS, "input in E4M3 with a power-of-two scale per 1 x 128"),
    "Nvfp4Linear": ("QuantizedNvfp4Linear", Step.NVFP4_INPUTS, "input in NVFP4 with the file's input_scale"),
}
"""Runner of an exact product -> the one that quantises its input first."""

_MOE_KERNELS = (
    ("ref.moe_quantized_inputs", True, False, "quantised inputs of both products"),
    ("ref.moe_weight_first", False, True, "routing weight before w2, products rounded"),
    ("ref.moe_official", True, True, "quantised inputs of both products, routing weight before w2, products rounded"),
)
"""(kernel, whether inputs are quantised, whether the weight comes first, what it does)."""


def official_kernels(kernels: tuple[KernelSpec, ...]) -> tuple[KernelSpec, ...]:
    """What the catalogue offers for official steps, best first. kernels: those of plain numerics."""
    quantized = (_behind_a_quantizer(kernel) for kernel in kernels if kernel.runner in _QUANTIZED)
    return (*quantized, *_moe_kernels(), *_COMPANIONS)


def _behind_a_quantizer(kernel: KernelSpec) -> KernelSpec:
    runner, step, what = _QUANTIZED[kernel.runner]
    why = f"{what}, read back exactly; then {kernel.why}"
    return replace(kernel, runner=runner, official=frozenset({step}), why=why)


def _moe_kernels() -> Iterator[KernelSpec]:
    stored = (((NVFP4,), Step.NVFP4_INPUTS), ((MXFP4, FP8_BLOCK), Step.FP8_INPUTS), ((BF16, FP32), None))
    for name, has_inputs, is_weight_first, what in _MOE_KERNELS:
        for formats, inputs in stored:
            if has_inputs and inputs is None:
                continue
            steps = {inputs} if has_inputs and inputs is not None else set()
            steps |= {Step.ROUTING_WEIGHT} if is_weight_first else set()
            why = f"torch, each expert decoded when it is hit: {what}"
            yield KernelSpec(name, OpKind.MOE, formats, "OfficialMoE", "row_major", why, official=frozenset(steps))


_COMPANIONS = (
    KernelSpec(
        "ref.rms_norm_stepwise",
        OpKind.NORM,
        (),
        "RMSNorm",
        "row_major",
        "torch on the activations' dtype, every operation rounded",
        official=frozenset({Step.Q_HEAD_NORM}),
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.fp8_keys",
        OpKind.KEY_QUANTIZER,
        (),
        "KeyQuantizer",
        "row_major",
        "torch: E4M3 and back, a power-of-two scale per 64 channels, rotary channels as they are",
        official=frozenset({Step.KV}),
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.fp4_index",
        OpKind.INDEX_QUANTIZER,
        (),
        "IndexQuantizer",
        "row_major",
        "torch: Hadamard rotation, E2M1 and back, a power-of-two scale per 32 channels",
        dim_power_of_two=True,
        official=frozenset({Step.INDEXER}),
        is_batch_invariant=True,
    ),
)
