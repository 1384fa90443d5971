"""``/v1/responses`` and ``/v1/messages``: each request is a chat request in other words, and is answered as one."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ownpath.server.errors import ApiError
from ownpath.server.excess import Adjustments
from ownpath.server.generation import Generation
from ownpath.server.json_shape import CONVERSATION
from ownpath.server.json_text import to_json
from ownpath.server.labels import Labels
from ownpath.server.messages.events import PING, PING_EVERY_S, MessageWriter
from ownpath.server.messages.request import AskedMessage, read_count_request, read_messages_request
from ownpath.server.prompts import chat_ids
from ownpath.server.renaming import renaming
from ownpath.server.responses.events import ResponseWriter
from ownpath.server.responses.request import AskedResponse, read_responses_request
from ownpath.server.routes import Api, WrittenChat
from ownpath.server.sse import EventStream, JsonObject, until_disconnect, with_pings
from ownpath.server.token_api import check_length
from ownpath.server.token_naming import TokenNaming

AskedOther = TypeVar("AskedOther", AskedResponse, AskedMessage)
BodyRead = Callable[[dict[str, object], Labels], AskedOther]


class AnswerWriter(Protocol):
    """An answer as events, and the events of its failure."""

    def events(self) -> AsyncIterator[JsonObject]:
        """Yields the events. Errors: ApiError."""
        ...

    def failure(self, error: ApiError) -> Iterator[JsonObject]:
        """Yields what tells the failure."""
        ...


@dataclass(frozen=True)
class AgentApi:
    """The endpoints that agents use."""

    api: Api

    async def responses(self, request: Request) -> Response:
        """``POST /v1/responses``"""
        api, labels = self.api, Labels(self.api.policy.refuses_labels)
        asked, written = await self._read(request, labels, read_responses_request)
        source, adjustments = api.source(asked.chat), Adjustments(api.policy.refuses_excess)
        with renaming(asked.names):
            generation, _ = await api.begin_chat(request, written, adjustments)
        headers = api.headers_for(labels, adjustments.renamed(asked.names))
        writer = ResponseWriter(asked, generation, source, TokenNaming(api.tokenizer, by_id=False))
        if asked.own.stream:
            return EventStream(_events_to_the_end(writer), generation.close, headers, are_named=True)
        await _write_all(request, writer, generation)
        return Response(await to_json(writer.response), headers=headers, media_type="application/json")

    async def messages(self, request: Request) -> Response:
        """``POST /v1/messages``"""
        labels, adjustments = Labels(self.api.policy.refuses_labels), Adjustments(self.api.policy.refuses_excess)
        asked, written = await self._read(request, labels, read_messages_request)
        api, source = self.api, self.api.source(asked.chat)
        with renaming(asked.names):
            generation, _ = await api.begin_chat(request, written, adjustments)
        headers = api.headers_for(labels, adjustments.renamed(asked.names))
        writer = MessageWriter(
            source.model_id,
            generation,
            omits_reasoning=asked.omits_reasoning,
            fills_context="max_tokens" in adjustments.values,
            manages=asked.own.context_management is not None,
        )
        if asked.own.stream:
            events = with_pings(_events_to_the_end(writer), PING, PING_EVERY_S)
            return EventStream(events, generation.close, headers, are_named=True)
        await _write_all(request, writer, generation)
        return Response(await to_json(writer.message), headers=headers, media_type="application/json")

    async def count_tokens(self, request: Request) -> Response:
        """``POST /v1/messages/count_tokens``: also of a conversation that the context has no room for."""
        return await self._count(request, read_count_request, {})

    async def input_tokens(self, request: Request) -> Response:
        """``POST /v1/responses/input_tokens``: likewise."""
        return await self._count(request, read_responses_request, {"object": "response.input_tokens"})

    async def _count(self, request: Request, read_body: BodyRead[AskedOther], answer: JsonObject) -> Response:
        labels = Labels(self.api.policy.refuses_labels)
        asked, written = await self._read(request, labels, read_body)
        self.api.called(asked.chat.model)
        with renaming(asked.names):
            check_length(written.segments, "messages")
            ids = await chat_ids(written.segments, self.api.tokenizer)
        headers = self.api.headers_for(labels, Adjustments())
        body = await to_json(answer | {"input_tokens": len(ids)})
        return Response(body, headers=headers, media_type="application/json")

    async def _read(
        self, request: Request, labels: Labels, read_body: BodyRead[AskedOther]
    ) -> tuple[AskedOther, WrittenChat]:
        """Reads a request and writes its prompt. Errors: ApiError."""
        self.api.refuse_while_ending()

        def read(body: dict[str, object]) -> tuple[AskedOther, WrittenChat]:
            asked = read_body(body, labels)
            with renaming(asked.names):
                return asked, self.api.write_chat(asked.chat)

        return await self.api.bodies.read(request, CONVERSATION, read)


async def _events_to_the_end(writer: AnswerWriter) -> AsyncIterator[JsonObject]:
    """Yields the events; a failure is some of them."""
    try:
        async for event in writer.events():
            yield event
    except ApiError as error:
        for event in writer.failure(error):
            yield event


async def _write_all(request: Request, writer: AnswerWriter, generation: Generation) -> None:
    """Writes the answer in one piece; the generation ends when the client goes."""

    async def write() -> None:
        async for _ in writer.events():
            pass

    try:
        await until_disconnect(request.receive, write())
    finally:
        generation.close()
