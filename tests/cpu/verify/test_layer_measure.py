"""Distances and judgements by hand-made values."""

import pytest
import torch

from ownpath.verify.layers.choices import Candidates, entry_candidates, expert_candidates, judge, mask_of
from ownpath.verify.layers.measure import ROW_FACTOR, Distance, Measurement, distance, row_distances

EPS = torch.finfo(torch.float64).eps


def test_a_value_beside_itself() -> None:
    value = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    found = distance(value, value.double())
    assert found == Distance(0.0, 0.0, found.cosine, 0.0, float(value.abs().max()), found.amax, 0.0, 0.0)
    assert found.cosine == 1.0


def test_distances_by_hand() -> None:
    """Rows (3, 4) and (0, 5) with 1 more in one place: |gap| 1 of |reference| sqrt(50); the row 1 of 5."""
    found = distance(torch.tensor([[3.0, 4.0], [1.0, 5.0]]), torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    assert found.rel_l2 == pytest.approx(50**-0.5, rel=4 * EPS)
    assert found.worst_row == pytest.approx(0.2, rel=4 * EPS)
    assert found.cosine == pytest.approx(50 / (51 * 50) ** 0.5, rel=8 * EPS)
    assert (found.max_abs, found.amax, found.reference_amax) == (1.0, 5.0, 5.0)
    assert found.nonfinite_share == found.zero_share == 0.0


def test_a_small_row_is_measured_by_the_rows_mean_square() -> None:
    """Rows of sizes 0 and 10 have a root mean square of sqrt(50)."""
    far = row_distances(torch.tensor([[1.0, 0.0], [0.0, 10.0]]), torch.tensor([[0.0, 0.0], [0.0, 10.0]]))
    assert far.tolist() == pytest.approx([50**-0.5, 0.0], rel=4 * EPS)


def test_one_value_that_is_no_number_among_many() -> None:
    engine = torch.ones(1000, 1000)
    engine[7, 9] = torch.nan
    found = distance(engine, torch.ones(1000, 1000))
    assert found.nonfinite_share == pytest.approx(1e-6, rel=1e-9)
    assert found.rel_l2 == pytest.approx(1e-3, rel=1e-9)
    assert not Measurement(0, "out", **vars(found), budget=1.0).is_within


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the engine's is \[2\], the reference's \[3\]"):
        distance(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(("rel_l2", "worst_row", "is_within"), [(1, 8, True), (1.1, 1, False), (0.5, 8.1, False)])
def test_a_budget_is_for_all_rows_and_for_each(rel_l2: float, worst_row: float, is_within: bool) -> None:
    assert ROW_FACTOR == 8
    numbers = Distance(rel_l2, worst_row, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    assert Measurement(0, "out", **vars(numbers), budget=1.0).is_within is is_within


def experts(scores: list[float], engine: list[float]) -> Candidates:
    """Two of them are to be chosen; the engine's logits are those that have these scores."""
    logits = torch.tensor([engine], dtype=torch.float64).square().expm1().log()
    return expert_candidates(torch.tensor([scores]), logits, torch.zeros(len(scores)), 2)


@pytest.mark.parametrize(
    ("chosen", "engine", "num_wrong"),
    [
        ([0, 1], [3, 2, 1, 0.5], 0),
        ([0, 2], [3, 2, 1, 0.5], 1),  # 2 against 1, and the engine's own scores say so too
        ([0, 2], [3, 1.4, 1.6, 0.5], 0),  # the engine's scores are 0.6 off: a gap of 1 is within twice that
        ([0, 3], [3, 1.4, 1.6, 0.5], 1),  # a gap of 1.5 is not
        ([0, 0], [3, 2, 1, 0.5], 1),  # one expert twice
        ([0, 9], [3, 2, 1, 0.5], 1),  # an expert that there is none of
        ([-1, 1], [3, 2, 1, 0.5], 1),
    ],
)
def test_a_near_tie_excuses_what_the_engines_scores_explain(
    chosen: list[int], engine: list[float], num_wrong: int
) -> None:
    judged = judge(mask_of(torch.tensor([chosen]), 4), experts([3, 2, 1, 0.5], engine))
    assert judged.num_wrong == num_wrong


def test_equal_scores_go_to_the_lowest_index() -> None:
    assert experts([1, 2, 2, 2], [1, 2, 2, 2]).best().tolist() == [[False, True, True, False]]


def test_entries_must_be_complete_and_as_many_as_there_can_be() -> None:
    """Ratio 4, 8 tokens, 2 entries: none before token 3, one from there, two at token 7."""
    q, weights, keys = torch.ones(8, 1, 1), torch.ones(8, 1), torch.tensor([[1.0], [2.0]])
    scores = (q[:, 0] @ keys.T).masked_fill(torch.tensor([[t < 3, t < 7] for t in range(8)]), -torch.inf)
    candidates = entry_candidates(scores, (q, weights, keys), ratio=4, topk=1)
    assert candidates.count_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    right = torch.tensor([[False, False]] * 3 + [[True, False]] * 4 + [[False, True]])
    assert judge(right, candidates).num_wrong == 0
    early, worse, none = right.clone(), right.clone(), right.clone()
    early[2, 0] = True
    worse[7] = torch.tensor([True, False])
    none[4, 0] = False
    for mask in (early, worse, none):
        assert judge(mask, candidates).wrong_T.sum() == 1
