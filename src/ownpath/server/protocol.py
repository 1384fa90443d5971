"""Requests as types: the fields that are read, their ranges, and the refusal of everything else."""

from typing import Annotated

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema

from ownpath.chat.answer import Shown
from ownpath.chat.encode import Ending
from ownpath.chat.levels import LEVEL_OF_WORD
from ownpath.engine.limits import MAX_STOP_TOKENS, MAX_TEMPERATURE, MAX_TOP_LOGPROBS, SEED_LIMIT, TOP_K_LIMIT
from ownpath.engine.request import SamplingParams
from ownpath.server.cache_salt import MAX_SALT_CHARS
from ownpath.server.conversation import (
    ROLES,
    ChatMessage,
    Strict,
    TemplateOptions,
    Thinking,
    ToolChoice,
    Tools,
)
from ownpath.server.counts import MAX_ANSWERS, MAX_MESSAGES
from ownpath.server.prompt_scores import ScoringRequest
from ownpath.server.sender import read_priority
from ownpath.server.structured_fields import StructuredRequest
from ownpath.server.value_forms import (
    MAX_ID,
    MAX_STOP_CHARS,
    MAX_STOPS,
    PROMPTS_SCHEMA,
    STOPS_SCHEMA,
    read_prompts,
    read_stops,
)

_DEFAULT_MAX_TOKENS = 16


