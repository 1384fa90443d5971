"""Specs of what ends a step with drafts."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.accept_drafts",
        OpKind.ACCEPT_DRAFTS,
        (),
        "Drafts",
        "row_major",
        "one launch between the model and its module of drafts",
        "drafts.launch:ACCEPT_DRAFTS",
        min_sm=90,
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\baccept_kernel\b",),
        evidence=Evidence("drafts.ref:accept_drafts", "tests/gpu/test_draft_ends.py", "ownpath bench accept_drafts"),
    ),
    KernelSpec(
        "ref.accept_drafts",
        OpKind.ACCEPT_DRAFTS,
        (),
        "Drafts",
        "row_major",
        "torch: an operation for each array",
        "drafts.ref:ACCEPT_DRAFTS",
        is_batch_invariant=True,
        is_default=True,
    ),
    KernelSpec(
        "triton.go_on_drafting",
        OpKind.GO_ON_DRAFTING,
        (),
        "Drafts",
        "row_major",
        "one launch, which writes the host's copy of the results too",
        "drafts.launch:GO_ON_DRAFTING",
        min_sm=90,
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bgo_on_kernel\b",),
        evidence=Evidence("drafts.ref:go_on_drafting", "tests/gpu/test_draft_ends.py", "ownpath bench go_on_drafting"),
    ),
    KernelSpec(
        "ref.go_on_drafting",
        OpKind.GO_ON_DRAFTING,
        (),
        "Drafts",
        "row_major",
        "torch: an operation for each array, and a copy",
        "drafts.ref:GO_ON_DRAFTING",
        is_batch_invariant=True,
        is_default=True,
    ),
)
