"""Choosing and scoring tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.engine.request import Request, RequestError, SamplingParams
from ownpath.engine.sampler import (
    NonFiniteLogits,
    SampleRow,
    choose_tokens,
    finite_rows,
    score_tokens,
    warm_up_sampler,
)
from ownpath.kernels.sample.ref import SampleReference
from ownpath.kernels.sample.types import Sampled, SampleRows


def token_ids(logits_SV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    return choose_tokens(logits_SV, rows).token_ids


def row(temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0) -> SampleRow:
    """The first draw of a request with these parameters."""
    params = SamplingParams(8, temperature=temperature, top_p=top_p, seed=seed)
    return SampleRow(params, Request([0], params, lambda output: None).seed, 0)


def successive(first: SampleRow, count: int) -> list[SampleRow]:
    """A request's rows, draw after draw."""
    return [first._replace(num_drawn=index) for index in range(count)]


def test_greedy_takes_the_likeliest(device: torch.device) -> None:
    """The first of the likeliest, alone and beside a row that draws."""
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 2.0, 1.0], [0.0, 0.0, 90.0]], device=device)
    greedy = row(temperature=0)
    assert token_ids(logits, [greedy] * 3) == [1, 0, 2]
    assert token_ids(logits, [greedy, greedy, row()]) == [1, 0, 2]


def test_frequencies_follow_the_softmax_of_the_scaled_logits(device: torch.device) -> None:
    """20,000 draws; each count is binomial, so 5 standard deviations fail once in about a million runs per token."""
    logits, temperature, num_draws = torch.tensor([0.0, 1.0, -1.0, 0.5], device=device), 0.7, 20_000
    counts = torch.zeros(4)
    for token_id in token_ids(logits.repeat(num_draws, 1), successive(row(temperature), num_draws)):
        assert token_id is not None
        counts[token_id] += 1
    weights = [math.exp(float(value) / temperature) for value in logits]
    for token_id, weight in enumerate(weights):
        p = weight / sum(weights)
        deviation = math.sqrt(num_draws * p * (1 - p))
        assert abs(float(counts[token_id]) - num_draws * p) < 5 * deviation


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(1.0, {0, 1, 2, 3}), (0.949, {0, 1, 2}), (0.7, {0, 1}), (0.499, {0}), (0.501, {0, 1}), (1e-50, {0})],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(
    top_p: float, allowed: set[int], device: torch.device
) -> None:
    """Edges are kept off by a thousandth: logits are float32, so that 0.5 is not exactly half."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], device=device).log()
    assert set(token_ids(logits.repeat(2000, 1), successive(row(top_p=top_p), 2000))) == allowed


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy_not_nan(temperature: float, device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1e30, -1e30, 0.0]], device=device)
    assert token_ids(logits, [row(temperature), row(temperature)]) == [1, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.1, 0.9, 1.0]))
def test_a_row_does_not_depend_on_its_neighbours(
    device: torch.device, seed: int, temperature: float, top_p: float
) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = [row(temperature, top_p, seed + n) for n in range(4)] + [row(temperature=0)]
    together = token_ids(logits, rows)
    alone = [token_ids(logits[n : n + 1], [rows[n]])[0] for n in range(5)]
    assert together == alone
    assert all(token_id is not None and 0 <= token_id < 300 for token_id in together)


def test_seeds() -> None:
    def draws(seed: int | None) -> list[int | None]:
        return token_ids(torch.zeros(8, 1000), successive(row(seed=seed), 8))

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)
    assert draws(-(2**63)) != draws(2**63 - 1)
    assert len(set(draws(7))) > 1, "each draw has numbers of its own"


def test_a_warm_up_runs_every_variant_that_a_step_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(SampleReference):
        def __init__(self) -> None:
            self.had: list[tuple[bool, bool, bool]] = []

        def run(
            self, logits_TV: torch.Tensor, rows: SampleRows, operand: None, *, out: Sampled | None = None
        ) -> Sampled:
            self.had.append((rows.filters is not None, rows.penalties is not None, rows.mask_TW is not None))
            assert (rows.penalties is None) == (rows.bias is None)
            return super().run(logits_TV, rows, operand, out=out)

    recorder = Recorder()
    monkeypatch.setattr("ownpath.engine.sampler.sampler_of", lambda device: (recorder, None))
    warm_up_sampler("cpu", 50, 64)
    assert [*dict.fromkeys(recorder.had)] == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


def test_scores_are_the_models_own_log_probabilities(device: torch.device) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    scored = score_tokens(logits, [4, 0, 49], 5)
    for n, (token_id, entry) in enumerate(zip([4, 0, 49], scored, strict=True)):
        total = math.log(sum(math.exp(float(value)) for value in logits[n]))
        # Everything here is below 8, where float32 has steps of 2**-21; 16 of them for a sum of 50 terms.
        bound = 16 * 2**-21
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(logits[n, token_id]) - total, abs=bound)
        best = sorted(range(50), key=lambda i: -float(logits[n, i]))[:5]
        assert [i for i, _ in entry.top_logprobs] == best
        assert [p for _, p in entry.top_logprobs] == sorted((p for _, p in entry.top_logprobs), reverse=True)
    assert score_tokens(logits, [4, 0, 49], 0)[0].top_logprobs == ()


def test_a_chosen_token_brings_its_log_probability(device: torch.device) -> None:
    """By the raw logits, whatever the temperature and top_p; a CPU computes it where a row asks."""
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(1)).to(device)
    plain, drawn = row(temperature=0), row(temperature=0.5, top_p=0.9)
    asking = drawn._replace(params=replace(drawn.params, num_logprobs=0))
    rows = [plain, drawn, asking, drawn]
    found = choose_tokens(logits, rows)
    assert found.token_ids == token_ids(logits, [plain, drawn, drawn, drawn])
    for n, (token_id, logprob) in enumerate(zip(*found, strict=True)):
        assert token_id is not None
        exact = float(logits[n].double().log_softmax(-1)[token_id])
        # Logits and sums are below 8, where float32 has steps of 2**-21: 16 of them for a sum of 700 terms.
        assert logprob == pytest.approx(exact, abs=16 * 2**-21)
    silent = choose_tokens(logits, [plain, drawn, drawn, plain]).logprobs
    assert len(silent) == 4
    assert device.type != "cpu" or all(math.isnan(logprob) for logprob in silent)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_seen(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    assert finite_rows(logits) == [True, False, True]
    assert token_ids(logits, [row(temperature=0)] * 3) == [0, None, 0]
    assert [token is None for token in token_ids(logits, [row()] * 3)] == [False, True, False]
    with pytest.raises(NonFiniteLogits):
        score_tokens(logits, [0, 0, 0], 0)
    with pytest.raises(NonFiniteLogits):
        score_tokens(torch.full((1, 4), math.nan), [0], 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"presence_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 2.1},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((n, 1.0) for n in range(301))},
        {"min_tokens": -1},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"num_logprobs": -1},
        {"num_logprobs": 21},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(changes: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(changes))):
        SamplingParams(**({"max_tokens": 1} | changes))  # type: ignore[arg-type]