class StreamOptions(Strict):
    """Options of a stream. continuous_usage_stats: each chunk tells the usage so far; needs include_usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


_EXCESS = "clamped to what max_model_len leaves (--strict-limits refuses it); -1: as much as fits"


class GenerationRequest(StructuredRequest, ScoringRequest):
    """The fields that chat requests and completions share: what is generated, how much of it, and how it is told."""

    model: str | None = Field(None, description="a served name, or the path given to serve; another name is 404")
    max_tokens: int | None = Field(
        None, ge=-1, description=f"{_EXCESS}; left out: {_DEFAULT_MAX_TOKENS}. 0 only scores"
    )
    n: int = Field(
        1,
        ge=1,
        le=MAX_ANSWERS,
        description=f"answers of each prompt, choices one behind the other; at most {MAX_ANSWERS} of a body's prompts "
        "together. Answer i, from 0, draws as if seed were i more",
    )
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="as many as n; another number is 400")
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="samples from the fewest tokens that reach this probability")
    top_k: int = Field(
        0, ge=-1, lt=TOP_K_LIMIT, description="samples from so many of the likeliest tokens; 0 and -1: from all"
    )
    min_p: float = Field(0.0, ge=0, le=1, description="samples from tokens with this share of the likeliest one's")
    ignore_eos: bool = Field(False, description="the model's end tokens do not end the answer, and are not shown")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_ID)]] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKENS,
        description="the answer ends with one of these; it is shown, unless it is a special token",
    )
    seed: int | None = Field(
        None, ge=-SEED_LIMIT, lt=SEED_LIMIT, description="the same seed, prompt and parameters draw the same numbers"
    )
    stop: Annotated[list[str], BeforeValidator(read_stops), WithJsonSchema(STOPS_SCHEMA)] = Field(
        default_factory=list,
        description=f"the answer ends before it; a string or up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters",
    )
    include_stop_str_in_output: bool = Field(
        False, description="the answer ends with the stop string that ended it, not before it"
    )
    skip_special_tokens: bool = Field(
        True,
        description="false: special tokens are text where they stand, but not inside and behind calls of tools; the "
        "model's end token only with include_stop_str_in_output",
    )
    stream: bool = Field(False, description="server-sent events, then [DONE]")
    stream_options: StreamOptions | None = Field(
        None,
        description="include_usage: a last event with usage and no choices; needs stream. continuous_usage_stats: the "
        "usage so far in each event",
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_SALT_CHARS,
        description="only requests with the same salt share what the prefix cache holds",
    )
    priority: Annotated[int, BeforeValidator(read_priority), WithJsonSchema({})] = Field(
        0, description="requests with a lower number run first, as vLLM's; what is no whole number is 0"
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="tokens in logprobs are named token_id:N, N the id, instead of by their text"
    )
    return_token_ids: bool = Field(
        False, description="adds prompt_token_ids and token_ids to the answer (ownpath's own)"
    )

    @property
    def shown(self) -> Shown:
        """Additions to the text of answers."""
        return Shown(not self.skip_special_tokens, self.include_stop_str_in_output)

    def sampling(
        self, max_tokens: int, num_logprobs: int | None, prompt_logprobs: int | None = None, answer: int = 0
    ) -> SamplingParams:
        """Builds the parameters of one answer.

        max_tokens: the limit once it is fitted to the context. answer: its place among the answers of its prompt.
        """
        return SamplingParams(
            max_tokens,
            self.temperature,
            self.top_p,
            self._seed_of(answer),
            num_logprobs,
            prompt_logprobs,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            ignore_eos=self.ignore_eos,
            stop_token_ids=frozenset(self.stop_token_ids),
            **self.adjustments(),
        )

    def _seed_of(self, answer: int) -> int | None:
        """Returns an answer's seed: so many more than the request's, and behind the highest comes the lowest."""
        if self.seed is None:
            return None
        return (self.seed + answer + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1,
        description=f"at most {MAX_MESSAGES}, roles {', '.join(ROLES)}; ends with user, developer or tool, unless the "
        "two fields below say otherwise",
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="left out: true unless the last message is continued. false: the prompt ends with the last "
        "message, of whatever role, and no answer is opened; not with thinking",
    )
    continue_final_message: bool = Field(
        False,
        description="the answer goes on where the last message ends, an assistant's without calls, and does not repeat "
        "it; as prefix: true in that message. With thinking, its reasoning is closed, empty or not",
    )
    max_tokens: int | None = Field(None, ge=-1, description=f"{_EXCESS}; left out: -1")
    max_completion_tokens: int | None = Field(
        None, ge=-1, description="the newer name of max_tokens; both may be sent if they agree"
    )
    logprobs: bool = Field(False, description="one entry for each generated token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens in each entry; needs logprobs"
    )
    tools: Tools = Field(
        default_factory=list,
        description="functions, names all different; the calls of strict ones fit their parameters",
    )
    tool_choice: ToolChoice = Field(
        "auto", description="auto, none; required: the answer is calls; a named function: it is calls of that one"
    )
    parallel_tool_calls: bool = Field(True, description="false: the answer ends with its first whole call")
    thinking: Thinking | None = Field(None, description="whether the answer opens with reasoning; left out: no")
    reasoning_effort: str | None = Field(
        None,
        description=f'"none" (no thinking), or {", ".join(LEVEL_OF_WORD)}, which turn thinking on; the answer says '
        "which level ran",
    )
    chat_template_kwargs: TemplateOptions = Field(
        TemplateOptions(), description="thinking, enable_thinking, reasoning_effort; must not contradict the others"
    )

    @property
    def functions(self) -> tuple[dict[str, object], ...]:
        """The functions to tell the model about: none with ``tool_choice`` "none"."""
        return () if self.tool_choice == "none" else tuple(tool.function for tool in self.tools)

    @property
    def ending(self) -> Ending:
        """The end of the prompt."""
        if self.continue_final_message or self.messages[-1].prefix:
            return Ending.REST
        return Ending.NOTHING if self.add_generation_prompt is False else Ending.ANSWER

    @property
    def effort(self) -> str | None:
        """The word for the reasoning effort, "none" included; None without one."""
        options = self.chat_template_kwargs
        return options.reasoning_effort if self.reasoning_effort is None else self.reasoning_effort

    @property
    def wanted_tokens(self) -> tuple[str, int]:
        """The limit on the answer's tokens and the field that gives it; -1 asks for as many as fit."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", -1 if self.max_tokens is None else self.max_tokens

    @property
    def thinks(self) -> bool:
        """True if the answer should open with reasoning: only if a field asks for it."""
        return True in self.thinking_values()

    @property
    def opens_reasoning(self) -> bool:
        """True if the answer's first token is reasoning; that of a continued message is closed already."""
        return self.thinks and self.ending is Ending.ANSWER

    def thinking_values(self) -> set[bool | None]:
        """The values that the fields give to thinking, each for itself; None says nothing."""
        options = self.chat_template_kwargs
        by_type = None if self.thinking is None else self.thinking.type == "enabled"
        words = (self.reasoning_effort, options.reasoning_effort)
        by_word = [None if word is None else word != "none" for word in words]
        return {by_type, options.thinking, options.enable_thinking, *by_word}


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``. ``prompt`` holds texts or lists of token ids."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(read_prompts), WithJsonSchema(PROMPTS_SCHEMA)] = (
        Field(description="a text, a list of texts, token ids, or a list of such lists; each prompt is a choice")
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens at each token; with echo of the prompt's too"
    )
    echo: bool = Field(False, description="the text begins with the prompt")

    @property
    def repeats_prompts(self) -> bool:
        """True if each choice holds its prompt."""
        return self.echo or self.return_token_ids

    @property
    def num_echoed_logprobs(self) -> int | None:
        """The likeliest tokens at each token of the echoed prompt; None if they are not asked for."""
        return self.logprobs if self.echo else None

    @property
    def wanted_tokens(self) -> tuple[str | None, int]:
        """The limit on each answer's tokens and the field that gives it, None for the default."""
        return (None, _DEFAULT_MAX_TOKENS) if self.max_tokens is None else ("max_tokens", self.max_tokens)
