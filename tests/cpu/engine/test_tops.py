"""The likeliest tokens of a step's rows: what they are, and that one pass serves all rows."""

import queue
from collections.abc import Callable

import pytest
import torch
from cpu.engine.fake_model import FakeModel, random_rule

from ownpath.config import EngineConfig
from ownpath.engine import tops
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, ScoredToken, StepOutput
from ownpath.engine.tops import PendingTops, read_tops, start_tops, top_tokens, with_own

VOCAB, WAIT_S = 64, 20.0


def test_each_row_gets_as_many_as_it_wants_by_the_raw_logits(device: torch.device) -> None:
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(3)).to(device)
    found = top_tokens(logits, {3: 5, 0: 20})
    assert list(found) == [3, 0]
    for row, count in ((3, 5), (0, 20)):
        exact = logits[row].double().log_softmax(-1).tolist()
        best = sorted(range(700), key=lambda token_id: -exact[token_id])[:count]
        assert [token_id for token_id, _ in found[row]] == best
        # Logits and sums are below 8, where float32 has steps of 2**-21: 16 of them for a sum of 700 terms.
        assert [value for _, value in found[row]] == pytest.approx([exact[i] for i in best], abs=16 * 2**-21)


def test_a_row_is_the_same_whatever_others_ask(device: torch.device) -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(4)).to(device)
    together = top_tokens(logits, dict.fromkeys(range(8), 20))
    assert all(top_tokens(logits, {row: 3})[row] == together[row][:3] for row in range(8))


def test_of_equal_tokens_the_lower_comes_first() -> None:
    logits = torch.zeros(1, 30)
    logits[0, [25, 3, 11]] = 5.0
    assert [token_id for token_id, _ in top_tokens(logits, {0: 3})[0]] == [3, 11, 25]


def test_a_small_vocabulary_has_no_more() -> None:
    assert len(top_tokens(torch.zeros(1, 4), {0: 20})[0]) == 4
    assert top_tokens(torch.full((1, 4), torch.nan), {}) == {}


def test_the_likeliest_tokens_agree_with_the_chosen_one() -> None:
    """A client may look the chosen token up among the likeliest: it finds the same number there."""
    top = ((4, -0.5), (7, -1.0), (1, -2.0))
    assert with_own(top, 7, -1.0000001) == ((4, -0.5), (7, -1.0000001), (1, -2.0))
    assert with_own(top, 9, -3.0) == top


def test_a_step_looks_at_its_logits_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of three requests in one step, then their answers; the one that asks for none is not looked at."""
    passes: list[list[int]] = []
    reads: list[PendingTops] = []

    def start(logits_RV: torch.Tensor, wanted: dict[int, int]) -> PendingTops:
        passes.append(list(wanted.values()))
        return start_tops(logits_RV, wanted)

    def read(pending: PendingTops) -> dict[int, tops.Top]:
        reads.append(pending)
        return read_tops(pending)

    monkeypatch.setattr(tops, "start_tops", start)
    monkeypatch.setattr(tops, "read_tops", read)
    numbers = (2, None, 20, 0, 5)
    found = answers_of(numbers)
    assert passes == [[2, 20, 5]] * 4
    assert len(reads) == 4
    for number, tokens in zip(numbers, found, strict=True):
        assert [len(token.top_logprobs) for token in tokens] == [number or 0] * 4
        assert all((token.logprob is None) == (number is None) for token in tokens)
        # Greedy: the likeliest is the chosen one, with the number that the sampler gives it.
        assert all(token.top_logprobs[0] == (token.token_id, token.logprob) for token in tokens if number)


def answers_of(numbers: tuple[int | None, ...]) -> list[list[ScoredToken]]:
    """Returns four greedy tokens of a request for each number of likeliest tokens; all run together."""
    model = FakeModel(random_rule(VOCAB), VOCAB)
    engine = Engine(model, EngineConfig.for_device("cpu", 256), VOCAB, end_token_ids=())
    heard: list[queue.SimpleQueue[StepOutput]] = [queue.SimpleQueue() for _ in numbers]
    sinks: list[Callable[[StepOutput], None]] = [one.put for one in heard]
    requests = [
        Request([2 + idx, 9], SamplingParams(4, temperature=0, num_logprobs=number), sink)
        for idx, (number, sink) in enumerate(zip(numbers, sinks, strict=True))
    ]
    engine.start()
    try:
        engine.submit(requests)
        return [[*tokens_of(one)] for one in heard]
    finally:
        engine.stop()


def tokens_of(heard: "queue.SimpleQueue[StepOutput]") -> list[ScoredToken]:
    tokens: list[ScoredToken] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        assert output.error is None
        if output.token is not None:
            tokens.append(output.token)
        if output.finish_reason is not None:
            assert output.finish_reason is FinishReason.LENGTH
            return tokens
