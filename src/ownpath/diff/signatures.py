"""Signatures of broken servers as seen from outside: one pure function each, from observations to a finding.

Where the model here behaves the same way, the server is not at fault: every signature is compared with ours.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ownpath.diff.compare import answer_divergence
from ownpath.diff.responses import ChatReading, ScoredPosition, SequenceReading
from ownpath.finding import Finding, Verdict

SAME_NATS = 2.0**-10
"""Log-probs closer than this are one log-prob: a BF16 logit between 16 and 32 that moves at all moves by 2**-3."""
LONGEST_RUN = 4


@dataclass(frozen=True)
class Observations:
    """All observations of one server. Prompt n's answers are at index n of each tuple.

    generated: alone, the first time. cached: the same again. together: at once with all others, several a prompt.
    scored: the sequences that are compared. *_rows: our log-probs of them; ``generated_rows`` always has a first row.
    text_ids: each prompt as the server reads its text and as we do, where text was sent; None where it does not tell.
    """

    generated: tuple[SequenceReading, ...]
    generated_rows: tuple[torch.Tensor, ...]
    cached: tuple[SequenceReading, ...]
    together: tuple[tuple[SequenceReading, ...], ...]
    scored: tuple[SequenceReading, ...]
    scored_rows: tuple[torch.Tensor, ...]
    chat: ChatReading | None
    chat_ids: tuple[int, ...]
    text_ids: tuple[tuple[int, ...] | None, tuple[int, ...]] | None
    special_ids: frozenset[int]
    tolerance: float


def _check(name: str, number: float | None, threshold: float, says: str, remedy: str, is_found: bool) -> Finding:
    """Judges one signature. FAIL: the number is beyond the threshold, as ``says`` explains. SKIPPED: there is no
    number."""
    if number is None:
        return Finding(name, "", Verdict.SKIPPED, says, limit=threshold)
    verdict = Verdict.FAIL if is_found else Verdict.PASS
    return Finding(name, "", verdict, says, number, remedy=remedy if is_found else "", limit=threshold)


def non_finite(seen: Observations) -> Finding:
    """Log-probs that are NaN, infinite or null."""
    rows = [row for reading in (*seen.scored, *seen.generated) for row in reading.all_rows]
    bad = sum(_is_bad(row) for row in rows)
    says = f"{bad} of {len(rows)} log-probs are NaN, infinite or missing"
    remedy = "a kernel wrote NaN: look for uninitialised scales and padding rows (ownpath inspect), or another kernel"
    return _check("non-finite", bad if rows else None, 0, says, remedy, bad > 0)


def all_special(seen: Observations) -> Finding:
    """Answers of nothing but special tokens (BOS, EOS, padding), or of nothing, where ours would write text."""
    rows = [row for reading in seen.generated for row in reading.all_rows]
    num_special = sum(row.token_id in seen.special_ids for row in rows)
    is_bare = num_special == len(rows) and all(r.all_rows or r.is_stopped for r in seen.generated)
    ours_write = any(int(rows_PV[0].argmax()) not in seen.special_ids for rows_PV in seen.generated_rows)
    share = num_special / len(rows) if rows else 1.0
    says = f"{num_special} of {len(rows)} generated tokens are special, and our model writes text"
    remedy = "content is empty because special tokens are hidden; read the raw ids, then suspect the model runner"
    return _check("all-special", share, 1.0, says, remedy, is_bare and ours_write)


def input_independent(seen: Observations) -> Finding:
    """The same log-probs after different prompts."""
    theirs = [_by_token(reading.all_rows[0]) for reading in seen.generated if reading.all_rows]
    ours = [rows_PV[0] for rows_PV in seen.generated_rows]
    says = "the log-probs after different prompts differ by this much at most"
    if len(theirs) < 2 or len(theirs) < len(ours):
        return _check("input-independent", None, SAME_NATS, says, "", False)
    far = max(_lists_apart(theirs[0], other) for other in theirs[1:])
    ours_far = max(float((ours[0] - other).abs().max()) for other in ours[1:])
    remedy = "the logits do not depend on the input: another model runner, or CUDA graphs off (stale input buffers)"
    is_found = far <= SAME_NATS and ours_far > seen.tolerance
    return _check("input-independent", far, SAME_NATS, says, remedy, is_found)


def identical_logprob(seen: Observations) -> Finding:
    """One log-prob at every position, where ours has different ones."""
    longest = 0
    pairs = (*zip(seen.scored, seen.scored_rows, strict=True), *zip(seen.generated, seen.generated_rows, strict=True))
    for reading, rows_PV in pairs:
        longest = max(longest, _longest_false_run(reading, rows_PV, seen.tolerance))
    has_any = any(len(reading.scored) > LONGEST_RUN for reading, _ in pairs)
    says = "positions in a row with the same log-prob, where ours differ"
    remedy = (
        "the logits are of one position only, or of none: suspect the gather of the last hidden states, then attention"
    )
    return _check("identical-logprob", longest if has_any else None, LONGEST_RUN, says, remedy, longest > LONGEST_RUN)


def prompt_template(seen: Observations) -> Finding:
    """A conversation that the server writes in other tokens than the model's format."""
    name, remedy = "prompt-template", "give the server the model's own chat encoding; V4 has no Jinja template"
    chat = seen.chat
    if chat is None or (chat.prompt_ids is None and chat.num_prompt_tokens is None):
        return _check(name, None, 0, "the server does not tell the tokens of a conversation", remedy, False)
    if chat.prompt_ids is None:
        off = abs((chat.num_prompt_tokens or 0) - len(seen.chat_ids))
        says = f"the server counts {chat.num_prompt_tokens} prompt tokens, the model's format {len(seen.chat_ids)}"
        return _check(name, off, 0, says, remedy, off > 0)
    off, says = _ids_apart(chat.prompt_ids, seen.chat_ids)
    return _check(name, off, 0, says, remedy, off > 0)


