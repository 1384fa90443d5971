"""Specs of what a step with chunks writes before it attends."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_WHY = "one launch: near keys from step and ring, and the entries whose windows end, as decode steps write them"
_EVIDENCE = Evidence(
    "chunk_entries.ref:write_chunk_entries", "tests/gpu/test_chunk_entries.py", "ownpath bench chunk_entries"
)


def _triton(official: frozenset[Step], rounding: str) -> KernelSpec:
    return KernelSpec(
        "triton.chunk_entries",
        OpKind.CHUNK_ENTRIES,
        (),
        "ChunkEntries",
        "row_major",
        f"{_WHY}; {rounding}",
        "chunk_entries.launch:CHUNK_ENTRIES",
        min_sm=90,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        official=official,
        launches=(r"\bchunk_entries_kernel\b",),
        evidence=_EVIDENCE,
    )


def _reference(official: frozenset[Step], rounding: str) -> KernelSpec:
    return KernelSpec(
        "ref.chunk_entries",
        OpKind.CHUNK_ENTRIES,
        (),
        "ChunkEntries",
        "row_major",
        f"torch; {rounding}",
        "chunk_entries.ref:CHUNK_ENTRIES",
        is_batch_invariant=True,
        is_default=not official,
        official=official,
    )


_ROUNDINGS = (
    (frozenset[Step](), "entries rounded by their caches alone"),
    (frozenset({Step.KV}), "main entries rounded to FP8"),
    (frozenset({Step.INDEXER}), "index entries rounded to FP4"),
    (frozenset({Step.KV, Step.INDEXER}), "main entries rounded to FP8, index entries to FP4"),
)
SPECS = (
    *(_triton(*rounding) for rounding in _ROUNDINGS),
    *(_reference(*rounding) for rounding in _ROUNDINGS),
)
