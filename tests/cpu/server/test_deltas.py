"""Reports of several steps become one delta: the answer is the same, however they are cut."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
from cpu.chat.small_tokenizer import THINK_END_ID
from cpu.server.harness import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from ownpath.chat.answer import Answer
from ownpath.chat.parse import AnswerParser
from ownpath.engine.request import FinishReason, Request, SamplingParams, ScoredToken, StepOutput
from ownpath.server.chat import message_delta
from ownpath.server.errors import ApiError
from ownpath.server.generation import Delta, Generation, Report, _ChoiceStream
from ownpath.server.mailbox import Mailbox
from ownpath.server.metrics import Metrics
from ownpath.server.prompts import Prompt

EOS_ID = 1
DSML_TEXT = "｜DSML｜"
CALL = (
    f'\n\n<{DSML_TEXT}tool_calls>\n<{DSML_TEXT}invoke name="f">\n<{DSML_TEXT}parameter name="a" string="true">x'
    f"</{DSML_TEXT}parameter>\n</{DSML_TEXT}invoke>\n</{DSML_TEXT}tool_calls>"
)


def ids_of(text: str) -> list[int]:
    """A DSML marker in the text is the token, not its letters."""
    ids: list[int] = []
    for at, piece in enumerate(text.split(DSML_TEXT)):
        ids += ([TOKENIZER.special_id(DSML_TEXT)] if at else []) + TOKENIZER.encode_text(piece)
    return ids


ANSWERS = {
    "text": ids_of("hello \u20ac world"),
    "reasoning": [*ids_of("I think"), THINK_END_ID, *ids_of("so be it")],
    "calls": [*ids_of("thought"), THINK_END_ID, *ids_of("see" + CALL)],
    "text behind calls": [THINK_END_ID, *ids_of(CALL + "and more")],
    "broken calls": [THINK_END_ID, *ids_of(CALL[:60] + "</" + DSML_TEXT + "b>")],
    "stopped": [THINK_END_ID, *ids_of("one stop two")],
    "cut": [THINK_END_ID, *ids_of("\u20ac")[:-1]],
    "empty": [],
}


def reports_of(ids: Sequence[int], end: FinishReason, scored: bool) -> list[Report]:
    tokens = [ScoredToken(idx, -0.5 - at if scored else None) for at, idx in enumerate([*ids, EOS_ID])]
    reports: list[Report] = [(0, StepOutput(token=token), float(at)) for at, token in enumerate(tokens)]
    if end is FinishReason.LENGTH and len(reports) > 1:
        reports.pop()
    index, output, told_at = reports[-1]
    return [*reports[:-1], (index, StepOutput(token=output.token, finish_reason=end), told_at)]


def told(reports: Sequence[Report], cuts: Sequence[int], stops: list[str], max_calls: int | None) -> dict[str, Any]:
    """Everything that the deltas of one choice say, added up."""
    metrics = Metrics()
    answer = Answer(TOKENIZER, stops, AnswerParser(thinks=True, offers_tools=True), max_calls)
    stream = _ChoiceStream(0, answer, metrics)
    edges = [0, *sorted({cut % len(reports) for cut in cuts} - {0}), len(reports)]
    deltas: list[Delta] = []
    for start, stop in itertools.pairwise(edges):
        if not stream.is_finished:
            deltas.append(stream.feed(reports[start:stop]))
    message = message_delta([part for delta in deltas for part in delta.parts])
    for call in message.get("tool_calls", []):
        call.pop("id", None)
    last = deltas[-1]
    return {
        "message": message,
        "kinds": {type(part) for delta in deltas for part in delta.parts},
        "tokens": [token for delta in deltas for token in delta.tokens],
        "offsets": [offset for delta in deltas for offset in delta.text_offsets],
        "end": (last.finish_reason, last.empty_content, last.stop_reason),
        "numbers": (stream.num_tokens, stream.num_reasoning_tokens, metrics._num_tokens),
        "times": (metrics.time_per_output_token.counts, metrics.time_per_output_token.total_s),
        "firsts": sum(metrics.time_to_first_token.counts),
    }


@given(
    name=st.sampled_from(sorted(ANSWERS)),
    end=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    scored=st.booleans(),
    stops=st.sampled_from([[], ["stop"], ["stop", "e s"]]),
    max_calls=st.sampled_from([None, 1]),
    cuts=st.lists(st.integers(0, 1000), max_size=4),
)
def test_the_answer_does_not_depend_on_how_reports_are_cut(
    name: str, end: FinishReason, scored: bool, stops: list[str], max_calls: int | None, cuts: list[int]
) -> None:
    reports = reports_of(ANSWERS[name], end, scored)
    one_by_one = told(reports, range(len(reports)), stops, max_calls)
    assert told(reports, cuts, stops, max_calls) == one_by_one
    assert len(one_by_one["offsets"]) == scored * one_by_one["numbers"][0]
    assert one_by_one["firsts"] == 1
    assert sum(one_by_one["times"][0]) == one_by_one["numbers"][0] - 1


class Submitted:
    """An engine that only takes requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.aborted: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests

    def abort(self, request: Request) -> None:
        self.aborted.append(request)


