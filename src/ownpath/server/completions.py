"""``/v1/completions``: one generator of chunks over all prompts; the answer in one piece is those chunks folded."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from ownpath.chat.detokenize import Detokenizer
from ownpath.chat.tokenizer import Tokenizer
from ownpath.engine.request import SamplingParams, ScoredToken
from ownpath.server.fingerprint import AnswerSource
from ownpath.server.generation import Delta, Generation
from ownpath.server.prompt_scores import prompt_entries
from ownpath.server.prompts import Prompt
from ownpath.server.protocol import CompletionRequest
from ownpath.server.sse import JsonObject
from ownpath.server.token_naming import TokenNaming

_INLINE_TOKENS = 64
_MARKS = ("prompt_logprobs", "empty_content", "stop_reason")
"""Said once, with the chunk that brings them."""
_LOGPROB_KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def sampling_params(request: CompletionRequest, limits: Sequence[int]) -> list[SamplingParams]:
    """Builds the parameters of all answers. limits: each prompt's ``max_tokens`` once it is fitted to the context."""
    asked = [num for num in (request.num_echoed_logprobs, request.prompt_logprobs) if num is not None]
    num_scored = max(asked, default=None)
    each = range(request.n)
    return [request.sampling(limit, request.logprobs, num_scored, answer) for limit in limits for answer in each]


async def completion_chunks(
    request: CompletionRequest, generation: Generation, tokenizer: Tokenizer, source: AnswerSource
) -> AsyncIterator[JsonObject]:
    """Yields the answer as ``text_completion`` objects; the last one has the usage and no choices."""
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": source.model_id,
        "system_fingerprint": source.fingerprint,
    }
    writers: list[_ChoiceWriter] = []
    for prompt in generation.prompts:
        echo_text = await _echo_text(prompt, tokenizer) if request.echo else ""
        writers += [_ChoiceWriter(request, prompt, echo_text, tokenizer) for _ in range(request.n)]
    async for delta in generation.deltas():
        write = writers[delta.index].write
        # Many scored tokens are written off the event loop: up to 21 names for each of them.
        num_scored = len(delta.prompt) + len(delta.text_offsets)
        choice = write(delta) if num_scored <= _INLINE_TOKENS else await asyncio.to_thread(write, delta)
        if choice is not None:
            yield {**head, "choices": [choice]}
    yield {**head, "choices": [], "usage": generation.usage()}


async def _echo_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """Returns the text that ``echo`` repeats; that of many token ids is written off the event loop."""
    is_long = prompt.text is None and len(prompt.ids) > _INLINE_TOKENS
    return await asyncio.to_thread(prompt.as_text, tokenizer) if is_long else prompt.as_text(tokenizer)


class CompletionFold:
    """Folds the chunks of one answer into one ``text_completion`` object with every choice whole. Each chunk costs the
    same, however many."""

    def __init__(self) -> None:
        self._answer: JsonObject = {}
        self._choices: dict[int, JsonObject] = {}
        # Pieces of each choice's text, joined at the end: adding to a string copies it.
        self._texts: dict[int, list[str]] = {}

    def add(self, chunk: JsonObject) -> None:
        """Takes the next chunk."""
        self._answer |= chunk
        for part in chunk["choices"]:
            self._texts.setdefault(part["index"], []).append(part["text"])
            if part["index"] not in self._choices:
                self._choices[part["index"]] = part
            else:
                _extend(self._choices[part["index"]], part)

    def whole(self) -> JsonObject:
        """Returns the answer."""
        choices = [self._choices[index] | {"text": "".join(self._texts[index])} for index in sorted(self._choices)]
        return self._answer | {"choices": choices}


def _extend(choice: JsonObject, part: JsonObject) -> None:
    choice["finish_reason"] = part["finish_reason"]
    if part["logprobs"] is not None:
        for key in _LOGPROB_KEYS:
            choice["logprobs"][key] += part["logprobs"][key]
    if "token_ids" in part:
        choice["token_ids"] += part["token_ids"]
    choice |= {name: part[name] for name in _MARKS if name in part}


class _ChoiceWriter:
    """Writes one choice's deltas as chunks; the first also holds the parts of the prompt that ``echo`` repeats."""

    def __init__(self, request: CompletionRequest, prompt: Prompt, echo_text: str, tokenizer: Tokenizer) -> None:
        self._request, self._prompt, self._echo_text, self._tokenizer = request, prompt, echo_text, tokenizer
        self._naming = TokenNaming(tokenizer, request.return_tokens_as_token_ids)
        self._is_first = True

    def write(self, delta: Delta) -> JsonObject | None:
        """Returns the chunk's choice; None when there is nothing to say yet."""
        text = (self._echo_text if self._is_first else "") + delta.text
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if delta.empty_content is not None:
            choice["empty_content"] = delta.empty_content.value
        if self._request.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
            if self._is_first:
                choice["prompt_token_ids"] = self._prompt.ids
        if self._request.prompt_logprobs is not None and delta.prompt:
            choice["prompt_logprobs"] = prompt_entries(delta.prompt, self._request.prompt_logprobs, self._tokenizer)
        says_something = text or choice["logprobs"] or choice.get("token_ids") or delta.finish_reason
        if not says_something:
            return None
        self._is_first = False
        return choice

    def _logprobs(self, delta: Delta) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        prompt = delta.prompt if self._request.echo else ()
        tokens = [*prompt, *delta.tokens]
        offsets = self._prompt_offsets() if prompt else []
        offsets += [len(self._echo_text) + offset for offset in delta.text_offsets]
        return {
            "tokens": [self._naming.name(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _prompt_offsets(self) -> list[int]:
        """Returns the offset of each prompt token's text. An added BOS is not part of the echoed text."""
        detokenizer = Detokenizer(self._tokenizer, show_special=True)
        texts = [detokenizer.feed(token_id) for token_id in self._prompt.ids]
        if self._prompt.text is not None and self._tokenizer.add_bos:
            texts[0] = ""
        return _starts(texts)

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """Maps the likeliest tokens' names to their log-probabilities, always including the token itself."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs[: self._request.logprobs], (token.token_id, token.logprob)):
            top.setdefault(self._naming.name(token_id), logprob)
        return top


def _starts(texts: Sequence[str]) -> list[int]:
    starts, position = [], 0
    for text in texts:
        starts.append(position)
        position += len(text)
    return starts
