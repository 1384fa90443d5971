"""One request: its parameters, its progress, and its reports."""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from functools import lru_cache

from ownpath.cache.pools import SequenceCache
from ownpath.cache.snapshot import PassedSnapshot
from ownpath.engine.limits import (
    LARGEST_BIAS,
    LARGEST_PENALTY,
    LARGEST_REPETITION,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    SEED_LIMIT,
    TOP_K_LIMIT,
)
from ownpath.engine.masks import Matcher
from ownpath.engine.request_prefix import RequestPrefix

ROOM_AHEAD = 2
"""Tokens behind the known ones that a running request has room for: that of the step that is planned, and of one more
that may be launched before its tokens are known. With drafts each of the two may give several."""


class RequestError(ValueError):
    """A request that cannot be run as asked; the message names the field. param: the field, where it is not the
    prompt's length."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request's sampling and its limits.

    max_tokens: upper bound on generated tokens; 0 only scores the prompt.
    temperature: 0 takes the likeliest token, otherwise the logits are divided by it.
    top_p: sample among the likeliest tokens that together reach this probability.
    seed: same seed, prompt and parameters: same tokens, whatever else runs. None draws a fresh one.
    num_logprobs: None reports no log-probabilities; n reports the token's own and the n likeliest.
    prompt_logprobs: the same for the prompt's tokens, each once the whole prompt has been read.
    top_k: sample among so many of the likeliest tokens; 0 among all.
    min_p: sample among tokens with at least this share of the likeliest one's probability.
    ignore_eos: the model's end tokens end nothing. stop_token_ids: tokens that end the answer beside them.
    presence_penalty, frequency_penalty: taken from the logit of a token that the answer has, once, and for each time.
    repetition_penalty: divides a positive logit of a token that prompt or answer have, and multiplies any other.
    logit_bias: tokens, each once, and what is added to their logits, after the penalties.
    min_tokens: until the answer has so many tokens, none is drawn that would end it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    prompt_logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 0, "must not be negative"),
            (
                "temperature",
                0 <= self.temperature <= MAX_TEMPERATURE,
                f"must be between 0 and {MAX_TEMPERATURE:g}",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < TOP_K_LIMIT, "must be 0 or the number of tokens"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"has at most {MAX_STOP_TOKENS} tokens"),
            *(self._checks_of_adjustments() if self.adjusts else ()),
            (
                "seed",
                self.seed is None or -SEED_LIMIT <= self.seed < SEED_LIMIT,
                "must be a 64-bit integer",
            ),
            *(
                (name, value is None or 0 <= value <= MAX_TOP_LOGPROBS, f"must be between 0 and {MAX_TOP_LOGPROBS}")
                for name, value in (("num_logprobs", self.num_logprobs), ("prompt_logprobs", self.prompt_logprobs))
            ),
        )
        for name, holds, problem in checks:
            if not holds:
                raise RequestError(f"{name} {problem}, found {getattr(self, name)!r}")
        assert math.isfinite(self.temperature)

    def _checks_of_adjustments(self) -> tuple[tuple[str, bool, str], ...]:
        between = f"must be between {-LARGEST_PENALTY:g} and {LARGEST_PENALTY:g}"
        ids, values = [token_id for token_id, _ in self.logit_bias], [value for _, value in self.logit_bias]
        bias = f"has at most {MAX_LOGIT_BIAS} tokens, each once, with values of at most {LARGEST_BIAS:g} either way"
        is_bias = len(ids) <= MAX_LOGIT_BIAS and len(set(ids)) == len(ids) and min(ids, default=0) >= 0
        return (
            ("presence_penalty", abs(self.presence_penalty) <= LARGEST_PENALTY, between),
            ("frequency_penalty", abs(self.frequency_penalty) <= LARGEST_PENALTY, between),
            (
                "repetition_penalty",
                0 < self.repetition_penalty <= LARGEST_REPETITION,
                f"must be above 0 and at most {LARGEST_REPETITION:g}",
            ),
            ("logit_bias", is_bias and all(abs(value) <= LARGEST_BIAS for value in values), bias),
            ("min_tokens", self.min_tokens >= 0, "must not be negative"),
        )

    @property
    def has_penalties(self) -> bool:
        """True if tokens seen count."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def adjusts(self) -> bool:
        """True if logits change before a token is chosen, in some step at least."""
        return self.has_penalties or bool(self.logit_bias) or self.min_tokens != 0

    def ending_ids(self, end_token_ids: frozenset[int]) -> frozenset[int]:
        """Returns the tokens that end an answer. end_token_ids: the model's."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | end_token_ids

    @property
    def has_filters(self) -> bool:
        """True if not every token may be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class FinishReason(Enum):
    """The reason why generation ended. EOS ends with ``STOP``, a reached limit with ``LENGTH``."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


class NonFinite(StrEnum):
    """Numbers that end an answer by being NaN or infinite; the value is the API's code of the error."""

    LOGITS = "non_finite_logits"
    INDEX_SCORES = "non_finite_index_scores"


