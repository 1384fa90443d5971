"""Carries the engine's outputs from its thread to the event loop, and turns tokens into text.

One ``Generation`` is everything that one HTTP request generates: one or several answers of one or several prompts, each
a choice with an index. The answers of a prompt follow one another.
Its ``deltas`` are the only source of both the streamed and the folded answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ownpath.chat.answer import Answer, content_of
from ownpath.chat.parts import AnswerPart
from ownpath.engine.engine import Engine, EngineStopped
from ownpath.engine.masks import Matcher
from ownpath.engine.places import EngineOverloaded
from ownpath.engine.request import (
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    ScoredToken,
    StepOutput,
)
from ownpath.server.empty_content import ContentWatch, EmptyContent
from ownpath.server.errors import ApiError, bad_request, overloaded, unavailable
from ownpath.server.mailbox import Inbox, Mailbox
from ownpath.server.metrics import Metrics
from ownpath.server.prompts import Prompt
from ownpath.server.sender import ANYBODY, Sender
from ownpath.server.timeline import Timeline

_PATIENCE = 64
"""Reports that are read together where nobody waits for single ones: some 0.1 ms of the event loop."""
Report = tuple[int, StepOutput, float]
"""A step's output with the index of its choice and the time when the engine told it, as ``time.monotonic``."""


