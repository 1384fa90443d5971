"""Attention of decode rows over the paged caches: head norm, rotation, softmax with sink, rotation back."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

_EVIDENCE = Evidence("attend.ref:attend", "tests/gpu/test_attend.py", "ownpath bench attend")
_CUTE_EVIDENCE = Evidence("attend.ref:attend", "tests/gpu/test_attend_sm90.py", "ownpath bench attend")

_PLAIN, _STEPWISE = frozenset[Step](), frozenset({Step.Q_HEAD_NORM})


def _triton(name: str, entry: str, why: str, official: frozenset[Step], *, is_batch_invariant: bool) -> KernelSpec:
    return KernelSpec(
        name,
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        f"{why}; queries normed with every operation rounded" if official else why,
        entry,
        min_sm=90,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=is_batch_invariant,
        packages=("triton",),
        official=official,
        launches=(r"\battend_kernel\b",),
        evidence=_EVIDENCE,
    )


def _reference(official: frozenset[Step]) -> KernelSpec:
    return KernelSpec(
        "ref.attend",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "torch, all rows at once; queries normed with every operation rounded"
        if official
        else "torch, all rows at once",
        "attend.ref:ATTEND",
        official=official,
        is_default=not official,
    )


_SPLIT = "window and entries in one pass, queries normed and rotated on the way in; keys split while rows are few"
_FIXED = "as triton.attend, keys split in runs of 256, whatever the number of rows"
SPECS = (
    KernelSpec(
        "cute.attend",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "64 heads a CTA: a warpgroup gathers keys, two multiply; the keys of few rows are split among CTAs",
        "attend.launch_sm90:CUTE_ATTEND",
        min_sm=90,
        end_sm=100,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        launches=(r"attend_sm90",),
        evidence=_CUTE_EVIDENCE,
    ),
    KernelSpec(
        "cute.attend_invariant",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "as cute.attend, by clusters whose size depends on the ratio alone",
        "attend.launch_sm90:CUTE_ATTEND_INVARIANT",
        min_sm=90,
        end_sm=100,
        dim_multiple=64,
        first_dim=512,
        activations=("bfloat16",),
        is_batch_invariant=True,
        launches=(r"attend_sm90",),
        evidence=_CUTE_EVIDENCE,
    ),
    *(
        _triton("triton.attend", "attend.launch:ATTEND", _SPLIT, o, is_batch_invariant=False)
        for o in (_PLAIN, _STEPWISE)
    ),
    *(
        _triton("triton.attend_invariant", "attend.launch:ATTEND_INVARIANT", _FIXED, o, is_batch_invariant=True)
        for o in (_PLAIN, _STEPWISE)
    ),
    *map(_reference, (_PLAIN, _STEPWISE)),
)
