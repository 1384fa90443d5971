"""The ends of a step with drafts, on the device beside plain Python: every array, and the host's copy."""

import pytest
import torch
from support.draft_rows import assert_same, copied, draft_rows, ended

from ownpath.kernels.cases import KernelCase
from ownpath.kernels.drafts.cases import CASES
from ownpath.kernels.registry import KERNELS

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]


@pytest.mark.parametrize("is_judged", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "accept_drafts"], ids=lambda case: case.label)
def test_a_step_ends_as_request_by_request(case: KernelCase, is_judged: bool, cuda: torch.device) -> None:
    """Twice with the same operands: as it is compiled, and by the prepared launch."""
    accept, go_on = KERNELS["triton.accept_drafts"], KERNELS["triton.go_on_drafting"]
    operands = accept.prepare(), go_on.prepare()
    for count in case.tokens:
        rows = draft_rows(count, case.sizes[0], cuda)
        for _ in range(2):
            wanted = ended(copied(rows), count, is_judged)
            accept.run(rows, count, operands[0], is_judged=is_judged)
            go_on.run(rows, count, operands[1])
            torch.cuda.synchronize()
            assert_same(rows, wanted)
