"""The boundary of the hyper-connections: post of one sublayer, pre and norm of the next."""

from dataclasses import replace

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_FAST = KernelSpec(
    "triton.hyper_boundary",
    OpKind.HYPER,
    (),
    "HyperBoundary",
    "row_major",
    "post, pre and norm in two launches that overlap; the mixing logits split over the whole device",
    "hyper.launch:HYPER_BOUNDARY",
    min_sm=90,
    dim_multiple=8,
    first_dim=4,
    activations=("bfloat16",),
    packages=("triton",),
    launches=(r"\bspread_(few|many|columns)\b", r"\bcollapse\b"),
    evidence=Evidence("hyper.ref:hyper_boundary", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
)

SPECS = (
    _FAST,
    replace(
        _FAST,
        name="triton.hyper_boundary_invariant",
        why="as triton.hyper_boundary, with one way of summing for every number of tokens",
        entry="hyper.launch:HYPER_BOUNDARY_INVARIANT",
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.hyper_boundary",
        OpKind.HYPER,
        (),
        "HyperBoundary",
        "row_major",
        "post, pre and norm as torch computes them one after the other",
        "hyper.ref:HYPER_BOUNDARY",
        is_default=True,
    ),
)
