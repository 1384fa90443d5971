"""Ranks of ``bench parallel`` that fail, alone or all: each gives the contender up with the others, and goes on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ownpath.bench.exchanges import exchange_rows
from ownpath.bench.parallel import swap_owners
from ownpath.bench.row import Case, Row
from ownpath.bench.shapes import parallel_shape
from ownpath.bench.timing import WallClock
from ownpath.bench.together import Together, TogetherContender, TogetherRound
from ownpath.ranks.virtual import VirtualPeers, run_virtual

CPU = torch.device("cpu")
CASE = Case("parallel", "sum tiny", {"ranks": 2}, 1, 0, 0, None)


def together(peers: VirtualPeers) -> Together:
    group: Any = None  # no contender here is torch's
    ranks: Any = peers
    return Together(ranks, CPU, group, WallClock(0.001))


def rows_of(make: Callable[[int], TogetherRound]) -> list[tuple[Row, Row]]:
    """Each rank's row of a contender, and of one behind it that swaps ranks."""

    def work(peers: VirtualPeers) -> tuple[Row, Row]:
        ranks = together(peers)
        x = torch.full((1, 4), float(peers.rank))

        def swapped() -> torch.Tensor:
            return peers.swap("sound", (x,))[1 - peers.rank][0]

        def judge(y: torch.Tensor) -> float:
            return float(abs(y.mean() - (1 - peers.rank)))

        first = ranks.row(CASE, TogetherContender("first", lambda: make(peers.rank)))
        return first, ranks.row(CASE, TogetherContender("sound", lambda: TogetherRound([swapped], judge)))

    return run_virtual(2, work)


def calls(*of_rank: Callable[[], torch.Tensor]) -> Callable[[int], TogetherRound]:
    return lambda rank: TogetherRound([of_rank[rank]], lambda y: 0.0)


def fine() -> torch.Tensor:
    return torch.zeros(1, 4)


def late(after: int) -> Callable[[], torch.Tensor]:
    """A call that fails once it was made so often."""
    count = [0]

    def call() -> torch.Tensor:
        count[0] += 1
        if count[0] > after:
            raise RuntimeError("it is broken")
        return fine()

    return call


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_contender_that_fails_on_one_rank_fails_on_all(after: int) -> None:
    """At its making, check, capture or timing; the one behind it is measured."""
    found = rows_of(lambda rank: calls(fine, late(after))(rank))
    for rank, (first, sound) in enumerate(found):
        assert (first.status, first.timing) == ("failed", None)
        assert first.reason == ("RankFailed: rank 1: " if rank == 0 else "") + "RuntimeError: it is broken"
        assert (sound.status, sound.rel_l2) == ("ok", 0.0)


def test_a_wrong_answer_of_one_rank_is_wrong_on_all() -> None:
    for wrong in (2.0, math.nan):
        found = rows_of(lambda rank, wrong=wrong: TogetherRound([fine], lambda y: wrong if rank else 0.0))  # type: ignore[misc]
        assert [first.status for first, _ in found] == ["wrong", "wrong"]
        assert all(sound.status == "ok" for _, sound in found)


def test_the_slowest_rank_counts() -> None:
    def slow() -> torch.Tensor:
        return torch.linalg.matrix_exp(torch.zeros(300, 300))[:1, :4]

    found = [first for first, _ in rows_of(calls(fine, slow))]
    assert found[0].timing == found[1].timing
    assert found[0].timing is not None
    assert found[0].timing.us > 100


def test_exchanges_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references' rows; torch's own groups need processes."""
    monkeypatch.setattr("ownpath.bench.exchanges.collectives_of", lambda ranks, most: ())

    def work(peers: VirtualPeers) -> list[Row]:
        return list(exchange_rows(together(peers), "tiny", 3, parallel_shape("tiny").hidden))

    for rows in run_virtual(2, work):
        kinds = [f"{kind} tiny" for kind in ("sum", "columns", "rows and back", "boundary alone", "boundary")]
        assert [(row.case.shape, row.status, row.rel_l2) for row in rows] == [(kind, "ok", 0.0) for kind in kinds]
        assert [row.case.num_bytes for row in rows] == [1536, 1536, 2 * 1536, 0, 1536]  # 3 rows of 256 in bfloat16
        *_, alone, behind = rows
        assert alone.timing is not None
        assert behind.timing is not None
        assert behind.facts == {"added_us": round(behind.timing.us - alone.timing.us, 2)}


def test_shapes_have_short_names() -> None:
    assert parallel_shape("pro").name == "v4-pro"
    assert parallel_shape("v4-flash").name == "v4-flash"
    with pytest.raises(ValueError, match="no MoE shape 'nothing'"):
        parallel_shape("nothing")


def test_owners_of_experts_are_swapped() -> None:
    """Three ranks of 4: rank 0's experts for rank 2's, at their places; rank 1's stay."""
    ids = torch.tensor([[0, 5, 11], [8, 3, 4]], dtype=torch.int32)
    assert swap_owners(ids, 4, 0, 2).tolist() == [[8, 5, 3], [0, 11, 4]]
    assert torch.equal(swap_owners(ids, 4, 1, 1), ids)
