"""The endpoints."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.chat.answer import Answer
from ownpath.chat.effort import Release
from ownpath.chat.markers import Segment
from ownpath.chat.parse import AnswerParser
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer
from ownpath.engine.engine import Engine
from ownpath.server import chat, completions
from ownpath.server.answer_grammars import AnswerGrammar, chat_grammar, text_grammar
from ownpath.server.body import BodyReader
from ownpath.server.cache_salt import salt_of
from ownpath.server.counts import check_repeated
from ownpath.server.errors import ApiError, shorten, unavailable
from ownpath.server.excess import Adjustments
from ownpath.server.fingerprint import AnswerSource
from ownpath.server.generation import Generation, Report
from ownpath.server.grammar_desk import GrammarDesk
from ownpath.server.json_shape import CONVERSATION, PROMPTS
from ownpath.server.json_text import to_json
from ownpath.server.labels import LabelLog, Labels
from ownpath.server.mailbox import Mailroom
from ownpath.server.metrics import MEDIA_TYPE, Metrics
from ownpath.server.policy import RequestPolicy
from ownpath.server.prompt_scores import check_scores
from ownpath.server.prompts import chat_prompt, chat_segments, completion_prompts, effort_level, missing_marker
from ownpath.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from ownpath.server.reading import read_chat_request, read_completion_request
from ownpath.server.sender import sender_of
from ownpath.server.sse import EventStream, JsonObject, until_disconnect
from ownpath.server.traces import note_generation
from ownpath.server.vitals import Vitals

Fold = chat.ChatFold | completions.CompletionFold


@dataclass(frozen=True)
class WrittenChat:
    """A conversation that is to be answered. segments: it in the model's format. grammar: what the answer must fit."""

    asked: ChatRequest
    segments: Sequence[Segment]
    grammar: AnswerGrammar | None


@dataclass(frozen=True)
class Telling:
    """An answer on its way: its chunks, how they fold into one object, how usage is counted, and its headers."""

    chunks: AsyncIterator[JsonObject]
    fold: Fold
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

    async def fold_all(self) -> None:
        """Folds the chunks as they come."""
        async for chunk in self.chunks:
            self.fold.add(chunk)


