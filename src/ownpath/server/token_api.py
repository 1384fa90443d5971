"""``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/version``, in vLLM's shapes.

The ids are those that a request with the same text or messages is computed from.
"""

import asyncio
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ownpath.chat.markers import BOS, EOS, Segment
from ownpath.chat.tokenizer import Tokenizer
from ownpath.server import fields
from ownpath.server.conversation import Strict
from ownpath.server.errors import bad_request
from ownpath.server.fields import FieldTable
from ownpath.server.json_shape import CONVERSATION, PROMPTS
from ownpath.server.json_text import to_json
from ownpath.server.labels import Labels
from ownpath.server.prompts import chat_ids, chat_segments, check_ids, text_ids
from ownpath.server.protocol import ChatRequest
from ownpath.server.reading import known_fields, read_conversation
from ownpath.server.routes import Api
from ownpath.server.validation import validate
from ownpath.server.value_forms import IDS_SCHEMA, MAX_ID
from ownpath.versions import versions

MAX_TEXT_CHARS = 2**20
"""Of a text or a conversation to tokenise: the tokenizer takes some 140 bytes for each, and no context bounds it."""
_INLINE_TOKENS = 1024
_MODEL = "a served name, or the path given to serve; another name is 404"
_TOKEN_STRS = "adds token_strs: each token as the vocabulary spells it"


class TokenizeTextRequest(Strict):
    """``POST /tokenize`` of a raw text, as ``/v1/completions`` reads it."""

    model: str | None = Field(None, description=_MODEL)
    prompt: str = Field(description="a text; special tokens spelled in it are recognised")
    add_special_tokens: bool = Field(True, description="BOS first, if tokenizer_config.json says so")
    return_token_strs: bool = Field(False, description=_TOKEN_STRS)


class TokenizeChatRequest(ChatRequest):
    """``POST /tokenize`` of a conversation: the body of a chat request, which makes the same prompt."""

    return_token_strs: bool = Field(False, description=_TOKEN_STRS)


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_ID for item in value):
        raise ValueError("must be a list of token ids")
    return value


_MAYBE_NONE = IDS_SCHEMA | {"minItems": 0}


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = Field(None, description=_MODEL)
    tokens: Annotated[list[int], BeforeValidator(_token_ids), WithJsonSchema(_MAYBE_NONE)] = Field(
        description="token ids; may be empty"
    )


_TEXT = FieldTable(TokenizeTextRequest.model_fields.keys(), {}, fields.TOKEN_LABELS)
_TOKENS = FieldTable(DetokenizeRequest.model_fields.keys(), {}, fields.TOKEN_LABELS)


def read_tokenize_request(body: dict[str, object], labels: Labels) -> TokenizeTextRequest | TokenizeChatRequest:
    """Validates either kind of request, and notes its labels. Errors: ApiError 400 naming the field."""
    given = [name for name in ("prompt", "messages") if body.get(name) is not None]
    if len(given) != 1:
        text = "prompt and messages contradict each other" if given else "prompt: Field required, or messages"
        raise bad_request(text, "prompt")
    if given == ["prompt"]:
        return validate(TokenizeTextRequest, known_fields(body, _TEXT, labels))
    return read_conversation(TokenizeChatRequest, body, labels)


def read_detokenize_request(body: dict[str, object], labels: Labels) -> DetokenizeRequest:
    """Validates the request, and notes its labels. Errors: ApiError 400 naming the field."""
    return validate(DetokenizeRequest, known_fields(body, _TOKENS, labels))


@dataclass(frozen=True)
class TokenApi:
    """The endpoints that ask nothing of the engine."""

    api: Api

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: the ids of a text or a conversation, also of one that the context has no room for."""
        api, labels = self.api, Labels(self.api.policy.refuses_labels)
        api.refuse_while_ending()

        def read(body: dict[str, object]) -> tuple[TokenizeTextRequest | TokenizeChatRequest, list[Segment]]:
            asked = read_tokenize_request(body, labels)
            return asked, chat_segments(asked, api.release) if isinstance(asked, TokenizeChatRequest) else []

        asked, segments = await api.bodies.read(request, CONVERSATION, read)
        api.called(asked.model)
        if isinstance(asked, TokenizeChatRequest):
            check_length(segments, "messages")
            ids = await chat_ids(segments, api.tokenizer)
        else:
            check_length([asked.prompt], "prompt")
            ids = await text_ids(asked.prompt, api.tokenizer, add_special=asked.add_special_tokens)
        names = await _names(ids, api.tokenizer) if asked.return_token_strs else None
        limit = api.engine.config.max_model_len
        answer = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}
        return await self._answer(answer, labels)

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``: the text of every token, special ones too; bytes of no character are U+FFFD."""
        api, labels = self.api, Labels(self.api.policy.refuses_labels)
        api.refuse_while_ending()
        asked = await api.bodies.read(request, PROMPTS, lambda body: read_detokenize_request(body, labels))
        api.called(asked.model)
        if asked.tokens:
            check_ids(asked.tokens, api.tokenizer, "tokens")
        is_long = len(asked.tokens) > _INLINE_TOKENS
        read = functools.partial(_text, asked.tokens, api.tokenizer)
        text = await asyncio.to_thread(read) if is_long else read()
        return await self._answer({"prompt": text}, labels)

    async def tokenizer_info(self, request: Request) -> Response:
        """``GET /tokenizer_info``: what a client needs to know that tokenises by asking the server. chat_template is
        null: prompts of chats are made here."""
        tokenizer = self.api.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": tokenizer.add_bos,
                "bos_token": BOS if tokenizer.has_special(BOS) else None,
                "eos_token": EOS,
                "chat_template": None,
                "model_max_length": self.api.engine.config.max_model_len,
                "vocab_size": tokenizer.num_tokens,
            }
        )

    async def version(self, request: Request) -> Response:
        """``GET /version``: ownpath's; of a source tree that is not installed "source"."""
        return JSONResponse({"version": versions().get("ownpath", "source")})

    async def _answer(self, answer: dict[str, object], labels: Labels) -> Response:
        self.api.label_log.tell(labels.names)
        return Response(await to_json(answer), headers=labels.headers(), media_type="application/json")


def check_length(texts: Iterable[Segment], param: str) -> None:
    """Refuses texts that are too long to be tokenised for their own sake. Errors: ApiError 400."""
    num_chars = sum(len(text) for text in texts if isinstance(text, str))
    if num_chars > MAX_TEXT_CHARS:
        raise bad_request(f"{param}: {num_chars} characters; at most {MAX_TEXT_CHARS} are tokenised at once", param)


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


async def _names(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    def named() -> list[str]:
        return [tokenizer.token_name(token_id) for token_id in ids]

    return await asyncio.to_thread(named) if len(ids) > _INLINE_TOKENS else named()
