"""Answers that must fit a grammar, in the engine: no other token is ever drawn, beside whatever else runs."""

import math
import threading
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, FakeModel, random_rule
from cpu.engine.test_adjusted_logits import adjusted_by_hand
from cpu.engine.test_engine_engine import NUM_TOKENS, VOCAB, Asked, random_model, running
from support.matchers import Every, Script

from ownpath.engine.adjust import Adjuster
from ownpath.engine.request import FinishReason, Request, SamplingParams
from ownpath.engine.sampler import SampleRow, choose_tokens
from ownpath.model.batch import ForwardBatch

PROMPT = [3, 4, 5]


def bound(matcher: Any, prompt: list[int] | None = None, **params: Any) -> Asked:
    asked = Asked(prompt or PROMPT, SamplingParams(**({"max_tokens": 12, "temperature": 0.0} | params)))
    asked.request.matcher = matcher
    return asked


def expected(model: FakeModel, params: SamplingParams, every: Every, seed: int) -> list[int]:
    """Every step's logits, adjusted and barred by hand; a plain row then draws from what is left."""
    said: list[int] = []
    plain = SamplingParams(12, params.temperature, params.top_p)
    for place in range(params.max_tokens):
        x = torch.tensor(adjusted_by_hand(model.rule((*PROMPT, *said))[:NUM_TOKENS].tolist(), PROMPT, said, params))
        x[torch.arange(NUM_TOKENS) % every.number != place % every.number] = -3e38
        (token_id,) = choose_tokens(x.unsqueeze(0).clamp(min=-3e38), [SampleRow(plain, seed, place)]).token_ids
        assert token_id is not None
        said.append(token_id)
    return said


KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"logit_bias": ((7, 100.0), (12, 50.0), (EOS_ID, 90.0))},
    {"top_p": 0.7},
    {"num_logprobs": 2},
]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_masks_compose_with_every_change_of_logits(temperature: float) -> None:
    """Alone, and beside rows without a grammar, with penalties and without, which get what they get alone."""
    model = random_model()
    every = [Every(3 + n, NUM_TOKENS) for n in range(len(KINDS))]
    params = [SamplingParams(12, temperature, seed=n, ignore_eos=True, **kind) for n, kind in enumerate(KINDS)]
    # The end token ends a bound answer, even if it is to be ignored: these grammars have places for it.
    wanted = [expected(model, one, it, n) for n, (one, it) in enumerate(zip(params, every, strict=True))]
    wanted = [ids[: ids.index(EOS_ID) + 1] if EOS_ID in ids else ids for ids in wanted]
    with running(model, max_num_seqs=5) as engine:
        free_alone = [Asked(PROMPT, one) for one in params]
        for asked in free_alone:
            engine.submit([asked.request])
        alone = [asked.token_ids() for asked in free_alone]
        together = [Asked(PROMPT, one) for one in params for _ in range(2)]
        for number, asked in enumerate(together):
            asked.request.matcher = every[number // 2] if number % 2 else None
        engine.submit([asked.request for asked in together])
        found = [asked.token_ids() for asked in together]
        assert found[1::2] == wanted
        assert found[::2] == alone
        assert not engine._adjuster._asking


def test_log_probs_are_the_models_own() -> None:
    """Before the mask, as before every other change."""
    model = random_model()
    with running(model) as engine:
        asked = bound(Every(11, NUM_TOKENS), num_logprobs=2, max_tokens=4)
        engine.submit([asked.request])
        history = list(PROMPT)
        for output in asked.all():
            assert output.token is not None
            logits = model.rule(tuple(history))[:NUM_TOKENS].double()
            own = float(logits[output.token.token_id]) - math.log(float(logits.exp().sum()))
            # Sums of 60 terms in float32, below 32: some 16 steps of 2**-19.
            assert output.token.logprob == pytest.approx(own, abs=2**-15)
            assert [i for i, _ in output.token.top_logprobs] == logits.topk(2).indices.tolist()
            history.append(output.token.token_id)


def test_an_answer_ends_where_nothing_else_may_follow() -> None:
    """With an end token alone allowed it is drawn, whatever else is asked: it ends the answer."""
    model = FakeModel(random_rule(VOCAB), VOCAB)
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"ignore_eos": True},
        {"min_tokens": 9},
        {"logit_bias": ((EOS_ID, -100.0),)},
    )
    with running(model) as engine:
        for kind in kinds:
            asked = bound(Script([[7], [8, 9], [EOS_ID]]), **kind)
            engine.submit([asked.request])
            outputs = asked.all()
            assert [one.token.token_id for one in outputs if one.token][::2] == [7, EOS_ID]
            assert outputs[-1].finish_reason is FinishReason.STOP
            assert outputs[-1].stop_token_id is None


