"""Reads an answer from the engine as it comes, for the commands that print it."""

import queue
from collections.abc import Iterator, Sequence

from ownpath.chat.answer import Answer
from ownpath.chat.parts import AnswerPart
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput

Reports = queue.SimpleQueue[StepOutput | None]
"""The reports of a request. ``None``, which the engine never sends, ends the answer where it is."""


class GenerationFailed(RuntimeError):
    """The engine could not go on with the request."""


def answer_parts(
    engine: Engine, prompt_ids: Sequence[int], params: SamplingParams, answer: Answer, reports: Reports
) -> Iterator[tuple[StepOutput, list[AnswerPart]]]:
    """Runs a request and yields what each step reports, with the parts that ``answer`` makes of it.

    Errors: RequestError for one that cannot run here; GenerationFailed.
    """
    request = Request(list(prompt_ids), params, reports.put)
    engine.submit([request])
    while (output := reports.get()) is not None:
        if output.error is not None:
            raise GenerationFailed(output.error)
        parts: list[AnswerPart] = []
        if output.token is not None and output.finish_reason is not FinishReason.STOP:
            parts += answer.feed(output.token.token_id)
        if output.finish_reason is not None:
            parts += answer.finish()
        yield output, parts
        if output.finish_reason is not None:
            return
        if answer.is_stopped:
            break
    engine.abort(request)