@dataclass(frozen=True)
class Api:
    """The objects behind every endpoint.

    model_id: the first served name. created: when the model was loaded, in seconds since 1970.
    release: the release whose ``reasoning_effort`` words the model knows.
    request_timeout_s: from a request's prompt to the end of its answer.
    """

    vitals: Vitals
    tokenizer: Tokenizer
    model_id: str
    created: int
    bodies: BodyReader
    release: Release
    metrics: Metrics
    request_timeout_s: float
    policy: RequestPolicy
    fingerprint: str
    label_log: LabelLog
    grammars: GrammarDesk
    mailroom: Mailroom[Report] = field(default_factory=Mailroom[Report])

    @property
    def engine(self) -> Engine:
        """The engine that answers."""
        return self.vitals.engine

    async def health(self, request: Request) -> Response:
        """``GET /health``: whether requests can still be run."""
        return _status(self.vitals.health())

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: whether requests should be sent here: the model passed its self-test, no end is near."""
        return _status(self.vitals.readiness())

    async def prometheus(self, request: Request) -> Response:
        """``GET /metrics``: counters and durations since the start."""
        return Response(self.metrics.render(self.engine.load()), media_type=MEDIA_TYPE)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``"""
        served = (self.model_id, *self.policy.aliases)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in served]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``"""
        return JSONResponse(self._model(self.called(request.path_params["model_id"])))

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``"""
        self.refuse_while_ending()
        labels, adjustments = Labels(self.policy.refuses_labels), Adjustments(self.policy.refuses_excess)

        def read(body: dict[str, object]) -> WrittenChat:
            return self.write_chat(read_chat_request(body, labels))

        written = await self.bodies.read(request, CONVERSATION, read)
        asked = written.asked
        source = self.source(asked)
        generation, level = await self.begin_chat(request, written, adjustments)
        chunks = chat.chat_chunks(asked, generation, self.tokenizer, source, level)
        headers = self.headers_for(labels, adjustments)
        return await self._answer(
            request, asked, generation, Telling(chunks, chat.ChatFold(), chat.chat_usage, headers)
        )

    def write_chat(self, asked: ChatRequest) -> WrittenChat:
        """Makes what an answer needs of its request. Its work grows with the body: for where that is read.

        Errors: ApiError 400.
        """
        return WrittenChat(asked, chat_segments(asked, self.release), chat_grammar(asked, self.tokenizer))

    async def begin_chat(
        self, request: Request, written: WrittenChat, adjustments: Adjustments
    ) -> tuple[Generation, str | None]:
        """Submits the answers to a conversation. Returns them with the level of effort that runs; None without
        thinking. Errors: ApiError 400, 429 or 503."""
        asked, segments, grammar = written.asked, written.segments, written.grammar
        max_model_len = self.engine.config.max_model_len
        answers = [self._chat_answer(asked) for _ in range(asked.n)]
        prompt = await chat_prompt(segments, self.tokenizer, max_model_len)
        level = effort_level(asked, self.release)
        if asked.effort not in (None, "none", level):
            adjustments.values["reasoning_effort"] = level
        check_scores("prompt_logprobs", asked.prompt_logprobs, len(prompt.ids))
        (max_tokens,) = adjustments.fit(*asked.wanted_tokens, [prompt], max_model_len)
        matchers = await self.grammars.matchers(grammar, asked.n, asked.ignore_eos)
        mailbox = self.mailroom.mailbox()
        generation = Generation(
            self.engine, [prompt], answers, self.metrics, mailbox, self.request_timeout_s, is_whole=not asked.stream
        )
        sender = sender_of(request, asked.priority)
        generation.submit(chat.sampling_params(asked, max_tokens), matchers, self._salt(request, asked), sender)
        note_generation(request.scope, self.called(asked.model), generation)
        return generation, level

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``"""
        self.refuse_while_ending()
        labels, adjustments = Labels(self.policy.refuses_labels), Adjustments(self.policy.refuses_excess)

        def read(body: dict[str, object]) -> tuple[CompletionRequest, AnswerGrammar | None]:
            asked = read_completion_request(body, labels)
            return asked, text_grammar(asked)

        asked, grammar = await self.bodies.read(request, PROMPTS, read)
        source = self.source(asked)
        max_model_len = self.engine.config.max_model_len
        prompts = await completion_prompts(asked, self.tokenizer, max_model_len)
        if asked.repeats_prompts:
            check_repeated(asked.n, sum(len(prompt.ids) for prompt in prompts))
        num_repeated = asked.n * sum(len(prompt.ids) for prompt in prompts)
        check_scores("logprobs", asked.num_echoed_logprobs, num_repeated)
        check_scores("prompt_logprobs", asked.prompt_logprobs, num_repeated)
        answers = [
            Answer(self.tokenizer, asked.stop, min_tokens=asked.min_tokens, shown=asked.shown)
            for _ in range(asked.n * len(prompts))
        ]
        limits = adjustments.fit(*asked.wanted_tokens, prompts, max_model_len)
        matchers = await self.grammars.matchers(grammar, len(answers), asked.ignore_eos)
        mailbox = self.mailroom.mailbox()
        generation = Generation(
            self.engine, prompts, answers, self.metrics, mailbox, self.request_timeout_s, is_whole=not asked.stream
        )
        sender = sender_of(request, asked.priority)
        generation.submit(completions.sampling_params(asked, limits), matchers, self._salt(request, asked), sender)
        note_generation(request.scope, self.called(asked.model), generation)
        chunks = completions.completion_chunks(asked, generation, self.tokenizer, source)
        told = Telling(chunks, completions.CompletionFold(), Generation.usage, self.headers_for(labels, adjustments))
        return await self._answer(request, asked, generation, told)

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, generation: Generation, telling: Telling
    ) -> Response:
        """Answers with the chunks as a stream, or folded; either way the generation ends when the client goes."""
        if asked.stream:
            events = telling.events(asked.stream_options, generation)
            return EventStream(events, generation.close, telling.headers)
        try:
            await until_disconnect(request.receive, telling.fold_all())
            return Response(await to_json(telling.fold.whole()), headers=telling.headers, media_type="application/json")
        finally:
            generation.close()

    def headers_for(self, labels: Labels, adjustments: Adjustments) -> dict[str, str]:
        """Returns the headers that say what was done differently, and logs the labels that are new."""
        self.label_log.tell(labels.names)
        return labels.headers() | adjustments.headers()

    def _chat_answer(self, asked: ChatRequest) -> Answer:
        """Makes the parser for the parts that the request allows. Errors: ApiError 400."""
        parser = AnswerParser(asked.opens_reasoning, offers_tools=bool(asked.functions))
        try:
            max_calls = None if asked.parallel_tool_calls else 1
            return Answer(self.tokenizer, asked.stop, parser, max_calls, asked.min_tokens, asked.shown)
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

    def refuse_while_ending(self) -> None:
        """Refuses new work while the server ends. Errors: ApiError 503."""
        if self.vitals.is_draining:
            raise unavailable("the server is shutting down")

    def _salt(self, request: Request, asked: ChatRequest | CompletionRequest) -> str:
        return salt_of(request, asked.cache_salt, is_per_key=self.policy.salts_by_key)

    def source(self, asked: ChatRequest | CompletionRequest) -> AnswerSource:
        """Returns who answers, under the name that was asked for. Errors: ApiError 404."""
        return AnswerSource(self.called(asked.model), self.fingerprint)

    def called(self, name: str | None) -> str:
        """Returns the name that the model was called by; None: its first. Errors: ApiError 404 for another's."""
        if name is None:
            return self.model_id
        if name not in (self.model_id, *self.policy.aliases) and not self.policy.is_path(name):
            message = f"there is no model {shorten(name)} here; this server has {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name


def _status(problem: str | None) -> Response:
    return JSONResponse({"status": problem or "ok"}, 200 if problem is None else 503)
