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
from ownpath.engine.engine import Engine, EngineOverloaded, EngineStopped
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
from ownpath.server.mailbox import Mailbox
from ownpath.server.metrics import Metrics
from ownpath.server.prompts import Prompt

Outputs = Mailbox[tuple[int, StepOutput]]
"""Reports, each with the index of its choice."""


@dataclass(frozen=True)
class Delta:
    """One step's addition to one choice.

    parts: new parts of the answer, whole characters, of a stop string nothing unless it is asked for.
    token: the step's token, also when its text is not to be shown yet or at all.
    text_offset: characters of generated text before that token.
    prompt: the scored prompt, once, if it was asked for.
    finish_reason: "stop", "length" or "tool_calls" with the last delta of the choice.
    empty_content: with it, why the whole choice had no content; None if it had, or if no token was asked for.
    stop_reason: with it, the stop string, or the token of ``stop_token_ids``, that ended the choice; None for any other
        end.
    """

    index: int
    parts: tuple[AnswerPart, ...]
    token: ScoredToken | None
    text_offset: int
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
        self._begun = self._last_token = time.monotonic()
        self._watch = ContentWatch(answer)
        self.num_tokens = self.num_reasoning_tokens = 0
        self.is_finished = False

    def feed(self, output: StepOutput) -> Delta:
        """Turns one step's output into a delta. Errors: ApiError 500 when the engine could not go on."""
        if output.finish_reason is FinishReason.ERROR:
            self.is_finished = True
            self._metrics.count_finished("error")
            if output.non_finite is not None:
                self._metrics.count_corrupted()
            raise ApiError(500, output.error or "the generation failed", code=output.non_finite)
        offset = self._answer.num_chars
        parts: list[AnswerPart] = []
        if output.token is not None:
            self._time_token()
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
        self._watch.see(parts)
        empty = None
        if reason is not None:
            self.is_finished = True
            empty = self._empty_content(output)
            self._metrics.count_finished(reason, empty)
            self._metrics.request_latency.observe(time.monotonic() - self._begun)
        stopped_by = self._answer.stop_string or output.stop_token_id
        return Delta(self._index, tuple(parts), output.token, offset, output.prompt, reason, empty, stopped_by)

    def _is_marker(self, output: StepOutput) -> bool:
        """True for the model's end token: a marker, not text, unless it is asked for."""
        ends = output.finish_reason is FinishReason.STOP and output.stop_token_id is None
        return ends and not self._answer.shows_end_token

    def _time_token(self) -> None:
        now = time.monotonic()
        since_last, self._last_token = now - self._last_token, now
        times = self._metrics.time_per_output_token if self.num_tokens else self._metrics.time_to_first_token
        times.observe(since_last)
        self.num_tokens += 1
        self._metrics.count_token()

    def _empty_content(self, output: StepOutput) -> EmptyContent | None:
        if self.num_tokens == 0:
            return None  # the request only scores its prompt
        num_shown_tokens = self.num_tokens - self._is_marker(output)
        return self._watch.reason(num_shown_tokens, output.finish_reason is FinishReason.LENGTH)

    def abandon(self) -> None:
        """Ends the choice: nobody waits for the rest."""
        self.is_finished = True
        self._metrics.count_finished("abandoned")


class Generation:
    """Submitted requests and their answers. ``close`` must be called; more than once is fine.

    answers: as many for each prompt, to parse their outputs. mailbox: the server's. timeout_s: from now to the end of
    the last answer (504).
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[Prompt],
        answers: Sequence[Answer],
        metrics: Metrics,
        mailbox: Outputs,
        timeout_s: float,
    ) -> None:
        self.prompts = prompts
        self._metrics, self._timeout_s = metrics, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._engine = engine
        self._choices = [_ChoiceStream(index, answer, metrics) for index, answer in enumerate(answers)]
        self._requests: list[Request] = []
        self._mailbox = mailbox
        self._outputs: asyncio.Queue[tuple[int, StepOutput]] = asyncio.Queue()

    @property
    def num_choices(self) -> int:
        """Answers of all prompts."""
        return len(self._choices)

    def prompt_of(self, index: int) -> Prompt:
        """Returns the prompt that a choice answers."""
        return self.prompts[index * len(self.prompts) // len(self._choices)]

    def submit(self, params: Sequence[SamplingParams]) -> None:
        """Submits all answers to the engine, each with its parameters.

        Errors: ApiError 400 (does not fit), 429 (no room) or 503 (stopped).
        """
        loop = asyncio.get_running_loop()

        def request(index: int) -> Request:
            def sink(output: StepOutput) -> None:
                self._mailbox.put(loop, self._outputs, (index, output))

            return Request(self.prompt_of(index).ids, params[index], sink)

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
        self._metrics.count_prompt(sum(len(prompt.ids) for prompt in self.prompts))

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yields everything that is generated, as it comes; choices interleave. Errors: ApiError 500 or 504."""
        while not all(choice.is_finished for choice in self._choices):
            index, output = await self._next_output()
            if self._choices[index].is_finished:
                continue
            delta = self._choices[index].feed(output)
            if self._choices[index].is_finished and output.finish_reason is None:
                self._engine.abort(self._requests[index])
            yield delta

    async def _next_output(self) -> tuple[int, StepOutput]:
        left_s = self._deadline - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            # Not wait_for: before Python 3.12 it may lose the cancellation that ends an abandoned answer.
            async with asyncio.timeout(left_s):
                return await self._outputs.get()
        except TimeoutError:
            message = f"the answer was not ready within {self._timeout_s:g} seconds"
            raise ApiError(504, message, code="deadline_exceeded") from None

    def close(self) -> None:
        """Aborts the requests that still run."""
        for choice, request in zip(self._choices, self._requests, strict=False):
            if not choice.is_finished:
                self._engine.abort(request)
                choice.abandon()
        self._requests = []

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, without the markers around it and without calls in it."""
        return sum(choice.num_reasoning_tokens for choice in self._choices)

    def usage(self) -> dict[str, int]:
        """Counts tokens so far: of each prompt once, of every answer. EOS and the tokens of a stop string count: they
        were generated."""
        num_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        num_generated = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }
