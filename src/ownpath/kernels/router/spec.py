"""Specs of the router: expert ids and weights from the gate's logits, or from the gate's input."""

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
        "triton.route",
        OpKind.ROUTE,
        (),
        "Route",
        "row_major",
        "gate and router in one launch: programs share the logits, the last to finish chooses",
        "router.route:ROUTE",
        min_sm=90,
        activations=("bfloat16", "float32"),
        packages=("triton",),
        launches=(r"\broute_(few|some)\b",),
        evidence=Evidence("router.ref:route", "tests/gpu/test_small_ops.py", "python bench/small_ops.py"),
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
    KernelSpec(
        "ref.route",
        OpKind.ROUTE,
        (),
        "Route",
        "row_major",
        "the references of gate and router, one after the other",
        "router.ref:ROUTE",
        is_default=True,
    ),
)
