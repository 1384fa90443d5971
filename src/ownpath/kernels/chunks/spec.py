"""Attention of chunks of prompts: head norm, rotation, softmax with sink, rotation back."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_EVIDENCE = Evidence("chunks.ref:attend_chunk", "tests/gpu/test_attend_chunk.py", "ownpath bench attend_chunk")
_PLAIN, _STEPWISE = frozenset[Step](), frozenset({Step.Q_HEAD_NORM})
_STEPWISE_WHY = "; queries normed with every operation rounded"


def _triton(name: str, entry: str, why: str, official: frozenset[Step]) -> KernelSpec:
    return KernelSpec(
        name,
        OpKind.ATTEND_CHUNK,
        (),
        "ChunkAttention",
        "paged",
        why + (_STEPWISE_WHY if official else ""),
        entry,
        min_sm=90,
        end_sm=100,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        official=official,
        launches=(r"\battend_chunk_((hopper|window)_)?kernel\b",),
        evidence=_EVIDENCE,
    )


def _reference(official: frozenset[Step]) -> KernelSpec:
    return KernelSpec(
        "ref.attend_chunk",
        OpKind.ATTEND_CHUNK,
        (),
        "ChunkAttention",
        "paged",
        "torch, 64 rows at a time" + (_STEPWISE_WHY if official else ""),
        "chunks.ref:ATTEND_CHUNK",
        official=official,
        is_default=not official,
    )


_ROWS = "a row and 64 of its heads at a time, keys straight from the cache, queries normed and rotated on the way in"
SPECS = (
    *(
        _triton(
            "gluon.attend_chunk",
            "chunks.launch:ATTEND_CHUNK_HOPPER",
            f"{_ROWS}; some warps bring keys, others multiply",
            o,
        )
        for o in (_PLAIN, _STEPWISE)
    ),
    *(_triton("triton.attend_chunk", "chunks.launch:ATTEND_CHUNK", _ROWS, o) for o in (_PLAIN, _STEPWISE)),
    *map(_reference, (_PLAIN, _STEPWISE)),
)
