"""The sampler's torch twin: its numbers, its filters against the plain definition, its distribution."""

import math

import pytest
import torch
from support.sampling import expected_token, filters, kept_ids, mixed_rows, plain_rows

from ownpath.kernels.sample import ref
from ownpath.kernels.sample.ref import gumbel, philox_words, quick_gumbel, sample, weights, words_of
from ownpath.kernels.sample.types import FAULT_NON_FINITE, FAULT_NOTHING_ALLOWED, Sampled, SampleRows

PUBLISHED = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""Known answers of Philox 4x32-10: counter, key, words. Source: the authors' Random123 library."""


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's integers, from the paper."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((second >> 32) ^ c[1] ^ k0, second % 2**32, (first >> 32) ^ c[3] ^ k1, first % 2**32)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_by_hand_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert philox_by_hand(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_words_are_philox_of_seed_index_and_token(seed: int) -> None:
    """Token i has word i % 1024 // 256 of the block i // 1024 * 256 + i % 256."""
    words = words_of(torch.tensor([seed]), torch.tensor([77], dtype=torch.int32), 2560)[0]
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for i in (0, 1, 255, 256, 1023, 1024, 2047, 2559):
        assert int(words[i]) == philox_by_hand((i // 1024 * 256 + i % 256, 77, 0, 0), key)[i % 1024 // 256]


def test_words_are_a_rows_own() -> None:
    seeds, indexes = torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0], dtype=torch.int32)
    together = philox_words(seeds, indexes, 64)
    for n in range(3):
        assert torch.equal(philox_words(seeds[n : n + 1], indexes[n : n + 1], 64)[:, 0], together[:, n])
    assert len({tuple(together[0, n].tolist()) for n in range(3)}) == 3


EXTREMES = [0, 1, 2, 255, 2**31 - 1, 2**31, 1257966796, 1257966797, 2**32 - 2, 2**32 - 1]


def test_noise_is_gumbels() -> None:
    """Two polynomials within 2.7e-8, each followed by about ten float32 roundings of values up to 23."""
    words = torch.cat((torch.tensor(EXTREMES), torch.randint(2**32, (200_000,)), torch.arange(4096)))
    v = (words.double() + 0.5) / 2**32
    wanted = -(-torch.log1p(-v)).log()
    assert (gumbel(words).double() - wanted).abs().max() < 23 * 2**-23
    # What the quick form may be wrong by, with a factor of ten in hand.
    assert (quick_gumbel(words).double() - wanted).abs().max() < 1e-5


def test_weights_are_exponentials() -> None:
    z = torch.cat((-torch.rand(100_000) * 27, torch.tensor([0.0, -1e-30, -27.7])))
    wanted = z.double().exp() * 2**40
    error = (weights(z).double() - wanted).abs()
    # Float32's own rounding of the argument's parts and of the mantissa, and a unit for rounding down.
    assert (error <= 1 + wanted * 4 * 2**-24).all()
    assert weights(torch.tensor([0.0, -30.0, -1e30, -math.inf])).tolist() == [2**40, 0, 0, 0]


@pytest.mark.parametrize(("num_vocab", "spread"), [(1, 1.0), (7, 2.0), (129, 0.5), (1500, 3.0)])
def test_choices_are_the_definitions(num_vocab: int, spread: float) -> None:
    """Rows with every parameter, with ties planted: logits on a grid of eighths."""
    g = torch.Generator().manual_seed(num_vocab)
    num_rows = 300 if num_vocab < 1000 else 60
    logits = (torch.randn(num_rows, num_vocab, generator=g) * spread * 8).round() / 8
    rows = mixed_rows(num_rows, num_vocab, g)
    assert rows.mask_TW is not None
    rows.mask_TW[:, 0] |= 1
    found = sample(logits, rows)
    assert not found.fault_T.any()
    wanted = [expected_token(logits[row], rows, row) for row in range(num_rows)]
    assert found.token_T.tolist() == wanted


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4, 5, 6, 7}),
        (3, 1.0, 0.0, {1, 3, 4}),  # of the equal ones the lower ids
        (2, 1.0, 0.0, {1, 3}),
        (0, 0.65, 0.0, {1, 3, 4, 6}),
        (0, 0.45, 0.0, {1, 3, 4}),
        (0, 1e-40, 0.0, {1}),
        (0, 1.0, 1.0, {1, 3, 4, 6}),
        (0, 1.0, 0.5, {1, 3, 4, 6}),
        (5, 0.9, 0.1, {0, 1, 3, 4, 6}),
        (1, 1.0, 0.0, {1}),
        (9, 1.0, 0.0, {0, 1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_kept_sets_by_hand(top_k: int, top_p: float, min_p: float, kept: set[int]) -> None:
    """Four favourites with a probability of 1/5 each, four others with 1/20."""
    x = torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 0]) * math.log(4)
    assert kept_ids(x.tolist(), 1.0, top_k, top_p, min_p) == kept
    rows = plain_rows(2000)._replace(filters=filters(2000, top_k, top_p, min_p))
    assert set(sample(x.expand(2000, -1), rows).token_T.tolist()) == kept


