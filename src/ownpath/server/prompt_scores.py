"""``prompt_logprobs`` in vLLM's form: the request's field, its limits, and the entries of the answer.

``echo`` with ``logprobs`` tells the same numbers in OpenAI's form; the engine scores a prompt once for both.
"""

from collections.abc import Sequence

from pydantic import Field

from ownpath.chat.tokenizer import Tokenizer
from ownpath.engine.limits import MAX_TOP_LOGPROBS
from ownpath.engine.request import ScoredToken
from ownpath.server.conversation import Strict
from ownpath.server.errors import bad_request
from ownpath.server.sse import JsonObject

MAX_SCORES = 2**18
"""Log-probabilities of the prompts' tokens in one answer: each takes 650 to 900 bytes while the answer is written."""


class ScoringRequest(Strict):
    """A request's field that scores its prompt."""

    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="so many of the likeliest tokens at each token of the prompt, and the token itself; at most "
        f"{MAX_SCORES} log-probs in an answer; not with stream",
    )

    def check_scoring(self, *, stream: bool) -> None:
        """Refuses scores in a stream, as vLLM does. Errors: ApiError 400."""
        if stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs: not with stream: true", "prompt_logprobs", "invalid_value")


def check_scores(name: str, num_top: int | None, num_tokens: int) -> None:
    """Refuses scores that would take much memory. Errors: ApiError 400 naming the field.

    name: the field that asks for ``num_top`` log-probs beside each token's own; None asks for none. num_tokens: of the
    prompts, as often as the answer repeats them.
    """
    if num_top is not None and num_tokens * (1 + num_top) > MAX_SCORES:
        text = f"{name}: {num_tokens} prompt tokens with {1 + num_top} log-probs each are more than {MAX_SCORES}"
        raise bad_request(f"{text}; ask for fewer of them, or send the prompt in parts", name, "invalid_value")


def prompt_entries(prompt: Sequence[ScoredToken], num_top: int, tokenizer: Tokenizer) -> list[JsonObject | None]:
    """Returns an object for each token of a prompt: token id -> log-prob, rank, text, the token itself first.

    The first token has None, for nothing precedes it. A rank counts from 1.
    """
    return [_entry(token, num_top, tokenizer) for token in prompt]


def _entry(token: ScoredToken, num_top: int, tokenizer: Tokenizer) -> JsonObject | None:
    if token.logprob is None:
        return None
    found = [(token.token_id, token.logprob, token.rank)]
    found += [(other, logprob, rank) for rank, (other, logprob) in enumerate(token.top_logprobs[:num_top], 1)]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
        for token_id, logprob, rank in found
    }