def generation_of(
    engine: Submitted,
    count: int,
    stops: Sequence[str] = (),
    timeout_s: float = 20.0,
    is_whole: bool = False,
    num_logprobs: int | None = None,
) -> Generation:
    prompts, answers = [Prompt([3], None)] * count, [Answer(TOKENIZER, stops) for _ in range(count)]
    mailbox = Mailbox[Report](asyncio.get_running_loop())
    found = Generation(engine, prompts, answers, Metrics(), mailbox, timeout_s, is_whole=is_whole)  # type: ignore[arg-type]
    found.submit([SamplingParams(99, num_logprobs=num_logprobs)] * count)
    return found


def test_what_has_come_together_is_one_delta_for_each_choice() -> None:
    async def deltas() -> list[Delta]:
        engine = Submitted()
        generation = generation_of(engine, 2)
        for idx in ids_of("abc"):
            for request in engine.requests:
                request.sink(StepOutput(token=ScoredToken(idx)))
        for request in engine.requests:
            request.sink(StepOutput(token=ScoredToken(EOS_ID), finish_reason=FinishReason.STOP))
        return [delta async for delta in generation.deltas()]

    found = asyncio.run(deltas())
    assert [(one.index, one.text, len(one.tokens), one.finish_reason) for one in found] == [
        (0, "abc", 4, "stop"),
        (1, "abc", 4, "stop"),
    ]


def test_tokens_behind_a_stop_string_are_not_told_and_the_request_ends() -> None:
    async def stopped() -> tuple[list[Delta], dict[str, int], Submitted]:
        engine = Submitted()
        generation = generation_of(engine, 1, ["b"])
        for idx in ids_of("abcde"):
            engine.requests[0].sink(StepOutput(token=ScoredToken(idx)))
        return [delta async for delta in generation.deltas()], generation.usage(), engine

    (delta,), usage, engine = asyncio.run(stopped())
    assert (delta.text, delta.stop_reason, delta.finish_reason) == ("a", "b", "stop")
    assert len(delta.tokens) == usage["completion_tokens"] == 2
    assert engine.aborted == engine.requests


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_stream_with_log_probs_has_a_delta_for_each_token(is_whole: bool) -> None:
    async def sizes() -> list[tuple[str, int]]:
        engine = Submitted()
        generation = generation_of(engine, 1, is_whole=is_whole, num_logprobs=0)
        for idx in ids_of("abc"):
            engine.requests[0].sink(StepOutput(token=ScoredToken(idx, -0.5)))
        end = StepOutput(token=ScoredToken(EOS_ID, -0.5), finish_reason=FinishReason.STOP)
        engine.requests[0].sink(end)
        return [(delta.text, len(delta.tokens)) async for delta in generation.deltas()]

    apart, together = [("a", 1), ("b", 1), ("c", 1), ("", 1)], [("abc", 4)]
    assert asyncio.run(sizes()) == (together if is_whole else apart)


@pytest.mark.parametrize(("stops", "is_read_at_once"), [((), False), (("stop",), True)])
def test_a_whole_answer_is_read_seldom_unless_its_text_may_end_it(stops: Sequence[str], is_read_at_once: bool) -> None:
    async def sizes() -> list[int]:
        engine = Submitted()
        generation = generation_of(engine, 1, stops, is_whole=True)
        found: list[int] = []

        async def read() -> None:
            async for delta in generation.deltas():
                found.append(len(delta.tokens))

        reader = asyncio.create_task(read())
        engine.requests[0].sink(StepOutput(token=ScoredToken(40)))
        await asyncio.sleep(0.02)
        assert bool(found) == is_read_at_once
        engine.requests[0].sink(StepOutput(token=ScoredToken(EOS_ID), finish_reason=FinishReason.STOP))
        await reader
        return found

    assert sum(asyncio.run(sizes())) == 2


def test_an_error_comes_behind_the_tokens_before_it() -> None:
    async def broken() -> None:
        engine = Submitted()
        generation = generation_of(engine, 1)
        for idx in ids_of("ab"):
            engine.requests[0].sink(StepOutput(token=ScoredToken(idx)))
        engine.requests[0].sink(StepOutput(finish_reason=FinishReason.ERROR, error="broke"))
        deltas = generation.deltas()
        assert (await anext(deltas)).text == "ab"
        with pytest.raises(ApiError, match="broke"):
            await anext(deltas)

    asyncio.run(broken())


def test_the_deadline_holds_from_the_start_and_while_tokens_come() -> None:
    async def late() -> ApiError:
        engine = Submitted()
        generation = generation_of(engine, 1, timeout_s=0.05)
        engine.requests[0].sink(StepOutput(token=ScoredToken(40)))

        async def read() -> None:
            async for _ in generation.deltas():
                await asyncio.sleep(0.005)
                engine.requests[0].sink(StepOutput(token=ScoredToken(40)))

        with pytest.raises(ApiError) as raised:
            await read()
        return raised.value

    begun = time.monotonic()
    found = asyncio.run(late())
    assert (found.status, found.code) == (504, "deadline_exceeded")
    assert 0.04 < time.monotonic() - begun < 5