def test_end_tokens_wait_for_the_minimum_where_something_else_may_follow() -> None:
    def rule(history: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[EOS_ID] = 50.0
        return logits

    with running(FakeModel(rule, VOCAB)) as engine:
        asked = bound(Script([[7, EOS_ID]]), min_tokens=4)
        engine.submit([asked.request])
        assert asked.token_ids() == [7] * 4 + [EOS_ID]


def test_a_grammar_that_cannot_go_on_ends_its_answer_alone() -> None:
    model = random_model()
    with running(model) as engine:
        failing, other = bound(Script([[7]], fails_at=3)), bound(Every(4, NUM_TOKENS))
        plain = Asked(PROMPT, SamplingParams(12, temperature=0))
        engine.submit([failing.request, other.request, plain.request])
        outputs = failing.all()
        assert [one.token.token_id for one in outputs if one.token] == [7, 7, 7]
        assert (outputs[-1].finish_reason, outputs[-1].error) == (FinishReason.ERROR, "the grammar cannot go on")
        assert outputs[-1].non_finite is None
        assert len(other.token_ids()) == len(plain.token_ids()) == 12


def test_a_logit_that_is_not_finite_is_told_as_before() -> None:
    def rule(history: tuple[int, ...]) -> torch.Tensor:
        return torch.full((VOCAB,), math.nan if len(history) > 4 else 0.0)

    with running(FakeModel(rule, VOCAB)) as engine:
        asked = bound(Script([[7]]))
        engine.submit([asked.request])
        assert asked.all()[-1].non_finite == "non_finite_logits"


def test_masks_are_filled_while_the_forward_runs() -> None:
    """The forward waits for the mask here: had the mask waited for it, neither would end. A long prompt begins one
    only in its last step, and every mask knows all tokens before it."""
    filled = threading.Event()

    class Waiting(FakeModel):
        def forward(self, batch: ForwardBatch) -> torch.Tensor:
            if len(batch.logits_ids):
                assert filled.wait(10)
                filled.clear()
            return super().forward(batch)

    class Telling(Script):
        def fill(self, output_ids: Any, row_W: Any) -> None:
            super().fill(output_ids, row_W)
            filled.set()

    matcher = Telling([[7], [8], [9]])
    with running(Waiting(random_rule(VOCAB), VOCAB), max_prefill_tokens=4) as engine:
        asked = bound(matcher, prompt=[*range(2, 14)], max_tokens=3)
        engine.submit([asked.request])
        assert asked.token_ids() == [7, 8, 9]
    assert matcher.seen == [[], [7], [7, 8]]


def masks_of(adjuster: Adjuster, requests: list[Request | None]) -> list[list[int]]:
    rows = adjuster.rows_of(requests)
    assert rows is not None
    assert rows.mask_TW is not None
    masks: list[list[int]] = rows.mask_TW.tolist()
    return masks


def test_a_mask_serves_the_token_that_it_was_begun_for() -> None:
    """That of the token before, or of other rows, is filled anew; a row without a grammar may draw every token."""
    adjuster = Adjuster(64, torch.device("cpu"), frozenset())
    scripts = [Script([[1], [33]]) for _ in range(2)]
    first, second = (bound(script).request for script in scripts)
    free = Asked(PROMPT, SamplingParams(9, logit_bias=((3, 1.0),))).request
    for request in (first, second, free):
        adjuster.add(request)
    adjuster.start([first])
    assert masks_of(adjuster, [first]) == [[2, 0]]
    assert scripts[0].seen == [[]], "once"
    adjuster.start([first])
    first.output_ids.append(1)
    assert masks_of(adjuster, [first]) == [[0, 2]]
    adjuster.start([first])
    assert masks_of(adjuster, [None, second, None, free, first]) == [[2, 0], [-1, -1], [0, 2]]
    assert masks_of(adjuster, [free, first]) == [[-1, -1], [0, 2]]


def test_a_mask_that_nobody_waited_for_fails_no_later_step() -> None:
    class Failing(Script):
        def fill(self, output_ids: Any, row_W: Any) -> None:
            raise ValueError("no mask")

    adjuster, failing, sound = Adjuster(64, torch.device("cpu"), frozenset()), Failing([[1]]), Script([[1]])
    broken, whole = bound(failing).request, bound(sound).request
    for request in (broken, whole):
        adjuster.add(request)
    adjuster.start([broken])
    adjuster.start([whole])
    assert masks_of(adjuster, [whole]) == [[2, 0]]
    adjuster.start([broken])
    for _ in range(2):
        with pytest.raises(ValueError, match="no mask"):
            adjuster.rows_of([broken])
