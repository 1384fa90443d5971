"""The endpoints."""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.chat.answer import Answer
from ownpath.chat.parse import AnswerParser
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer
from ownpath.engine.engine import Engine
from ownpath.server import chat, completions
from ownpath.server.body import Limits, read_json_object
from ownpath.server.errors import ApiError, shorten
from ownpath.server.excess import Adjustments
from ownpath.server.fingerprint import AnswerSource
from ownpath.server.generation import Generation
from ownpath.server.labels import LabelLog, Labels
from ownpath.server.metrics import MEDIA_TYPE, Metrics
from ownpath.server.policy import RequestPolicy
from ownpath.server.prompts import chat_prompt, completion_prompts, effort_level, missing_marker
from ownpath.server.protocol import (
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    read_chat_request,
    read_completion_request,
)
from ownpath.server.sse import EventStream, JsonObject, until_disconnect


@dataclass(frozen=True)
class Telling:
    """An answer on its way: its chunks, how they fold into one object, how usage is counted, and its headers."""

    chunks: AsyncIterator[JsonObject]
    fold: Callable[[Iterable[JsonObject]], JsonObject]
    usage: Callable[[Generation], JsonObject]
    headers: dict[str, str]

    async def events(self, options: StreamOptions | None, generation: Generation) -> AsyncIterator[JsonObject]:
        """Yields the chunks as clients expect them: usage only if asked for; in each chunk, or null but in the last."""
        wants_usage = options is not None and options.include_usage
        is_continuous = options is not None and options.continuous_usage_stats
        async for event in self.chunks:
            if not wants_usage and not event["choices"]:
                continue
            usage = event.get("usage") or (self.usage(generation) if is_continuous else None)
            yield {**event, "usage": usage} if wants_usage else event


@dataclass(frozen=True)
class Api:
    """The objects behind every endpoint.

    model_id: the first served name. created: when the model was loaded, in seconds since 1970.
    release: the release whose ``reasoning_effort`` words the model knows; a key of ``effort.RELEASES``.
    """

    engine: Engine
    tokenizer: Tokenizer
    model_id: str
    created: int
    limits: Limits
    release: str
    metrics: Metrics
    policy: RequestPolicy
    fingerprint: str
    label_log: LabelLog

    async def health(self, request: Request) -> Response:
        """``GET /health``: whether requests can still be run."""
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """``GET /metrics``: counters since the start."""
        return Response(self.metrics.render(), media_type=MEDIA_TYPE)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``"""
        served = (self.model_id, *self.policy.aliases)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in served]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``"""
        return JSONResponse(self._model(self._called(request.path_params["model_id"])))

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``"""
        labels, adjustments = Labels(self.policy.refuses_labels), Adjustments(self.policy.refuses_excess)
        asked = read_chat_request(await read_json_object(request, self.limits), labels)
        source = self._source(asked)
        max_model_len = self.engine.config.max_model_len
        answer = self._chat_answer(asked)
        prompt = await chat_prompt(asked, self.tokenizer, max_model_len, self.release)
        level = effort_level(asked, self.release)
        if asked.effort not in (None, "none", level):
            adjustments.values["reasoning_effort"] = level
        (max_tokens,) = adjustments.fit(*asked.wanted_tokens, [prompt], max_model_len)
        generation = Generation(self.engine, [prompt], [answer], self.metrics)
        generation.submit([chat.sampling_params(asked, max_tokens)])
        chunks = chat.chat_chunks(asked, generation, self.tokenizer, source, level)
        headers = self._headers(labels, adjustments)
        return await self._answer(request, asked, generation, Telling(chunks, chat.fold_chat, chat.chat_usage, headers))

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``"""
        labels, adjustments = Labels(self.policy.refuses_labels), Adjustments(self.policy.refuses_excess)
        asked = read_completion_request(await read_json_object(request, self.limits), labels)
        source = self._source(asked)
        max_model_len = self.engine.config.max_model_len
        prompts = await completion_prompts(asked, self.tokenizer, max_model_len, self.limits.max_prompts)
        answers = [Answer(self.tokenizer, asked.stop) for _ in prompts]
        limits = adjustments.fit(*asked.wanted_tokens, prompts, max_model_len)
        generation = Generation(self.engine, prompts, answers, self.metrics)
        generation.submit([completions.sampling_params(asked, max_tokens) for max_tokens in limits])
        chunks = completions.completion_chunks(asked, generation, self.tokenizer, source)
        told = Telling(chunks, completions.fold_completion, Generation.usage, self._headers(labels, adjustments))
        return await self._answer(request, asked, generation, told)

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, generation: Generation, telling: Telling
    ) -> Response:
        """Answers with the chunks as a stream, or folded; either way the generation ends when the client goes."""
        if asked.stream:
            events = telling.events(asked.stream_options, generation)
            return EventStream(events, generation.close, telling.headers)
        try:
            whole = telling.fold(await until_disconnect(request.receive, _collect(telling.chunks)))
            return JSONResponse(whole, headers=telling.headers)
        finally:
            generation.close()

    def _headers(self, labels: Labels, adjustments: Adjustments) -> dict[str, str]:
        """Returns the headers that say what was done differently, and logs the labels that are new."""
        self.label_log.tell(labels.names)
        return labels.headers() | adjustments.headers()

    def _chat_answer(self, asked: ChatRequest) -> Answer:
        """Makes the parser for the parts that the request allows. Errors: ApiError 400."""
        parser = AnswerParser(asked.thinks, offers_tools=bool(asked.functions))
        try:
            return Answer(self.tokenizer, asked.stop, parser, None if asked.parallel_tool_calls else 1)
        except MissingMarkerError as error:
            raise missing_marker(error) from None

    def _model(self, name: str) -> JsonObject:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "ownpath",
            "max_model_len": self.engine.config.max_model_len,
        }

    def _source(self, asked: ChatRequest | CompletionRequest) -> AnswerSource:
        """Returns who answers, under the name that was asked for. Errors: ApiError 404."""
        return AnswerSource(self._called(self.model_id if asked.model is None else asked.model), self.fingerprint)

    def _called(self, name: str) -> str:
        if name not in (self.model_id, *self.policy.aliases, *self.policy.paths):
            message = f"there is no model {shorten(name)} here; this server has {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name


async def _collect(events: AsyncIterator[JsonObject]) -> list[JsonObject]:
    return [event async for event in events]
