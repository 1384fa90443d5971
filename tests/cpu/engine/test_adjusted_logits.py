"""Penalties, bias and a minimum of tokens: the definition in plain Python over several steps, beside other requests."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, FakeModel, random_rule
from cpu.engine.test_engine_engine import NUM_TOKENS, VOCAB, Asked, running

from ownpath.engine.adjust import Adjuster
from ownpath.engine.request import FinishReason, Request, RequestError, SamplingParams
from ownpath.engine.sampler import SampleRow, choose_tokens
from ownpath.kernels.sample.types import IN_PROMPT

PROMPT = [3, 4, 5, 4]
STEPS = 14
KINDS: list[dict[str, Any]] = [
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.9},
    {"repetition_penalty": 0.5},
    {"logit_bias": ((7, 100.0), (9, 99.0))},
    {"logit_bias": ((30, 2.5), (4, -100.0), (11, 3.0))},
    {"min_tokens": 6},
    {"min_tokens": 6, "stop_token_ids": frozenset(range(2, 30)), "ignore_eos": True},
    {"presence_penalty": 0.3, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "logit_bias": ((8, 5.0),)},
]


def adjusted_by_hand(
    logits: Sequence[float], prompt: list[int], said: list[int], params: SamplingParams
) -> list[float]:
    """Computes presence, frequency and bias as OpenAI's documentation has them, repetition as CTRL's paper."""
    x = list(logits)
    for token_id in set(prompt) | set(said):
        x[token_id] = (
            x[token_id] / params.repetition_penalty if x[token_id] > 0 else x[token_id] * params.repetition_penalty
        )
    for token_id in set(said):
        x[token_id] -= params.frequency_penalty * said.count(token_id) + params.presence_penalty
    for token_id, bias in params.logit_bias:
        x[token_id] += bias
    if len(said) < params.min_tokens:
        for token_id in params.stop_token_ids | (set() if params.ignore_eos else {EOS_ID}):
            x[token_id] = -math.inf
    return x


def expected(model: FakeModel, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """Adjusts each step's logits by hand; a plain row then draws from them."""
    said: list[int] = []
    plain = SamplingParams(STEPS, params.temperature, params.top_p, top_k=params.top_k)
    while len(said) < params.max_tokens:
        raw = model.rule((*prompt, *said))[:NUM_TOKENS]
        x = torch.tensor(adjusted_by_hand(raw.tolist(), prompt, said, params)).clamp(min=-3e38)
        (token_id,) = choose_tokens(x.unsqueeze(0), [SampleRow(plain, seed, len(said))]).token_ids
        assert token_id is not None
        said.append(token_id)
        if token_id in params.stop_token_ids or (token_id == EOS_ID and not params.ignore_eos):
            break
    return said