@dataclass(frozen=True)
class ScoredToken:
    """A token and, if asked for, its log-probability and those of the likeliest tokens, best first.

    Log-probabilities are the model's own, over the tokenizer's vocabulary, before temperature and top_p.
    ``None``: not asked for, or a prompt's first token, which nothing precedes.
    rank: of a prompt's token, its place among all, from 1; of equal ones outside ``top_logprobs`` the last.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class StepOutput:
    """One step's result for one request. The one with a ``finish_reason`` is the last.

    stop_token_id: the token of ``stop_token_ids`` that ended it; None for an end token of the model, or any other end.
    non_finite: what was NaN or infinite, if that is the error.
    """

    prompt: tuple[ScoredToken, ...] = ()
    token: ScoredToken | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    non_finite: NonFinite | None = None


@lru_cache(maxsize=2**16)
def plain_output(token_id: int) -> StepOutput:
    """Returns the report of one more token, without log-probabilities."""
    return StepOutput(token=ScoredToken(token_id))


OutputSink = Callable[[StepOutput], None]


@dataclass(eq=False)
class Request:
    """A request's state, owned by the engine's thread after submission.

    seed: the parameters' own or a fresh one; with the number of tokens drawn it decides the next draw.
    client: whose it is, for turns between clients. priority: the lower, the earlier it runs.
    num_computed: tokens of ``prompt_ids + output_ids`` that the cache already holds. room: tokens that its blocks hold.
    flagged_layer: the first layer whose index scores were not finite in a row of this request; ``None``: none.
    sink: called with every output, from the engine's thread; must not block.
    salt: only requests with the same one share what caches hold. prefix: what the prefix cache knows of this request.
    has_failed: its numbers are not to be trusted.
    begun_at: when it first ran, as ``time.monotonic``; ``None`` while it waits.
    matcher: the grammar that the answer must fit, at the state where ``output_ids`` leave it; ``None``: none.
    guess: a position, and the token that a draft expects there; ``None``: no draft has run.
    rank: where its caches are, if ranks have requests of their own.
    """

    prompt_ids: list[int]
    params: SamplingParams
    sink: OutputSink
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    cache: SequenceCache | None = None
    seed: int = field(init=False)
    scored_prompt: list[ScoredToken] = field(default_factory=list)
    flagged_layer: int | None = None
    client: str = ""
    priority: int = 0
    room: int = 0
    salt: str = ""
    prefix: RequestPrefix | None = None
    has_failed: bool = False
    begun_at: float | None = None
    matcher: Matcher | None = None
    guess: tuple[int, int] | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        fresh = secrets.randbelow(2 * SEED_LIMIT) - SEED_LIMIT
        self.seed = fresh if self.params.seed is None else self.params.seed

    @property
    def caches(self) -> SequenceCache:
        """The cache, which a request has once it runs."""
        assert self.cache is not None
        return self.cache

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet through the model."""
        return self.num_tokens - self.num_computed

    @property
    def known_guess(self) -> int | None:
        """The token that a draft expects behind the last known one; ``None``: none has looked so far."""
        return self.guess[1] if self.guess is not None and self.guess[0] == self.num_tokens else None

    @property
    def num_cached(self) -> int:
        """Prompt tokens that were not computed, because the caches held them."""
        return 0 if self.prefix is None else self.prefix.num_cached or 0

    @property
    def most_reused(self) -> int:
        """The most tokens that need not be computed: not the last, whose logits are wanted, and none of a prompt that
        is still to be scored."""
        is_scored = len(self.scored_prompt) >= len(self.prompt_ids) - 1
        return 0 if self.params.prompt_logprobs is not None and not is_scored else self.num_tokens - 1

    @property
    def most_next(self) -> int:
        """The most tokens of the next chunk: those pending, up to where it is to be cut for a snapshot."""
        cut = None if self.prefix is None else self.prefix.next_cut(self.num_computed)
        return self.num_pending if cut is None else min(self.num_pending, cut - self.num_computed)

    def pass_stops(self, num_tokens: int) -> tuple[PassedSnapshot, ...]:
        """Returns the snapshots that a step of the next ``num_tokens`` tokens takes on its way."""
        if self.prefix is None:
            return ()
        return self.prefix.pass_stops(self.caches, self.num_computed, self.num_computed + num_tokens)

    def ids_between(self, start: int, stop: int) -> list[int]:
        """Returns the tokens from one position up to another, of prompt and answer."""
        num_prompt = len(self.prompt_ids)
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - num_prompt) : stop - num_prompt]

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer at their longest."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def may_grow(self) -> bool:
        """True if its blocks may not hold all of it."""
        return self.room < self.most_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.prompt_ids)

    @property
    def is_reading(self) -> bool:
        """True while more is to be run than the last token of an answer: the prompt, and after it was sent back, the
        answer so far as well."""
        num_drawn = len(self.output_ids)
        return self.num_computed < len(self.prompt_ids) + num_drawn - (num_drawn > 0)

    @property
    def scores_prompt(self) -> bool:
        """True if the logits of the next tokens score the prompt."""
        return self.params.prompt_logprobs is not None and self.is_prefilling

    @property
    def must_go_on(self) -> bool:
        """True while no token may end the answer."""
        return len(self.output_ids) < self.params.min_tokens

    @property
    def adjusts(self) -> bool:
        """True if logits change before a token is chosen, in some step at least."""
        return self.params.adjusts or self.matcher is not None

    @property
    def adjusts_now(self) -> bool:
        """True if the logits of the next token change before it is chosen. How, depends on the token before it."""
        params = self.params
        return self.matcher is not None or params.has_penalties or bool(params.logit_bias) or self.must_go_on

    def with_end(self, output: StepOutput, end_token_ids: frozenset[int]) -> StepOutput:
        """Returns a step's output and why the answer ends with it, if it does. end_token_ids: the model's."""
        params, last = self.params, self.output_ids[-1] if self.output_ids else None
        # A grammar lets an end token through where nothing else may follow, even if end tokens are to be ignored.
        if last in end_token_ids and (not params.ignore_eos or self.matcher is not None):
            return replace(output, finish_reason=FinishReason.STOP)
        if last in params.stop_token_ids:
            return replace(output, finish_reason=FinishReason.STOP, stop_token_id=last)
        if len(self.output_ids) >= params.max_tokens and not self.is_prefilling:
            return replace(output, finish_reason=FinishReason.LENGTH)
        return output

    def id_at(self, position: int) -> int:
        """Returns the token at a position, of prompt or answer."""
        num_prompt = len(self.prompt_ids)
        return self.prompt_ids[position] if position < num_prompt else self.output_ids[position - num_prompt]

    def next_ids(self, num_tokens: int) -> list[int]:
        """Returns the next ``num_tokens`` tokens to run."""
        ids = self.prompt_ids[self.num_computed : self.num_computed + num_tokens]
        if len(ids) < num_tokens:
            start = max(self.num_computed - len(self.prompt_ids), 0)
            ids += self.output_ids[start : start + num_tokens - len(ids)]
        return ids
