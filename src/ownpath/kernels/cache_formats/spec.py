"""Roundings of keys and index vectors to the formats of the published caches, by the torch reference."""

from ownpath.kernels.spec import KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "ref.fp8_keys",
        OpKind.KEY_QUANTIZER,
        (),
        "KeyQuantizer",
        "row_major",
        "torch: E4M3 and back, a power-of-two scale per 64 channels, rotary channels as they are",
        "cache_formats.ref:FP8_KEYS",
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
        "cache_formats.ref:FP4_INDEX",
        dim_power_of_two=True,
        official=frozenset({Step.INDEXER}),
        is_batch_invariant=True,
    ),
)
