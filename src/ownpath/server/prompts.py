"""Turns requests into prompts of token ids; refuses early what cannot fit. Long texts are tokenised off the event
loop."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ownpath.chat.detokenize import Detokenizer
from ownpath.chat.effort import RELEASES, Release
from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.levels import LEVEL_OF_WORD, level_for
from ownpath.chat.markers import Segment
from ownpath.chat.messages import ChatFormatError
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer, TokenizerError
from ownpath.server.counts import check_arguments
from ownpath.server.errors import ApiError, bad_request, shorten
from ownpath.server.protocol import ChatRequest, CompletionRequest

# Tokenising this much takes a millisecond or two; longer texts would hold up other requests.
_INLINE_CHARS = 4096


@dataclass(frozen=True)
class Prompt:
    """Token ids, and their text when the request had text."""

    ids: list[int]
    text: str | None = None

    def as_text(self, tokenizer: Tokenizer) -> str:
        """Returns the prompt as ``echo`` repeats it: the given text, or the text of every token."""
        if self.text is not None:
            return self.text
        detokenizer = Detokenizer(tokenizer, show_special=True)
        return "".join(detokenizer.feed(token_id) for token_id in self.ids)


def chat_segments(request: ChatRequest, release: Release) -> list[Segment]:
    """Writes the conversation in the model's format. Its work grows with the body, so it belongs where that is read.

    Errors: ApiError 400.
    """
    check_arguments(call.function.arguments for message in request.messages for call in message.tool_calls)
    try:
        return encode_messages([message.as_message() for message in request.messages], _setting(request, release))
    except ChatFormatError as error:
        raise bad_request(str(error), "messages") from None


async def chat_prompt(segments: Sequence[Segment], tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    """Turns a conversation's segments into tokens. Errors: ApiError 400."""
    num_chars = sum(len(segment) for segment in segments if isinstance(segment, str))
    _refuse_hopeless(num_chars, tokenizer, max_model_len, "messages")
    if len(segments) > max_model_len:  # each is a token or more
        raise _too_long(f"at least {len(segments)}", max_model_len, "messages")
    ids = await chat_ids(segments, tokenizer)
    _check_length(len(ids), max_model_len, "messages")
    return Prompt(ids)


async def chat_ids(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a conversation, however many. Errors: ApiError 400."""
    num_chars = sum(len(segment) for segment in segments if isinstance(segment, str))
    return await _tokenise(lambda: tokenizer.encode_segments(segments), num_chars, "messages")


async def text_ids(text: str, tokenizer: Tokenizer, *, add_special: bool) -> list[int]:
    """Returns the token ids of a raw text, however many. Errors: ApiError 400."""
    return await _tokenise(lambda: tokenizer.encode_raw(text, add_special=add_special), len(text), "prompt")


def effort_level(request: ChatRequest, release: Release) -> str | None:
    """Returns the level of effort that runs; None without thinking. Errors: ApiError 400 for a word that is none."""
    if request.effort not in (None, "none", *LEVEL_OF_WORD):
        known = ", ".join(("none", *LEVEL_OF_WORD))
        text = f"reasoning_effort: {shorten(request.effort)} is not a level: {known}"
        raise bad_request(text, "reasoning_effort", "unsupported_value")
    return level_for(request.effort, release.name) if request.thinks else None


def _setting(request: ChatRequest, release: Release) -> Setting:
    """Reads the options of the conversation. Errors: ApiError 400."""
    level = effort_level(request, release)
    text = "" if level is None else RELEASES[release.name][level]
    schema = None if request.response_format is None else request.response_format.schema_for_model()
    return Setting(request.thinks, text, request.functions, schema, request.ending)


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer, max_model_len: int) -> list[Prompt]:
    """Encodes every prompt of the request; raw text may contain special tokens. Errors: ApiError 400."""
    prompts = []
    for given in request.prompt:
        if isinstance(given, str):
            prompts.append(await _text_prompt(given, tokenizer, max_model_len))
        else:
            prompts.append(_ids_prompt(given, tokenizer, max_model_len))
        await asyncio.sleep(0)  # other requests have their turn between two prompts of one body
    return prompts


async def _text_prompt(text: str, tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    _refuse_hopeless(len(text), tokenizer, max_model_len, "prompt")
    ids = await _tokenise(lambda: tokenizer.encode_raw(text), len(text), "prompt")
    if not ids:
        raise bad_request("prompt: an empty text has no tokens to continue", "prompt")
    _check_length(len(ids), max_model_len, "prompt")
    return Prompt(ids, text)


def _ids_prompt(ids: list[int], tokenizer: Tokenizer, max_model_len: int) -> Prompt:
    _check_length(len(ids), max_model_len, "prompt")
    check_ids(ids, tokenizer, "prompt")
    return Prompt(ids)


def check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    """Refuses ids that are no token's; ``ids`` must be some. Errors: ApiError 400."""
    if max(ids) >= tokenizer.num_tokens:
        raise bad_request(f"{param}: token id {max(ids)} is not below {tokenizer.num_tokens}", param)


async def _tokenise(encode: Callable[[], list[int]], num_chars: int, param: str) -> list[int]:
    """Returns the tokens of a text; those of a long one are found off the event loop. Errors: ApiError 400."""
    try:
        return encode() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(encode)
    except MissingMarkerError as error:
        raise missing_marker(error) from None
    except TokenizerError as error:
        raise bad_request(f"{param}: {error}", param) from None


def missing_marker(error: MissingMarkerError) -> ApiError:
    """Makes the error for a request that needs a token that this model does not have."""
    return bad_request(f"this model's tokenizer has no token {error.marker!r}, which this request needs", "messages")


def _refuse_hopeless(num_chars: int, tokenizer: Tokenizer, max_model_len: int, param: str) -> None:
    """Refuses a text that is too long however well it compresses, before it is tokenised."""
    least = -(-num_chars // tokenizer.max_token_bytes)
    if least > max_model_len:
        raise _too_long(f"at least {least}", max_model_len, param)


def _check_length(num_tokens: int, max_model_len: int, param: str) -> None:
    """Refuses a prompt longer than the context. One that fills it exactly can still be scored."""
    if num_tokens > max_model_len:
        raise _too_long(str(num_tokens), max_model_len, param)


def _too_long(num_tokens: str, max_model_len: int, param: str) -> ApiError:
    message = f"{param}: {num_tokens} prompt tokens exceed the maximum context of {max_model_len} tokens"
    return bad_request(message, param, "context_length_exceeded")
