"""Finds out which log-probs a server offers, by asking for each and looking at the answer; nothing is assumed.

A request is tried from the most informative form to the plainest: with token ids in the answer or not, with many
likeliest tokens or few.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from ownpath.diff.client import CannotAsk, Client, Refused
from ownpath.diff.modes import WISHES, match_count
from ownpath.diff.prompts import SurveyPrompt
from ownpath.diff.responses import (
    ChatReading,
    SequenceReading,
    TokenNames,
    Unreadable,
    read_chat,
    read_echo,
    read_generated,
    read_plain,
    read_prompt_count,
    read_prompt_ids,
    read_prompt_logprobs,
    refused_reading,
)

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
_NUMS_TOP = (20, 5, 1)
_EXTRAS: tuple[Mapping[str, object], ...] = (
    {"return_token_ids": True, "return_tokens_as_token_ids": True},
    {"return_token_ids": True},
    {},
)
Body = TypeVar("Body")
_GREEDY = {"temperature": 0, "seed": 0}


class NotOffered(CannotAsk):
    """The server answered, and left out what was asked for."""


@dataclass(frozen=True)
class RequestForm:
    """The form of request for generated tokens that one server accepts: what its refusals left.

    extras: fields that make it report token ids. sends_ids: the prompt goes as ids, not as text. wish: fields that ask
    a chat not to think.
    """

    path: str
    sends_ids: bool
    num_top: int
    extras: Mapping[str, object]
    wish: Mapping[str, object] = field(default_factory=dict)

    def body(self, prompt: SurveyPrompt, max_tokens: int) -> dict[str, object]:
        """Builds the request for one greedy answer with log-probs."""
        num_top = {"logprobs": True, "top_logprobs": self.num_top} if self.path == CHAT else {"logprobs": self.num_top}
        return self.plain_body(prompt, max_tokens) | num_top

    def plain_body(self, prompt: SurveyPrompt, max_tokens: int) -> dict[str, object]:
        """Builds the same request without log-probs."""
        common = {"max_tokens": max_tokens, **_GREEDY, **self.extras}
        if self.path == CHAT:
            return {**_messages(prompt), **common, **self.wish}
        return {"prompt": list(prompt.ids) if self.sends_ids else prompt.text, **common}


@dataclass(frozen=True)
class RemoteServer:
    """A server and the form of request that it accepts.

    model: its name in requests; None sends none. form: ``prompt_logprobs``, ``echo`` or ``generated``.
    is_failing: it answers, and fails (status 500 and above) as soon as any log-prob is asked.
    notes: what it refused on the way, for people.
    """

    client: Client
    names: TokenNames
    model: str | None
    request_form: RequestForm
    form: str = "generated"
    is_failing: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def generate(self, prompt: SurveyPrompt, max_tokens: int) -> SequenceReading:
        """Generates one greedy answer, scored. Where the server cannot write its log-probs as JSON, the same is asked
        without them. Errors: CannotAsk."""
        form = self.request_form
        try:
            answer = self._post(form.path, form.body(prompt, max_tokens))
        except Refused as error:
            if not self._lacks_values(error):
                raise
            return self.generate_plain(prompt, max_tokens, str(error))
        return self._read(form.path, lambda: read_generated(answer, self._prompt_ids(prompt, answer), self.names))

    def generate_plain(self, prompt: SurveyPrompt, max_tokens: int, refusal: str) -> SequenceReading:
        """Generates one greedy answer without log-probs, which were refused with these words. Errors: CannotAsk."""
        form = self.request_form
        answer = self._post(form.path, form.plain_body(prompt, max_tokens))
        return self._read(form.path, lambda: read_plain(answer, self._prompt_ids(prompt, answer), self.names, refusal))

    def score(self, prompt: SurveyPrompt) -> SequenceReading:
        """Scores the prompt's own tokens, in the form offered. Errors: CannotAsk."""
        read = read_echo if self.form == "echo" else read_prompt_logprobs
        asked = {"echo": True} if self.form == "echo" else {"prompt_logprobs": self.request_form.num_top}
        try:
            answer = self._post(COMPLETIONS, self.request_form.body(prompt, 1) | asked)
        except Refused as error:
            if not self._lacks_values(error):
                raise
            return refused_reading(prompt.ids, str(error))
        return self._read(COMPLETIONS, lambda: read(answer, self._prompt_ids(prompt, answer), self.names))

    def chat(self, prompt: SurveyPrompt, max_tokens: int, wish: Mapping[str, object]) -> ChatReading:
        """Sends the prompt as a user's message, with the fields of a wish. Errors: CannotAsk."""
        wishes = [{**extras, **asked} for asked in ({"logprobs": True}, {}) for extras in _EXTRAS]
        refused: Refused | None = None
        for fields in wishes:
            try:
                answer = self._post(CHAT, _messages(prompt) | {"max_tokens": max_tokens, **_GREEDY, **fields, **wish})
            except Refused as error:
                refused = error
                continue
            chat = self._read(CHAT, partial(read_chat, answer, self.names))
            return chat if chat.prompt_ids is not None else replace(chat, prompt_ids=self._chat_ids(prompt, wish))
        assert refused is not None
        raise refused

    def _chat_ids(self, prompt: SurveyPrompt, wish: Mapping[str, object]) -> tuple[int, ...] | None:
        """Returns the conversation's tokens by ``/tokenize``, where a server has one that knows messages."""
        return self._tokenize({**_messages(prompt), **wish})

    def text_ids(self, prompt: SurveyPrompt) -> tuple[int, ...] | None:
        """Returns the text's tokens by ``/tokenize``, in the request form of vLLM and SGLang or in llama.cpp's."""
        return self._tokenize({"prompt": prompt.text, "content": prompt.text})

    def _tokenize(self, body: dict[str, object]) -> tuple[int, ...] | None:
        try:
            tokens = self._post(TOKENIZE, body).get("tokens")
        except CannotAsk:
            return None  # few servers have it; the check that needs the ids says that they are missing
        ids = [self.names.check(token) for token in tokens] if isinstance(tokens, list) else [None]
        return None if None in ids else tuple(i for i in ids if i is not None)

    def _prompt_ids(self, prompt: SurveyPrompt, answer: Mapping[str, object]) -> tuple[int, ...]:
        """Returns the ids that the server read: those sent; for text, those it reports, else those of our tokenizer."""
        if self.request_form.path == COMPLETIONS and self.request_form.sends_ids:
            return prompt.ids
        told = read_prompt_ids(answer, self.names)
        if told is not None or self.request_form.path != CHAT:
            return told or prompt.ids
        count = read_prompt_count(answer)
        fitting = match_count(count, prompt.modes).candidates if count is not None else ()
        return (fitting or prompt.modes)[0].ids

    def _lacks_values(self, error: Refused) -> bool:
        """True if a request was refused because its log-probs cannot be written, not because of its form."""
        return error.is_not_finite or (self.is_failing and error.status >= 500)

    def _post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        return self.client.post(path, body if self.model is None else {"model": self.model, **body})

    def _read(self, path: str, read: Callable[[], Body]) -> Body:
        try:
            return read()
        except (Unreadable, AttributeError, TypeError) as error:  # a field of an undocumented shape
            raise NotOffered(f"{self.client.root}{path}: {error}") from None