def test_equal_logits_are_cut_by_id() -> None:
    """All weights are equal, so sums are exact: half of the tokens, a token more when a little more is asked for."""
    for num_vocab, top_p, last in ((1000, 0.5, 499), (1000, 0.50001, 500), (640, 0.25, 159), (640, 0.2499, 159)):
        rows = plain_rows(400)._replace(filters=filters(400, top_p=top_p))
        assert int(sample(torch.full((400, num_vocab), -7.5), rows).token_T.max()) <= last
        x = torch.zeros(1, num_vocab)
        draws = ref._start(x, plain_rows(1))
        for token, kept in ((last, True), (last + 1, False)):
            chosen = torch.tensor([token])
            before = ref._before(x, chosen)
            assert bool(ref._are_kept(draws, chosen, before, filters(1, top_p=top_p))) is kept


def chi_square_limit(degrees: int) -> float:
    """The upper 1e-6 quantile: the cube root of chi-square over its mean is normal (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.8 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (2.0, 0.5)])
def test_draws_follow_the_filtered_softmax(temperature: float, top_p: float) -> None:
    """Chi-square of 20,000 draws over at most 100 tokens: one set of seeds in a million fails a right sampler."""
    logits = torch.randn(100, generator=torch.Generator().manual_seed(8)) * 0.7
    kept = sorted(kept_ids(logits.tolist(), temperature, 0, top_p, 0.0))
    num_draws = 20_000
    rows = plain_rows(num_draws, temperature, first_seed=10**6)._replace(filters=filters(num_draws, top_p=top_p))
    counts = torch.bincount(sample(logits.expand(num_draws, -1), rows).token_T, minlength=100)
    assert counts.sum() == counts[kept].sum() == num_draws
    expected = torch.softmax(logits[kept].double() / temperature, 0) * num_draws
    assert expected.min() > 5
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert statistic < chi_square_limit(len(kept) - 1)


def test_successive_indexes_are_independent_draws() -> None:
    """One seed, 20,000 indexes: pairs of draws over 4 tokens are uniform over 16 cells."""
    rows = plain_rows(20_000)._replace(seed_T=torch.full((20_000,), 3), index_T=torch.arange(20_000, dtype=torch.int32))
    tokens = sample(torch.zeros(20_000, 4), rows).token_T
    cells = torch.bincount(tokens[::2] * 4 + tokens[1::2], minlength=16).double()
    statistic = float(((cells - 625) ** 2 / 625).sum())
    assert statistic < chi_square_limit(15)


def test_close_scores_are_decided_exactly() -> None:
    """Scores nearer than the quick noise can tell: both equal logits and equal words, then by id."""
    x = torch.zeros(1, 4)
    words = torch.tensor([[900, 700, 700, 701]])
    scores = quick_gumbel(words).double()
    draws = ref._Draws(x, words, torch.ones(1, dtype=torch.float64), scores)
    assert ref._winners(draws).tolist() == [1]
    noisy = scores + torch.tensor([[0.0, -5e-6, 0.0, 5e-6]])
    assert ref._winners(draws._replace(scores_DV=noisy)).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-9, 1e-31])
def test_faults(temperature: float) -> None:
    logits = torch.randn(6, 70)
    for row, bad in enumerate((math.nan, math.inf, -math.inf)):
        logits[row, 69 - row] = bad
    mask = torch.full((6, 3), -1, dtype=torch.int32)
    mask[4] = torch.tensor([0, 0, -(2**31)], dtype=torch.int32)  # allows only ids beyond the vocabulary
    found = sample(logits, plain_rows(6, temperature)._replace(mask_TW=mask))
    bad_ones = [FAULT_NON_FINITE] * 3
    assert found.fault_T.tolist() == [*bad_ones, 0, FAULT_NOTHING_ALLOWED, 0]
    assert found.token_T[found.fault_T != 0].tolist() == [0] * 4


def test_a_greedy_row_takes_the_first_of_the_likeliest() -> None:
    logits = torch.zeros(2, 2000)
    logits[0, [700, 1999]] = 3.0
    logits[1] = -0.0
    logits[1, 5] = 0.0
    assert sample(logits, plain_rows(2, 0.0)).token_T.tolist() == [700, 0]


def test_huge_adjustments_stay_finite() -> None:
    logits = torch.full((1, 3), 3e38)
    rows = mixed_rows(1, 3, torch.Generator().manual_seed(0))._replace(filters=None, mask_TW=None)
    assert rows.penalties is not None
    penalties = rows.penalties._replace(
        tables_RV=torch.ones(1, 3, dtype=torch.int32), table_T=torch.zeros(1, dtype=torch.int32)
    )
    penalties = penalties._replace(frequency_T=torch.tensor([-3e38]), repetition_T=torch.tensor([0.1]))
    found = sample(logits, rows._replace(penalties=penalties, temperature_T=torch.tensor([1.0])))
    assert not found.fault_T.any()


def test_log_probabilities_are_of_the_raw_logits() -> None:
    g = torch.Generator().manual_seed(1)
    logits, rows = torch.randn(8, 333, generator=g) * 3, mixed_rows(8, 333, g)
    out = Sampled(torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), torch.zeros(8))
    sample(logits, rows, out)
    wanted = logits.double().log_softmax(-1).gather(1, out.token_T.long().unsqueeze(-1)).squeeze(-1)
    # A sum of 333 terms and a difference of numbers below 16, each rounded to float32.
    assert out.logprob_T is not None
    assert (out.logprob_T - wanted).abs().max() < 16 * 2**-20


def test_no_rows() -> None:
    none = SampleRows(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    assert sample(torch.zeros(0, 5), none).token_T.shape == (0,)
