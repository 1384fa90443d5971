"""Runs fixed prompts through the engine and collects the raw distributions."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ownpath.chat.tokenizer import Tokenizer, TokenizerError
from ownpath.engine.engine import Engine
from ownpath.engine.limits import MAX_TOP_LOGPROBS
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.selftest.signatures import Distribution

SILENCE_S = 120.0
"""Seconds of silence after which the engine counts as failed. Generous: a slow device is not a fault."""

NUM_ANSWER_TOKENS, GOLDEN_TOKENS = 16, 32
TEXT = (
    "The river rises in the hills behind our town, passes two old mills and a stone bridge, and reaches the sea after "
    "forty miles. In spring it floods the meadows; by August children cross it on foot. My grandfather, who built "
    "boats, used to say that water never lies: it shows at once whether your work was careful. He had 12 tools, 3 "
    "dogs and one rule, which was to finish each evening what had been begun in the morning. "
)
OTHER_TEXT = (
    "Bread needs flour, salt, yeast, warm hands and time. Mix everything except patience, which you add last. When "
    "the dough has doubled, fold it gently, wait another hour and heat the oven to 230 degrees. Why does it smell so "
    "good? Because sugars brown at the crust, said Maria, although nobody had asked her about chemistry. "
)


@dataclass(frozen=True)
class PromptOutput:
    """The output of one prompt.

    rows: the distribution after each token, from the first on: of the prompt, then of the answer. None after an error.
    answer_ids: raw token ids, special ones included.
    finish_reason: None if the engine fell silent.
    """

    prompt_ids: tuple[int, ...]
    rows: tuple[Distribution, ...] = ()
    answer_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_non_finite: bool = False

    @property
    def prompt_rows(self) -> tuple[Distribution, ...]:
        """The distributions that the prompt alone decides."""
        return self.rows[: len(self.prompt_ids)]

    @property
    def answer_rows(self) -> tuple[Distribution, ...]:
        """The distributions that chose the answer's tokens."""
        return self.rows[len(self.prompt_ids) - 1 :]


@dataclass(frozen=True)
class Golden:
    """A question with a known answer, for a model that is known to have learnt it."""

    question_ids: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class ProbeAnswers:
    """The outputs of all prompts; None where the context or the step has no room for one.

    short: prompts of one and two tokens.
    first, other: two texts of a window's length that end with the same token.
    repeated: the first once more.
    replayed: the first and its answer as one prompt, in one step.
    chunked: the same, cut by another prompt that takes most of the step.
    """

    short: tuple[PromptOutput, ...]
    first: PromptOutput
    other: PromptOutput | None
    repeated: PromptOutput
    replayed: PromptOutput | None
    chunked: PromptOutput | None
    golden: PromptOutput | None

    def all(self) -> tuple[PromptOutput, ...]:
        """Lists the output of every prompt."""
        maybe = (self.first, self.other, self.repeated, self.replayed, self.chunked, self.golden)
        return (*self.short, *(seen for seen in maybe if seen is not None))


def run_probes(engine: Engine, tokenizer: Tokenizer, window: int, golden: Golden | None) -> ProbeAnswers:
    """Runs the prompts; nothing else should run on the engine meanwhile.

    window: the model's sliding window; the texts fill it where the context allows, and their answers pass it.
    Errors: TokenizerError, EngineStopped.
    """
    num_answer = min(NUM_ANSWER_TOKENS, engine.config.max_model_len // 4)
    num_prompt = min(window, engine.config.max_model_len - num_answer)
    first_ids, other_ids = _texts(tokenizer, num_prompt)
    params = _params(num_answer)
    if golden is not None and len(golden.question_ids) + GOLDEN_TOKENS > engine.config.max_model_len:
        golden = None
    asked = [(first_ids[:1], params), (first_ids[:2], params), (first_ids, params)]
    asked += [(other_ids, params)] if other_ids != first_ids else []
    asked += [] if golden is None else [(golden.question_ids, _params(GOLDEN_TOKENS))]
    answers = run_prompts(engine, asked)
    known = None if golden is None else answers.pop()
    other = answers.pop() if other_ids != first_ids else None
    first = answers[2]
    whole = first.prompt_ids + first.answer_ids
    again = run_prompts(engine, [(first_ids, params), (whole, _params(0))])
    replayed = again[1] if first.answer_ids else None
    chunked = None if replayed is None else _read_in_chunks(engine, whole)
    return ProbeAnswers(tuple(answers[:2]), first, other, again[0], replayed, chunked, known)


def run_prompts(engine: Engine, asked: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> list[PromptOutput]:
    """Runs these prompts together, admitted in one step."""
    outputs: queue.SimpleQueue[tuple[int, StepOutput]] = queue.SimpleQueue()
    requests = []
    for index, (prompt_ids, params) in enumerate(asked):
        requests.append(Request(list(prompt_ids), params, lambda output, index=index: outputs.put((index, output))))  # type: ignore[misc]
    seen = [PromptOutput(prompt_ids) for prompt_ids, _ in asked]
    engine.submit(requests)
    while any(one.finish_reason is None for one in seen):
        try:
            index, output = outputs.get(timeout=SILENCE_S)
        except queue.Empty:
            for request in requests:
                engine.abort(request)
            return seen
        seen[index] = _add_output(seen[index], output)
    return seen


def _add_output(seen: PromptOutput, output: StepOutput) -> PromptOutput:
    if output.error is not None:
        failed = PromptOutput(seen.prompt_ids, finish_reason=FinishReason.ERROR, error=output.error)
        return replace(failed, is_non_finite=output.non_finite is not None)
    rows = tuple(scored.top_logprobs for scored in output.prompt[1:])
    token = output.token
    return replace(
        seen,
        rows=seen.rows + rows + (() if token is None else (token.top_logprobs,)),
        answer_ids=seen.answer_ids + (() if token is None else (token.token_id,)),
        finish_reason=output.finish_reason,
    )


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0, num_logprobs=MAX_TOP_LOGPROBS, prompt_logprobs=MAX_TOP_LOGPROBS)


def _texts(tokenizer: Tokenizer, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Makes two texts of ``num_tokens`` tokens that end with the same one. Errors: TokenizerError."""
    first, other = (_repeat_to_length(tokenizer.encode_text(text), num_tokens) for text in (TEXT, OTHER_TEXT))
    return first, other[:-1] + first[-1:]


def _repeat_to_length(ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    if not ids:
        raise TokenizerError("the tokenizer has no tokens for plain text")
    return tuple(ids[n % len(ids)] for n in range(num_tokens))


def _read_in_chunks(engine: Engine, ids: tuple[int, ...]) -> PromptOutput | None:
    """Runs the prompt behind others that leave it only part of the first step; None if they cannot."""
    config = engine.config
    num_fill = config.max_prefill_tokens - len(ids) // 3
    if len(ids) < 3 or num_fill < 1:
        return None
    sizes = [min(config.max_model_len, num_fill - start) for start in range(0, num_fill, config.max_model_len)]
    if len(sizes) >= config.max_num_seqs:
        return None
    unscored = SamplingParams(0, temperature=0)
    fillers = [(_repeat_to_length(ids, size), unscored) for size in sizes]
    return run_prompts(engine, [*fillers, (ids, _params(0))])[-1]