def text_tokens(seen: Observations) -> Finding:
    """A text that the server splits into other tokens; only where it takes no token ids."""
    name, remedy = "text-tokens", "another tokenizer, or a BOS that one side adds (add_bos_token)"
    if seen.text_ids is None or seen.text_ids[0] is None:
        says = (
            "token ids were sent" if seen.text_ids is None else "the server takes text only, and does not tell its ids"
        )
        return _check(name, None, 0, says, remedy, False)
    off, says = _ids_apart(seen.text_ids[0], seen.text_ids[1])
    return _check(name, off, 0, says, remedy, off > 0)


def reasoning_swallowed(seen: Observations) -> Finding:
    """Text was generated, and the answer shows none of it."""
    name, says = "reasoning-swallowed", "generated tokens that neither content, reasoning nor tool calls show"
    chat = seen.chat
    if chat is None or (chat.ids is None and chat.num_tokens is None):
        return _check(name, None, 0, says, "", False)
    if chat.ids is not None:
        hidden = sum(i not in seen.special_ids for i in chat.ids)
    else:  # only a count; an answer that ends at once is one token, EOS
        hidden = max((chat.num_tokens or 0) - 1, 0)
    if chat.content.strip() or chat.has_calls:
        hidden = 0
    elif chat.reasoning:
        says = "generated tokens, all in the reasoning field: the request did not ask for reasoning"
    remedy = (
        "the reasoning parser waits for </think> or drops what it holds: switch it off, or thinking on in the request"
    )
    return _check(name, hidden, 0, says, remedy, hidden > 0)


def cold_cached(seen: Observations) -> Finding:
    """The same request answered differently when it comes again."""
    far, where = _worst(zip(seen.generated, seen.cached, strict=True))
    says = f"nats between the first answer and the same again{where}"
    remedy = "switch the prefix cache off and ask again; sliding-window rings must not be shared between requests"
    return _check("cold-cached", far, seen.tolerance, says, remedy, far is not None and far > seen.tolerance)


def batch_dependent(seen: Observations) -> Finding:
    """The same request answered differently in company."""
    pairs = ((alone, other) for alone, others in zip(seen.cached, seen.together, strict=True) for other in others)
    far, where = _worst(pairs)
    says = f"nats between an answer alone and among {sum(map(len, seen.together))} at once{where}"
    remedy = "limit the server to one sequence and raise it: suspect padding rows, graph sizes and shared workspaces"
    return _check("batch-dependent", far, seen.tolerance, says, remedy, far is not None and far > seen.tolerance)


SIGNATURES: tuple[Callable[[Observations], Finding], ...] = (
    non_finite,
    all_special,
    input_independent,
    identical_logprob,
    text_tokens,
    prompt_template,
    reasoning_swallowed,
    cold_cached,
    batch_dependent,
)
"""Causes before their consequences: the first signature found is the diagnosis."""


def all_checks(seen: Observations) -> tuple[Finding, ...]:
    """Runs every signature, in that order."""
    return tuple(signature(seen) for signature in SIGNATURES)


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


def _ids_apart(theirs: Sequence[int], ours: Sequence[int]) -> tuple[int, str]:
    """Counts the places that differ, and describes the first of them."""
    num_common = min(len(theirs), len(ours))
    places = [n for n in range(num_common) if theirs[n] != ours[n]]
    off = len(places) + abs(len(theirs) - len(ours))
    if not off:
        return 0, f"the same {len(ours)} tokens"
    first = places[0] if places else num_common
    shown = [str(list(ids[first : first + 4])) for ids in (theirs, ours)]
    return off, f"{len(theirs)} tokens, ours {len(ours)}; from place {first} {shown[0]}, ours {shown[1]}"


def _worst(pairs: Iterable[tuple[SequenceReading, SequenceReading]]) -> tuple[float | None, str]:
    worst: float | None = None
    where = ""
    for first, second in pairs:
        parting = answer_divergence(first, second)
        if parting is not None and (worst is None or parting.far > worst):
            worst, where = parting.far, f", at position {parting.idx}"
    return worst, where
