"""Test and bench sizes: numbers of a row's results, those of 43 layers' flags among them; numbers of requests."""

from ownpath.kernels.cases import KernelCase

CASES = tuple(
    case
    for op in ("accept_drafts", "go_on_drafting")
    for case in (
        KernelCase(op, "43 layers", (5 + 43,), (1, 8, 32), bench=True),
        KernelCase(op, "few layers", (5 + 4,), (1, 3), tiny=True),
    )
)
