"""The selection of a query's entries by their scores."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_EVIDENCE = Evidence("select.ref:select", "tests/gpu/test_indexer.py", "ownpath bench select")

SPECS = (
    KernelSpec(
        "cute.select_sm90",
        OpKind.SELECT,
        (),
        "Select",
        "row_major",
        "exact: a cluster of CTAs holds a long row in registers, counts by value, compares the last bin; short rows as "
        "triton.select",
        "select.launch_sm90:CUTE_SELECT",
        min_sm=90,
        end_sm=100,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bselect_kernel\b|select_sm90",),
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "triton.select",
        OpKind.SELECT,
        (),
        "Select",
        "row_major",
        "exact: the threshold is searched in registers, one prefix sum orders what is above; long rows in chunks",
        "select.launch:SELECT",
        min_sm=90,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bselect_kernel\b",),
        evidence=_EVIDENCE,
    ),
    KernelSpec(
        "ref.select",
        OpKind.SELECT,
        (),
        "Select",
        "row_major",
        "torch: a stable sort, so that ties are decided",
        "select.ref:SELECT",
        is_batch_invariant=True,
        is_default=True,
    ),
)
