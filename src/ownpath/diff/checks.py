"""The checks of a server seen from outside: id, what is looked for, remedy and judgement of each in one place.

Every check has its own verdict, whatever the others found. Where the model here behaves the same way, the server is not
at fault: what is judged is compared with ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high

import torch

from ownpath.diff.compare import Distances
from ownpath.diff.modes import ids_apart
from ownpath.diff.observations import Conversation, Observations, widening
from ownpath.diff.responses import ScoredPosition, SequenceReading
from ownpath.finding import Finding, Verdict

SAME_NATS = 2.0**-10
"""Log-probs closer than this are one log-prob: a BF16 logit between 16 and 32 that moves at all moves by 2**-3."""
LONGEST_RUN = 4
FEW = 16
"""Fewer positions than this have no median of KL to speak of."""
SHARE_FAR = 0.10
"""Part of the positions that may be further than the tolerance from ours."""


@dataclass(frozen=True)
class Judged:
    """The result of a judgement. number, limit: what was measured and what it may be; None where there is nothing to
    measure. says: one line. is_noted: worth saying, and no fault."""

    number: float | None
    limit: float
    says: str
    is_found: bool = False
    is_noted: bool = False


@dataclass(frozen=True)
class Check:
    """One check. finds: what it looks for. judge: pure."""

    id: str
    finds: str
    remedy: str
    judge: "Judge"

    def finding(self, seen: Observations) -> Finding:
        """Judges: FAIL where it is found, WARN where it is only worth saying, SKIPPED without a number."""
        it = self.judge(seen)
        if it.number is None:
            return Finding(self.id, "", Verdict.SKIPPED, it.says, limit=it.limit)
        verdict = Verdict.FAIL if it.is_found else Verdict.WARN if it.is_noted else Verdict.PASS
        remedy = "" if verdict is Verdict.PASS else self.remedy
        return Finding(self.id, "", verdict, it.says, it.number, remedy=remedy, limit=it.limit)


CHECKS: list[Check] = []
"""Causes before what follows from them."""


Judge = Callable[[Observations], Judged]


def _check(id: str, finds: str, remedy: str) -> Callable[[Judge], Judge]:
    def enter(judge: Judge) -> Judge:
        CHECKS.append(Check(id, finds, remedy, judge))
        return judge

    return enter


def all_checks(seen: Observations) -> tuple[Finding, ...]:
    """Runs every check, in their order."""
    return tuple(check.finding(seen) for check in CHECKS)


@_check(
    "non-finite",
    "log-probs are NaN, infinite or null, or the server cannot write them as JSON",
    "a kernel wrote NaN: look for uninitialised scales and padding rows (ownpath inspect), or another kernel",
)
def _judge_non_finite(seen: Observations) -> Judged:
    rows = [row for reading in (*seen.scored, *seen.generated) for row in reading.all_rows]
    bad = sum(_is_bad(row) for row in rows)
    says = f"{bad} of {len(rows)} log-probs are NaN, infinite or missing"
    if seen.refusals:
        says = f"{len(seen.refusals)} answers with log-probs were refused, and given without: {seen.refusals[0]}"
    return Judged(
        max(bad, len(seen.refusals)) if rows or seen.refusals else None, 0, says, bad > 0 or bool(seen.refusals)
    )


@_check(
    "all-special",
    "answers of nothing but special tokens (BOS, EOS, padding), or of nothing, where ours would write text",
    "content is empty because special tokens are hidden; read the raw ids, then suspect the model runner",
)
def _judge_all_special(seen: Observations) -> Judged:
    rows = [row for reading in seen.generated for row in reading.all_rows]
    num_special = sum(row.token_id in seen.special_ids for row in rows)
    is_bare = num_special == len(rows) and all(r.all_rows or r.is_stopped or r.is_blank for r in seen.generated)
    ours_write = any(int(rows_PV[0].argmax()) not in seen.special_ids for rows_PV in seen.generated_rows)
    says = f"{num_special} of {len(rows)} generated tokens are special" + ", and our model writes text" * ours_write
    return Judged(num_special / len(rows) if rows else 1.0, 1.0, says, is_bare and ours_write)


@_check(
    "input-independent",
    "the same log-probs after different prompts",
    "the logits do not depend on the input: another model runner, or CUDA graphs off (stale input buffers)",
)
def _judge_input_independent(seen: Observations) -> Judged:
    first_rows = [reading.all_rows[0] for reading in seen.generated if reading.all_rows]
    theirs = [_by_token(row) for row in first_rows if row.logprob is not None]
    ours = [rows_PV[0] for rows_PV in seen.generated_rows]
    says = "log-probs after different prompts differ by this much at most; found up to the bound"
    if len(theirs) < 2 or len(theirs) < len(ours):
        return Judged(None, SAME_NATS, "log-probs after two prompts are needed")
    far = max(_lists_apart(theirs[0], other) for other in theirs[1:])
    ours_far = max(float((ours[0] - other).abs().max()) for other in ours[1:])
    return Judged(far, SAME_NATS, says, far <= SAME_NATS and ours_far > seen.tolerance)


@_check(
    "identical-logprob",
    "one log-prob at every position, where ours has different ones",
    "the logits are of one position only, or of none: suspect the gather of the last hidden states, then attention",
)
def _judge_identical_logprob(seen: Observations) -> Judged:
    pairs = (*zip(seen.scored, seen.scored_rows, strict=True), *zip(seen.generated, seen.generated_rows, strict=True))
    longest = max((_longest_false_run(*pair, seen.tolerance) for pair in pairs), default=0)
    has_any = any(sum(row.logprob is not None for row in reading.scored) > LONGEST_RUN for reading, _ in pairs)
    says = "positions in a row with the same log-prob, where ours differ" if has_any else "fewer than 5 log-probs"
    return Judged(longest if has_any else None, LONGEST_RUN, says, longest > LONGEST_RUN)


@_check(
    "text-tokens",
    "a text that the server splits into other tokens; only where it takes no token ids",
    "another tokenizer, or a BOS that one side adds (add_bos_token)",
)
def _judge_text_tokens(seen: Observations) -> Judged:
    if seen.text_ids is None:
        return Judged(None, 0, "token ids were sent")
    if seen.text_ids[0] is None:
        return Judged(None, 0, "the server takes text only, and does not tell its ids")
    off, says = ids_apart(seen.text_ids[0], seen.text_ids[1])
    return Judged(off, 0, says, off > 0)


@_check(
    "unrepeatable",
    "a prompt that the server knows, alone, answered differently twice",
    "others' requests change the answer, or chance does: keep other clients away and ask again; if it stays, suspect"
    " memory that is read before it is written",
)
def _judge_unrepeatable(seen: Observations) -> Judged:
    says = "nats of an answer, between two alone to a known prompt, the worst of them"
    return _least_of_rounds([[far for far in it.alone if far is not None] for it in seen.rounds], max, seen, says)


@_check(
    "cold-cached",
    "the same request answered differently when it comes again, and alike from then on",
    "switch the prefix cache off and ask again; sliding-window rings must not be shared between requests",
)
def _judge_cold_cached(seen: Observations) -> Judged:
    says = "nats of an answer, between the first and the same again, reached by half of the prompts"
    if _judge_unrepeatable(seen).is_found:
        return Judged(None, seen.tolerance, "answers to a known prompt differ already, without any cache")
    rounds = [it.cold(seen.tolerance) for it in seen.rounds if it.is_cold]
    return _least_of_rounds(rounds, median_high, seen, says)


@_check(
    "batch-dependent",
    "the same request answered differently in company, and alike when alone",
    "limit the server to one sequence and raise it: suspect padding rows, graph sizes and shared workspaces",
)
def _judge_batch_dependent(seen: Observations) -> Judged:
    num_together = sum(map(len, seen.rounds[0].together))
    says = f"nats of an answer, between alone and among {num_together} at once, the worst of them"
    return _least_of_rounds([it.company(seen.tolerance) for it in seen.rounds], max, seen, says)


@_check(
    "computes-otherwise",
    "log-probs of the same tokens are further from ours than BF16 activations and an FP8 cache explain",
    "the same tokens, other numbers: compare its config.json (rope_theta and its scaling, swiglu_limit), how it joins"
    " the scales of fused projections, and its kernels; ownpath verify proves ours",
)
def _judge_computes_otherwise(seen: Observations) -> Judged:
    return _judge_distances(seen.distances, seen.tolerance)


@_check(
    "answers-otherwise",
    "log-probs of the server's own answers are too far from ours, although those of prompts are not",
    "prompts are right and decode steps wrong: suspect kernels for few rows (hyper-connections), CUDA graphs and what"
    " is written into the cache; in vLLM, ownpath verify --engine vllm names the module",
)
def _judge_answers_otherwise(seen: Observations) -> Judged:
    if seen.answer_distances is None:
        return Judged(None, 1.0, "the answers are what is compared")
    if _judge_computes_otherwise(seen).is_found:
        return Judged(None, 1.0, "its prompts' log-probs are off already")
    return _judge_distances(seen.answer_distances, seen.tolerance)


def _judge_distances(it: Distances, tolerance: float) -> Judged:
    if it.mean_delta is None or it.share_far is None:
        return Judged(None, 1.0, "no finite log-probs of tokens that are known")
    wide = widening(it.num_compared)
    budgets = [
        (it.mean_delta, wide * tolerance / 2, "mean |ours - theirs| {:.3g} nats (budget {:.3g})"),
        (it.share_far, wide * SHARE_FAR, f"{{:.1%}} beyond {tolerance:g} nats ({{:.0%}})"),
    ]
    if it.median_kl is not None and it.num_compared >= FEW:  # quadratic in nats
        budgets.append((it.median_kl, wide * tolerance**2 / 50, "median KL at least {:.2g} ({:.2g})"))
    says = ", ".join(text.format(value, limit) for value, limit, text in budgets)
    worst = max(value / limit if limit else math.inf if value else 0.0 for value, limit, _ in budgets)
    return Judged(worst, 1.0, says + "; this many times a budget at most", worst > 1.0)


@_check(
    "prompt-template",
    "a conversation that the server writes in other tokens than any mode of the model's format",
    "give the server the model's own chat encoding; V4 has no Jinja template",
)
def _judge_prompt_template(seen: Observations) -> Judged:
    matches = [it.match for it in seen.conversations if it.match is not None]
    if not matches:
        return Judged(None, 0, "the server does not tell the tokens of a conversation")
    worst = max(matches, key=lambda match: match.off)
    return Judged(worst.off, 0, worst.says, worst.off > 0)


@_check(
    "default-mode",
    "the server thinks unless told otherwise, and the model here does not; no fault, but answers to the same request"
    " differ",
    "say in each request whether to think, in the field that this server reads",
)
def _judge_default_mode(seen: Observations) -> Judged:
    default = next((it for it in seen.conversations if not it.wish), None)
    if default is None or default.mode is None:
        return Judged(None, 0, "the server does not tell how it opens an answer, or in no mode of the model")
    if not default.mode.thinks:
        return Judged(0, 0, "without a wish, the server answers without thinking, as the model here does")
    obeyed = next((it.wish for it in seen.conversations if it.mode is not None and not it.mode.thinks), None)
    end = f"with {obeyed} it does not" if obeyed else "no field that was tried stops it"
    return Judged(1, 0, f"without a wish, its mode is {default.mode.name}; {end}", is_noted=True)


@_check(
    "reasoning-swallowed",
    "text was generated, and the answer shows none of it, or shows it as reasoning where the prompt asked for none",
    "the reasoning parser waits for </think> or drops what it holds: switch it off, or thinking on in the request",
)
def _judge_reasoning_swallowed(seen: Observations) -> Judged:
    judged = [hidden for hidden in map(_hidden_tokens, seen.conversations) if hidden is not None]
    if not judged:
        return Judged(None, 0, "the server does not tell what it generated, or how it opened the answer")
    number, says = max(judged)
    return Judged(number, 0, says, number > 0)


def _hidden_tokens(it: Conversation) -> tuple[int, str] | None:
    """Counts generated tokens that the answer should show and does not; None where that cannot be known."""
    says, chat = "generated tokens that neither content, reasoning nor tool calls show", it.reading
    if it.text is not None:
        num_made = len(chat.ids or ()) if it.text.strip() else 0
    elif chat.num_tokens is not None:  # only a count; an answer that ends at once is one token, EOS
        num_made = max(chat.num_tokens - 1, 0)
    else:
        return None
    if chat.content.strip() or chat.has_calls or not num_made:
        return 0, says
    if not chat.reasoning.strip():
        return num_made, says
    thinks = {mode.thinks for mode in it.match.candidates} if it.match is not None else set()
    if thinks != {False}:
        return None if not thinks or len(thinks) > 1 else (0, says)
    return num_made, "generated tokens, all in the reasoning field: the prompt told the model not to think"


def _least_of_rounds(
    rounds: Sequence[Sequence[float]], pick: Callable[[Sequence[float]], float], seen: Observations, says: str
) -> Judged:
    """Judges the least of what each round shows: what does not come back is chance."""
    if not rounds or not all(rounds):
        return Judged(None, seen.tolerance, "no log-probs, or no prompt is answered alike when alone")
    number = min(map(pick, rounds))
    return Judged(number, seen.tolerance, says, number > seen.tolerance)


def _is_bad(row: ScoredPosition) -> bool:
    return row.logprob is None or not all(math.isfinite(value) for value in (row.logprob, *row.top.values()))


def _by_token(row: ScoredPosition) -> dict[int | None, float]:
    own = {} if row.logprob is None else {row.token_id: row.logprob}
    return own | dict(row.top)


def _lists_apart(a: dict[int | None, float], b: dict[int | None, float]) -> float:
    return max((abs(a[i] - b[i]) for i in a), default=math.inf) if a.keys() == b.keys() else math.inf


def _longest_false_run(reading: SequenceReading, rows_PV: torch.Tensor, tolerance: float) -> int:
    """Returns the longest run of one log-prob over which ours move by more than the tolerance."""
    longest, start = 0, 0
    for n, row in enumerate(reading.scored):
        before = reading.scored[start].logprob
        if before is None or row.logprob is None or not abs(row.logprob - before) <= SAME_NATS:
            start = n
        ours = [float(rows_PV[k, reading.scored_ids[k]]) for k in range(start, n + 1)]
        if max(ours) - min(ours) > tolerance:
            longest = max(longest, n + 1 - start)
    return longest