@dataclass(frozen=True)
class Delta:
    """The addition of one or several steps to one choice.

    parts: new parts of the answer, whole characters, of a stop string nothing unless it is asked for.
    tokens: the steps' tokens, also those whose text is not to be shown yet or at all.
    text_offsets: characters of generated text before each of those tokens, if they have log-probabilities.
    prompt: the scored prompt, once, if it was asked for.
    finish_reason: "stop", "length" or "tool_calls" with the last delta of the choice.
    empty_content: with it, why the whole choice had no content; None if it had, or if no token was asked for.
    stop_reason: with it, the stop string, or the token of ``stop_token_ids``, that ended the choice; None for any other
        end.
    """

    index: int
    parts: tuple[AnswerPart, ...]
    tokens: tuple[ScoredToken, ...]
    text_offsets: tuple[int, ...]
    prompt: tuple[ScoredToken, ...]
    finish_reason: str | None
    empty_content: EmptyContent | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The new content."""
        return content_of(self.parts)


class _ChoiceStream:
    """Turns one choice's tokens into deltas."""

    def __init__(self, index: int, answer: Answer, metrics: Metrics) -> None:
        self._index, self._answer, self._metrics = index, answer, metrics
        self._watch = ContentWatch(answer)
        self.timeline = Timeline(time.monotonic())
        self.num_reasoning_tokens = 0
        self.request: Request | None = None
        """The engine's, once it is submitted."""

    @property
    def num_tokens(self) -> int:
        return self.timeline.num_tokens

    @property
    def is_finished(self) -> bool:
        return self.timeline.reason is not None

    def feed(self, reports: Sequence[Report]) -> Delta:
        """Turns reports into a delta; drops what comes after the end. Errors: ApiError 500 for the report of an error,
        which comes alone."""
        self._raise_error(reports[0][1])
        parts, num_told = self._feed_text(reports)
        offsets: list[int] = []
        prompt: tuple[ScoredToken, ...] = ()
        reason, output = None, reports[-1][1]
        for _, output, told_at in reports[num_told:]:
            if output.token is not None and output.token.logprob is not None:
                offsets.append(self._answer.num_chars)
            num_told += 1
            prompt += output.prompt
            reason = self._feed_one(output, told_at, parts)
            if reason is not None:
                break
        self._watch.see(parts)
        tokens = tuple([output.token for _, output, _ in reports[:num_told] if output.token is not None])
        empty = stopped_by = None
        if reason is not None:
            empty = self._finish(reason, output)
            stopped_by = self._answer.stop_string or output.stop_token_id
        return Delta(self._index, tuple(parts), tokens, tuple(offsets), prompt, reason, empty, stopped_by)

    def _raise_error(self, output: StepOutput) -> None:
        if output.error is not None:
            self._end("error")
            if output.non_finite is not None:
                self._metrics.count_corrupted()
            raise ApiError(500, output.error, code=output.non_finite)

    def _feed_text(self, reports: Sequence[Report]) -> tuple[list[AnswerPart], int]:
        """Feeds tokens that can only be more text, all at once. Returns the parts and how many reports these were."""
        if reports[-1][1].finish_reason is not None:
            reports = reports[:-1]
        ids = [
            output.token.token_id
            for _, output, _ in reports
            if output.token is not None and output.token.logprob is None and not output.prompt
        ]
        if len(reports) < 2 or len(ids) != len(reports) or not self._answer.is_text(ids):
            return [], 0
        self._time_tokens([told_at for _, _, told_at in reports])
        self.num_reasoning_tokens += len(ids) * self._answer.is_reasoning
        return self._answer.feed_text(ids), len(ids)

    def _feed_one(self, output: StepOutput, told_at: float, parts: list[AnswerPart]) -> str | None:
        """Feeds one report and adds to the parts. Returns the reason if the choice ends with it."""
        if output.token is not None:
            self._time_tokens([told_at])
        if output.token is not None and not self._is_marker(output):
            was_reasoning = self._answer.is_reasoning
            parts += self._answer.feed(output.token.token_id)
            self.num_reasoning_tokens += was_reasoning and self._answer.is_reasoning
        reason = output.finish_reason.value if output.finish_reason else None
        if self._answer.is_stopped or self._answer.has_all_calls:
            reason = FinishReason.STOP.value
        elif reason is not None:
            parts += self._answer.finish()
        if reason == FinishReason.STOP.value and self._answer.asks_for_tools:
            reason = "tool_calls"
        return reason

    def _is_marker(self, output: StepOutput) -> bool:
        """True for the model's end token: a marker, not text, unless it is asked for."""
        ends = output.finish_reason is FinishReason.STOP and output.stop_token_id is None
        return ends and not self._answer.shows_end_token

    def _finish(self, reason: str, output: StepOutput) -> EmptyContent | None:
        empty = self._empty_content(output)
        self._end(reason, empty)
        self._metrics.observe_answer(self.timeline)
        return empty

    def _end(self, reason: str, empty: EmptyContent | None = None) -> None:
        self.timeline.ended, self.timeline.reason = time.monotonic(), reason
        if self.request is not None:
            self.timeline.begun = self.request.begun_at
        self._metrics.count_finished(reason, empty)

    def _time_tokens(self, told_at: Sequence[float]) -> None:
        """Counts tokens. They are timed as the engine told them, so that reading several at once changes nothing."""
        line, times = self.timeline, told_at
        if line.last_token is None:
            line.first_token = line.last_token = told_at[0]
            self._metrics.time_to_first_token.observe(told_at[0] - line.arrived)
            times = told_at[1:]
        self._metrics.time_per_output_token.observe_between(line.last_token, times)
        line.last_token = told_at[-1]
        line.num_tokens += len(told_at)
        self._metrics.count_tokens(len(told_at))

    def _empty_content(self, output: StepOutput) -> EmptyContent | None:
        if self.num_tokens == 0:
            return None  # the request only scores its prompt
        num_shown_tokens = self.num_tokens - self._is_marker(output)
        return self._watch.reason(num_shown_tokens, output.finish_reason is FinishReason.LENGTH)

    def abandon(self) -> None:
        """Ends the choice: nobody waits for the rest."""
        self._end("abandoned")


