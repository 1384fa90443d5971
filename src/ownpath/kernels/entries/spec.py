"""Specs of the cache writes of a decode step."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_WHY = "one launch: norm, rotation and write of the key, raw rows to the rings, entries whose windows end"
_EVIDENCE = Evidence("entries.ref:write_entries", "tests/gpu/test_entries.py", "ownpath bench entries")


def _triton(official: frozenset[Step], rounding: str) -> KernelSpec:
    return KernelSpec(
        "triton.entries",
        OpKind.ENTRIES,
        (),
        "CacheEntries",
        "row_major",
        f"{_WHY}; {rounding}",
        "entries.launch:ENTRIES",
        min_sm=90,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        official=official,
        launches=(r"\bentries_kernel\b",),
        evidence=_EVIDENCE,
    )


def _reference(official: frozenset[Step], rounding: str) -> KernelSpec:
    return KernelSpec(
        "ref.entries",
        OpKind.ENTRIES,
        (),
        "CacheEntries",
        "row_major",
        f"torch, as the attention reference writes them; {rounding}",
        "entries.ref:ENTRIES",
        is_batch_invariant=True,
        is_default=not official,
        official=official,
    )


_ROUNDINGS = (
    (frozenset[Step](), "keys rounded by their caches alone"),
    (frozenset({Step.KV}), "keys rounded to FP8"),
    (frozenset({Step.INDEXER}), "index keys rounded to FP4"),
    (frozenset({Step.KV, Step.INDEXER}), "keys rounded to FP8, index keys to FP4"),
)
SPECS = (
    *(_triton(*rounding) for rounding in _ROUNDINGS),
    *(_reference(*rounding) for rounding in _ROUNDINGS),
)