def eager_to_end() -> FakeModel:
    """A model for which the end token is likely from the start, and tokens repeat."""
    base = random_rule(VOCAB, ())

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        logits = base(history[-1:])
        logits[EOS_ID] = logits.max() - 1.5
        return logits

    return FakeModel(rule, VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_every_kind_follows_its_definition_alone_and_beside_others(temperature: float) -> None:
    model = eager_to_end()
    kinds = [{}, *KINDS[:6], {}, *KINDS[6:]]
    params = [
        SamplingParams(STEPS, temperature, seed=n, top_k=20 * (n % 2), top_p=0.95, **kind)
        for n, kind in enumerate(kinds)
    ]
    wanted = [expected(model, PROMPT, one, n) for n, one in enumerate(params)]
    with running(model, max_num_seqs=6) as engine:
        alone = []
        for one in params:
            asked = Asked(PROMPT, one)
            engine.submit([asked.request])
            alone.append(asked.token_ids())
        together = [Asked(PROMPT, one) for one in params]
        engine.submit([asked.request for asked in together])
        assert [asked.token_ids() for asked in together] == alone == wanted
        assert not engine._adjuster._asking
        assert len(engine._adjuster.counts.tables_RV) == 1, "tables are given back"
    plain = [expected(model, PROMPT, SamplingParams(STEPS, temperature), n) for n in range(len(params))]
    assert sum(one != other for one, other in zip(wanted, plain, strict=True)) >= 7, "most changes are seen"


def test_no_token_ends_an_answer_before_the_minimum() -> None:
    """Then the first that may does."""

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[EOS_ID], logits[40], logits[50] = 90.0, 80.0, 70.0
        return logits

    kinds: tuple[tuple[dict[str, Any], list[int]], ...] = (
        ({}, [40] * 5 + [EOS_ID]),
        ({"stop_token_ids": frozenset((40,))}, [50] * 5 + [EOS_ID]),
        ({"stop_token_ids": frozenset((40, 59, 63, 2**31 - 1))}, [50] * 5 + [EOS_ID]),
        ({"ignore_eos": True, "stop_token_ids": frozenset((40,))}, [EOS_ID] * 9),
        ({"logit_bias": ((EOS_ID, 100.0),)}, [40] * 5 + [EOS_ID]),
    )
    with running(FakeModel(rule, VOCAB)) as engine:
        for kind, wanted in kinds:
            asked = Asked([3], SamplingParams(9, temperature=0, min_tokens=5, **kind))
            engine.submit([asked.request])
            assert asked.token_ids() == wanted, kind


@pytest.mark.parametrize("repetition_penalty", [1e-45, 1e-300, 2.0])
def test_no_penalty_makes_a_logit_that_is_no_number(repetition_penalty: float) -> None:
    """A logit of 0 stays 0; the least of all penalties lifts what was seen above everything."""
    rule = torch.arange(VOCAB).float() / 4 - 2
    params = SamplingParams(3, temperature=0, repetition_penalty=repetition_penalty, logit_bias=((1, -100.0),))
    with running(FakeModel(lambda history: rule, VOCAB)) as engine:
        asked = Asked([8, 40], params)
        engine.submit([asked.request])
        assert asked.token_ids()[:1] == [40 if repetition_penalty < 1 else NUM_TOKENS - 1]


def test_log_probs_are_of_the_raw_logits() -> None:
    model = eager_to_end()
    params = SamplingParams(5, 0.0, num_logprobs=2, logit_bias=((17, 60.0),), repetition_penalty=1.5)
    with running(model) as engine:
        asked = Asked(PROMPT, params)
        engine.submit([asked.request])
        outputs = asked.all()
    history = list(PROMPT)
    for output in outputs:
        assert output.token is not None
        assert output.token.token_id == 17
        exact = model.rule(tuple(history))[:NUM_TOKENS].double().log_softmax(-1)
        # Logits are below 16, where float32 has steps of 2**-20; 16 of them for a sum of 60 terms.
        assert output.token.logprob == pytest.approx(float(exact[17]), abs=16 * 2**-20)
        assert [one for one, _ in output.token.top_logprobs] == exact.topk(2).indices.tolist()
        history.append(17)


def test_a_logit_that_is_not_finite_is_told_of_an_adjusted_row() -> None:
    def rule(history: tuple[int, ...]) -> torch.Tensor:
        return torch.full((VOCAB,), math.nan if history[0] == 9 else 0.0)

    params = SamplingParams(3, presence_penalty=1.0, seed=1)
    with running(FakeModel(rule, VOCAB)) as engine:
        broken, whole = Asked([9], params), Asked([8], params)
        engine.submit([broken.request, whole.request])
        assert broken.all()[-1].finish_reason is FinishReason.ERROR
        assert whole.all()[-1].finish_reason is FinishReason.LENGTH


def test_what_the_model_does_not_have_is_refused() -> None:
    adjuster = Adjuster(NUM_TOKENS, torch.device("cpu"), frozenset(range(200)))
    adjuster.check(SamplingParams(1, logit_bias=((NUM_TOKENS - 1, 1.0),)))
    with pytest.raises(RequestError, match="token id 60 is outside the vocabulary of 60") as caught:
        adjuster.check(SamplingParams(1, logit_bias=((NUM_TOKENS, 1.0),)))
    assert caught.value.param == "logit_bias"
    with pytest.raises(RequestError, match="200 end tokens"):
        adjuster.check(SamplingParams(1, min_tokens=1))


def asking(prompt_ids: list[int], **fields: Any) -> Request:
    return Request(prompt_ids, SamplingParams(9, **fields), lambda output: None)


def test_tables_count_what_is_drawn_and_are_given_back() -> None:
    """Read or not; a table that another request had before is empty again; tables that come later move nothing."""
    adjuster = Adjuster(12, torch.device("cpu"), frozenset())
    counts, requests = adjuster.counts, [asking([n, n, 11], presence_penalty=1.0) for n in range(5)]

    def step(asked: Sequence[Request], tokens: Sequence[int], num_unread: int = 0) -> None:
        adjusted = adjuster.rows_of(asked, [len(one.output_ids) + num_unread for one in asked])
        assert adjusted is not None
        adjusted.count_drawn(torch.tensor(tokens, dtype=torch.int32))

    for n, request in enumerate(requests):
        adjuster.add(request)
        request.output_ids += [n] * n  # it was sent back, and has read its answer again
        step([request], [10])
    step(requests, [7] * 5, num_unread=1)
    for request in requests:
        request.output_ids += [10, 7]
    step(requests[1:2], [11])
    requests[1].output_ids.append(11)
    for request in requests:
        table = [0] * 12
        for token_id in request.prompt_ids:
            table[token_id] = IN_PROMPT
        for token_id in request.output_ids:
            table[token_id] += 1
        assert counts.tables_RV[counts.table_of(request)].tolist() == table
    freed = counts.table_of(requests[2])
    adjuster.drop(requests[2])
    late = asking([6], presence_penalty=1.0)
    adjuster.add(late)
    step([late], [3])
    assert counts.table_of(late) == freed
    assert counts.tables_RV[freed].nonzero().flatten().tolist() == [3, 6]
    for request in (late, *requests):
        adjuster.drop(request)
        adjuster.drop(request)
    assert len(counts.tables_RV) == 1


def test_a_draw_that_came_to_nothing_is_not_counted() -> None:
    """Of a step that failed, or whose token nobody took: the request draws again behind the tokens that it has."""
    adjuster, request = Adjuster(12, torch.device("cpu"), frozenset()), asking([4], frequency_penalty=1.0)
    adjuster.add(request)
    for num_drawn, token_id in ((0, 5), (1, 6), (0, 7)):
        adjusted = adjuster.rows_of([request], [num_drawn])
        assert adjusted is not None
        adjusted.count_drawn(torch.tensor([token_id], dtype=torch.int32))
    table_V = adjuster.counts.tables_RV[adjuster.counts.table_of(request)]
    assert {n: int(table_V[n]) for n in table_V.nonzero().flatten().tolist()} == {4: IN_PROMPT, 7: 1}


def test_rows_that_only_pass_draw_nothing() -> None:
    """A prompt's rows before its last: there is no token to choose, and none to count."""
    adjuster, request = Adjuster(12, torch.device("cpu"), frozenset()), asking([4, 5], presence_penalty=1.0)
    adjuster.add(request)
    assert adjuster.rows_of([request, request], [0, 0], passing={0, 1}) is None
    found = adjuster.rows_of([request, request], [0, 0], passing={0})
    assert found is not None
    assert found.where_S.tolist() == [1]


def test_a_step_without_such_requests_prepares_nothing() -> None:
    adjuster = Adjuster(12, torch.device("cpu"), frozenset({1}))
    plain, waiting, biased = asking([1]), asking([1], min_tokens=2), asking([1], logit_bias=((3, 1.0),))
    adjuster.add(plain)
    assert not adjuster._asking
    for request in (waiting, biased):
        adjuster.add(request)
    assert adjuster.rows_of([plain]) is None
    found = adjuster.rows_of([plain, waiting, plain, biased])
    assert found is not None
    assert found.where_S.tolist() == [1, 3]
    assert found.rows.penalties is not None
    assert found.rows.penalties.table_T.tolist() == [-1, -1], "no table without penalties"
    waiting.output_ids += [5, 5]
    found = adjuster.rows_of([waiting, biased])
    assert found is not None
    assert found.where_S.tolist() == [1], "a minimum that is reached costs nothing"
    assert replace(waiting.params, min_tokens=0).adjusts is False