class Generation:
    """Submitted requests and their answers. ``close`` must be called; more than once is fine.

    answers: as many for each prompt, to parse their outputs. mailbox: the server's. timeout_s: from now to the end of
    the last answer (504). is_whole: nobody reads the answers before they have ended.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[Prompt],
        answers: Sequence[Answer],
        metrics: Metrics,
        mailbox: Mailbox[Report],
        timeout_s: float,
        *,
        is_whole: bool = False,
    ) -> None:
        self.prompts = prompts
        self._metrics, self._timeout_s = metrics, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._engine = engine
        self._choices = [_ChoiceStream(index, answer, metrics) for index, answer in enumerate(answers)]
        self._requests: list[Request] = []
        self._mailbox = mailbox
        # An answer that its text may end has to be read as it comes.
        is_patient = is_whole and not any(answer.may_end_itself for answer in answers)
        self._inbox = Inbox[Report](_PATIENCE if is_patient else 1)
        self._is_whole, self._tells_apart = is_whole, False
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def num_choices(self) -> int:
        """Answers of all prompts."""
        return len(self._choices)

    def prompt_of(self, index: int) -> Prompt:
        """Returns the prompt that a choice answers."""
        return self.prompts[index * len(self.prompts) // len(self._choices)]

    def submit(
        self,
        params: Sequence[SamplingParams],
        matchers: Sequence[Matcher | None] | None = None,
        salt: str = "",
        sender: Sender = ANYBODY,
    ) -> None:
        """Submits all answers to the engine, each with its parameters and the grammar that it must fit. salt: of the
        prefix cache. sender: whose they are.

        Errors: ApiError 400 (does not fit), 429 (no room) or 503 (stopped).
        """
        put, inbox = self._mailbox.put, self._inbox

        def request(index: int) -> Request:
            def sink(output: StepOutput) -> None:
                put(inbox, (index, output, time.monotonic()), is_last=output.finish_reason is not None)

            matcher = None if matchers is None else matchers[index]
            ids = self.prompt_of(index).ids
            return Request(ids, params[index], sink, salt=salt, matcher=matcher, **sender._asdict())

        requests = [request(index) for index in range(self.num_choices)]
        try:
            self._engine.submit(requests)
        except RequestError as error:
            code = "context_length_exceeded" if error.param is None else "invalid_value"
            raise bad_request(str(error), error.param, code) from None
        except EngineOverloaded as error:
            raise overloaded(str(error)) from None
        except EngineStopped as error:
            raise unavailable(str(error)) from None
        self._requests = requests
        for choice, one in zip(self._choices, requests, strict=True):
            choice.request = one
        # Who reads a stream with log-probabilities ties each to the text beside it.
        self._tells_apart = not self._is_whole and any(one.num_logprobs is not None for one in params)
        left_s = self._deadline - time.monotonic()
        self._alarm = asyncio.get_running_loop().call_later(left_s, inbox.expire)
        self._metrics.count_prompt(sum(len(prompt.ids) for prompt in self.prompts))

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yields everything that is generated, as it comes; choices interleave. What of a choice has come together is
        one delta; in a stream with log-probabilities each token is. Errors: ApiError 500 or 504."""
        while not all(choice.is_finished for choice in self._choices):
            come = await self._next_reports()
            for reports in [[report] for report in come] if self._tells_apart else _by_choice(come):
                index = reports[0][0]
                choice = self._choices[index]
                if choice.is_finished:
                    continue
                delta = choice.feed(reports)
                if delta.finish_reason is not None and reports[-1][1].finish_reason is None:
                    self._engine.abort(self._requests[index])
                yield delta

    async def _next_reports(self) -> list[Report]:
        try:
            return await self._inbox.take()
        except TimeoutError:
            message = f"the answer was not ready within {self._timeout_s:g} seconds"
            raise ApiError(504, message, code="deadline_exceeded") from None

    def close(self) -> None:
        """Aborts the requests that still run."""
        if self._alarm is not None:
            self._alarm.cancel()
        for choice, request in zip(self._choices, self._requests, strict=False):
            if not choice.is_finished:
                self._engine.abort(request)
                choice.abandon()
        self._requests = []

    @property
    def timelines(self) -> list[Timeline]:
        """The times of each answer."""
        return [choice.timeline for choice in self._choices]

    @property
    def params(self) -> SamplingParams | None:
        """The first answer's parameters; None before it is submitted."""
        first = self._choices[0].request
        return None if first is None else first.params

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, without the markers around it and without calls in it."""
        return sum(choice.num_reasoning_tokens for choice in self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that the first answer of each did not compute: the prefix cache held them."""
        return sum(request.num_cached for request in self._requests[:: len(self._choices) // len(self.prompts)])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each prompt once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(choice.num_tokens for choice in self._choices)

    def usage(self) -> dict[str, object]:
        """Counts tokens so far: of each prompt once, of every answer. EOS and the tokens of a stop string count: they
        were generated."""
        num_prompt, num_generated = self.num_prompt_tokens, self.num_generated_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def _by_choice(reports: Sequence[Report]) -> list[list[Report]]:
    """Sorts reports by choice, in order; that of an error by itself, behind what came before it."""
    first = reports[0][0]
    if all(idx == first and output.error is None for idx, output, _ in reports):
        return [list(reports)]
    groups: dict[tuple[int, bool], list[Report]] = {}
    for report in reports:
        groups.setdefault((report[0], report[1].error is not None), []).append(report)
    return list(groups.values())
