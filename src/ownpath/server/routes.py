"""The endpoints."""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.chat.answer import Answer
from ownpath.chat.effort import Release
from ownpath.chat.parse import AnswerParser
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer
from ownpath.engine.engine import Engine
from ownpath.server import chat, completions
from ownpath.server.body import Limits, read_json_object
from ownpath.server.errors import ApiError, shorten
from ownpath.server.generation import Generation
from ownpath.server.metrics import MEDIA_TYPE, Metrics
from ownpath.server.prompts import chat_prompt, completion_prompts, missing_marker
from ownpath.server.protocol import (
    ChatRequest,
    CompletionRequest,
    read_chat_request,
    read_completion_request,
)
from ownpath.server.sse import EventStream, JsonObject, until_disconnect


@dataclass(frozen=True)
class Api:
    """The objects behind every endpoint.

    created: when the model was loaded, in seconds since 1970.
    release: the release whose ``reasoning_effort`` words the model knows.
    """

    engine: Engine
    tokenizer: Tokenizer
    model_id: str
    created: int
    limits: Limits
    release: Release
    metrics: Metrics

    async def health(self, request: Request) -> Response:
        """``GET /health``: whether requests can still be run."""
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """``GET /metrics``: counters since the start."""
        return Response(self.metrics.render(), media_type=MEDIA_TYPE)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``"""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``"""
        self._check_model(request.path_params["model_id"])
        return JSONResponse(self._model())

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``"""
        asked = read_chat_request(await read_json_object(request, self.limits))
        self._check_model(asked.model)
        max_model_len = self.engine.config.max_model_len
        answer = self._chat_answer(asked)
        prompt = await chat_prompt(asked, self.tokenizer, max_model_len, self.release)
        generation = Generation(self.engine, [prompt], [answer], self.metrics)
        generation.submit(chat.sampling_params(asked, prompt, max_model_len))
        chunks = chat.chat_chunks(asked, generation, self.tokenizer, self.model_id)
        return await self._answer(request, asked, generation, chunks, chat.fold_chat)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``"""
        asked = read_completion_request(await read_json_object(request, self.limits))
        self._check_model(asked.model)
        max_model_len = self.engine.config.max_model_len
        prompts = await completion_prompts(asked, self.tokenizer, max_model_len, self.limits.max_prompts)
        answers = [Answer(self.tokenizer, asked.stop) for _ in prompts]
        generation = Generation(self.engine, prompts, answers, self.metrics)
        generation.submit(completions.sampling_params(asked, prompts, max_model_len))
        chunks = completions.completion_chunks(asked, generation, self.tokenizer, self.model_id)
        return await self._answer(request, asked, generation, chunks, completions.fold_completion)

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        generation: Generation,
        chunks: AsyncIterator[JsonObject],
        fold: Callable[[Iterable[JsonObject]], JsonObject],
    ) -> Response:
        """Answers with the chunks as a stream, or folded; either way the generation ends when the client goes."""
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return EventStream(_stream_events(chunks, wants_usage), generation.close)
        try:
            return JSONResponse(fold(await until_disconnect(request.receive, _collect(chunks))))
        finally:
            generation.close()

    def _chat_answer(self, asked: ChatRequest) -> Answer:
        """Makes the parser for the parts that the request allows. Errors: ApiError 400."""
        parser = AnswerParser(asked.thinks, offers_tools=bool(asked.functions))
        try:
            return Answer(self.tokenizer, asked.stop, parser)
        except MissingMarkerError as error:
            raise missing_marker(error) from None

    def _model(self) -> JsonObject:
        return {
            "id": self.model_id,
            "object": "model",
            "created": self.created,
            "owned_by": "ownpath",
            "max_model_len": self.engine.config.max_model_len,
        }

    def _check_model(self, model_id: str | None) -> None:
        if model_id is not None and model_id != self.model_id:
            message = f"there is no model {shorten(model_id)} here; this server has {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


async def _collect(events: AsyncIterator[JsonObject]) -> list[JsonObject]:
    return [event async for event in events]


async def _stream_events(events: AsyncIterator[JsonObject], wants_usage: bool) -> AsyncIterator[JsonObject]:
    """Yields the chunks as clients expect them: usage only if asked for, and then a null in every other chunk."""
    async for event in events:
        if not wants_usage and not event["choices"]:
            continue
        yield {**event, "usage": event.get("usage")} if wants_usage else event
