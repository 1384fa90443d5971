"""Attention of decode rows over the paged caches: head norm, rotation, softmax with sink, rotation back."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_EVIDENCE = Evidence("attend.ref:attend", "tests/gpu/test_attend.py", "python bench/attend.py")

SPECS = (
    KernelSpec(
        "triton.attend",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "window and entries in one pass, queries normed and rotated on the way in; keys split while rows are few",
        "attend.launch:ATTEND",
        min_sm=90,
        activations=("bfloat16",),
        packages=("triton",),
        launches=(r"\battend_kernel\b",),
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "triton.attend_invariant",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "as triton.attend, keys split in runs of 256, whatever the number of rows",
        "attend.launch:ATTEND_INVARIANT",
        min_sm=90,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\battend_kernel\b",),
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "ref.attend",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "torch, row by row",
        "attend.ref:ATTEND",
        is_batch_invariant=True,
        is_default=True,
    ),
)
