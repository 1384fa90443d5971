"""The ends of a step with drafts, interpreted and in torch, beside plain Python."""

from collections.abc import Callable

import pytest
import torch
from support.draft_rows import assert_same, copied, draft_rows, ended

from ownpath.kernels.cases import KernelCase
from ownpath.kernels.drafts.cases import CASES
from ownpath.kernels.drafts.types import DraftRows
from ownpath.kernels.registry import KERNELS

TINY = [case for case in CASES if case.tiny and case.op == "accept_drafts"]


@pytest.mark.parametrize("is_judged", [False, True])
@pytest.mark.parametrize("kind", ["triton", "ref"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.label)
def test_a_step_ends_as_request_by_request(case: KernelCase, kind: str, is_judged: bool) -> None:
    accept, go_on = KERNELS[f"{kind}.accept_drafts"], KERNELS[f"{kind}.go_on_drafting"]
    for count in case.tokens:
        rows = draft_rows(count, case.sizes[0])
        wanted = ended(copied(rows), count, is_judged)
        accept.run(rows, count, accept.prepare(), is_judged=is_judged)
        assert (rows.turn_W != wanted.turn_W)[: 2 * count].all(), "the module reads the step's own rows"
        go_on.run(rows, count, go_on.prepare())
        assert_same(rows, wanted)


REFUSED: tuple[tuple[str, Callable[[DraftRows], DraftRows]], ...] = (
    ("pad_W", lambda rows: rows._replace(pad_W=rows.pad_W.long())),
    ("results_NW", lambda rows: rows._replace(results_NW=rows.results_NW[:4], shared_2NW=rows.shared_2NW[:, :4])),
    ("place_R", lambda rows: rows._replace(place_R=rows.place_R[:1])),
    ("shared_2NW", lambda rows: rows._replace(shared_2NW=rows.shared_2NW[:1])),
)


@pytest.mark.parametrize(("named", "change"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(named: str, change: Callable[[DraftRows], DraftRows]) -> None:
    rows = draft_rows(3, 9)
    before = copied(rows)
    for name in ("triton.accept_drafts", "triton.go_on_drafting"):
        with pytest.raises(ValueError, match=named):
            KERNELS[name].run(change(rows), 3, KERNELS[name].prepare())
    assert_same(rows, before)


def test_no_request_is_no_launch() -> None:
    rows = draft_rows(1, 9)
    before = copied(rows)
    KERNELS["triton.go_on_drafting"].run(rows, 0, KERNELS["triton.go_on_drafting"].prepare())
    assert_same(rows, before)
    assert rows.shared_2NW.dtype is torch.int32
