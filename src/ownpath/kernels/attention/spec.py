"""Softmax attention over shared keys, which are the values too, with a sink per head."""

from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "ref.attention",
        OpKind.ATTENTION,
        (),
        "SharedKeyAttention",
        "row_major",
        "torch, one sequence at a time: products with keys and values are not projections, no weight is involved",
        "attention.ref:ATTENTION",
        is_batch_invariant=True,
        is_default=True,
    ),
)
