"""Specs of what a step with chunks writes: before it attends, and to the rings."""

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


_RINGS_EVIDENCE = Evidence(
    "chunk_entries.ref:write_chunk_rings", "tests/gpu/test_chunk_rings.py", "ownpath bench chunk_rings"
)
_RINGS = (
    KernelSpec(
        "triton.chunk_rings",
        OpKind.CHUNK_RINGS,
        (),
        "ChunkRings",
        "row_major",
        "one launch: the last keys and raw rows of each request",
        "chunk_entries.rings:CHUNK_RINGS",
        min_sm=90,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bchunk_rings_kernel\b",),
        evidence=_RINGS_EVIDENCE,
    ),
    KernelSpec(
        "ref.chunk_rings",
        OpKind.CHUNK_RINGS,
        (),
        "ChunkRings",
        "row_major",
        "torch",
        "chunk_entries.ref:CHUNK_RINGS",
        is_batch_invariant=True,
        is_default=True,
    ),
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
    *_RINGS,
)
