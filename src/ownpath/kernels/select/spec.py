"""The selection of a query's entries by their scores."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
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
        evidence=Evidence("select.ref:select", "tests/gpu/test_indexer.py", "ownpath bench select"),
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
