"""Attention of decode rows over the paged caches: head norm, rotation, softmax with sink, rotation back."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_EVIDENCE = Evidence("attend.ref:attend", "tests/gpu/test_attend.py", "python bench/attend.py")
_CUTE_EVIDENCE = Evidence("attend.ref:attend", "tests/gpu/test_attend_sm90.py", "python bench/attend.py")

SPECS = (
    KernelSpec(
        "cute.attend",
        OpKind.ATTEND,
        (),
        "DecodeAttention",
        "paged",
        "64 heads a CTA: a warpgroup gathers keys, two multiply; few rows are shared by clusters that merge on chip",
        "attend.launch_sm90:CUTE_ATTEND",
        min_sm=90,
        end_sm=100,
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
        activations=("bfloat16",),
        is_batch_invariant=True,
        launches=(r"attend_sm90",),
        evidence=_CUTE_EVIDENCE,
    ),
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