def open_server(client: Client, names: TokenNames, prompt: SurveyPrompt, model: str | None) -> RemoteServer:
    """Finds the form of request that the server accepts. model: its name in requests; None sends none.

    Errors: CannotAsk when the server cannot be reached or offers no log-probs, with its last words to each form.
    """
    notes: list[str] = []
    absent: set[str] = set()
    broken: RemoteServer | None = None
    for request_form in _request_forms():
        if request_form.path in absent:
            continue
        server = RemoteServer(client, names, model, request_form)
        try:
            server.generate(prompt, 1)
        except (Refused, NotOffered) as error:
            if isinstance(error, Refused) and error.status == 404:
                absent.add(request_form.path)
            if isinstance(error, Refused) and error.status >= 500 and broken is None:
                broken = server
            notes.append(str(error))
            continue
        return _best_form(replace(server, notes=tuple(notes)), prompt)
    if broken is not None and _answers_plainly(broken, prompt):
        return replace(broken, is_failing=True, notes=tuple(notes))
    raise CannotAsk(f"{client.root} offers no log-probs: " + "; ".join(dict.fromkeys(notes[-3:])))


def _answers_plainly(server: RemoteServer, prompt: SurveyPrompt) -> bool:
    try:
        server.generate_plain(prompt, 1, "")
    except CannotAsk:
        return False
    return True


def _best_form(server: RemoteServer, prompt: SurveyPrompt) -> RemoteServer:
    """Returns the same server, asked for its prompt's log-probs too where it gives them."""
    notes = server.notes
    for form in ("prompt_logprobs", "echo") if server.request_form.path == COMPLETIONS else ():
        candidate = replace(server, form=form, notes=notes)
        try:
            candidate.score(prompt)
        except (Refused, NotOffered) as error:
            notes = (*notes, f"{form}: {error}")
            continue
        return candidate
    return replace(server, form="generated", notes=notes)


def _request_forms() -> Iterator[RequestForm]:
    for path, sends_ids in ((COMPLETIONS, True), (COMPLETIONS, False), (CHAT, False)):
        for num_top in _NUMS_TOP:
            for extras in _EXTRAS:
                for wish in (*WISHES, {}) if path == CHAT else ({},):
                    yield RequestForm(path, sends_ids, num_top, extras, wish)


def _messages(prompt: SurveyPrompt) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt.text}]}


def first_model(client: Client) -> str | None:
    """Returns the first model that ``/v1/models`` lists.

    Errors: CannotAsk when nothing answers; a server without the list is asked without a name.
    """
    try:
        listed = client.get("/v1/models").get("data")
    except Refused:
        return None
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, dict) else None
    return name if isinstance(name, str) else None
