"""Specs of the router: expert ids and weights from the gate's logits."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.router",
        OpKind.ROUTER,
        (),
        "Router",
        "row_major",
        "a warp a token: K rounds of the largest score, the lowest id first, in registers",
        "router.launch:ROUTER",
        min_sm=90,
        activations=("bfloat16", "float32"),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\brouter_kernel\b",),
        evidence=Evidence("router.ref:router", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
    ),
    KernelSpec(
        "ref.router",
        OpKind.ROUTER,
        (),
        "Router",
        "row_major",
        "torch: a stable sort, so that ties are decided",
        "router.ref:ROUTER",
        is_default=True,
    ),
)
