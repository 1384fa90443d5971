"""Formats a difference for people and for programs."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from rich.console import RenderableType

from ownpath.chat.tokenizer import Tokenizer
from ownpath.diff.compare import PositionComparison
from ownpath.diff.server import RemoteServer
from ownpath.diff.survey import Difference
from ownpath.finding import Finding, Verdict, warned
from ownpath.terminal.page import facts, line
from ownpath.terminal.text import counted

_WORDS = MappingProxyType(
    {Verdict.PASS: "ok", Verdict.FAIL: "found", Verdict.WARN: "noted", Verdict.SKIPPED: "not asked"}
)


def numbers(difference: Difference) -> dict[str, float | int | None]:
    """Averages and counts over positions. Units: nats; None where nothing was given."""
    positions = [p for comparison in difference.comparisons for p in comparison.positions]
    ranked = [p for p in positions if p.gap is not None]
    outside = [p.outside for p in positions if p.outside is not None and math.isfinite(p.outside)]
    it = difference.distances
    return {
        "num_positions": len(positions),
        "num_compared": it.num_compared,
        "num_divergent": difference.num_divergent,
        "mean_delta": it.mean_delta,
        "median_delta": it.median_delta,
        "max_delta": it.max_delta,
        "share_far": it.share_far,
        "num_ranked": len(ranked),
        "num_same_likeliest": sum(p.gap == 0 for p in ranked),
        "mean_kl_at_least": it.mean_kl,
        "median_kl_at_least": it.median_kl,
        "max_kl_at_least": it.max_kl,
        "mean_outside": math.fsum(outside) / len(outside) if outside else None,
    }


def first_divergence(difference: Difference) -> tuple[int, PositionComparison] | None:
    """Returns the first divergence of the first prompt that has one."""
    for comparison in difference.comparisons:
        position = comparison.first_divergence(difference.tolerance)
        if position is not None:
            return comparison.prompt_idx, position
    return None


def difference_page(
    difference: Difference, server: RemoteServer, tokenizer: Tokenizer, name: str, suspects: Sequence[str] = ()
) -> list[RenderableType]:
    """Returns the verdict, each finding with its evidence and remedy, then the numbers.

    suspects: traits of the checkpoint that other engines are known to compute wrongly.
    """
    verdict = "AGREE" if difference.agrees else "DIFFER"
    rows = []
    for check in difference.found:
        rows += [("found", _evidence(check)), ("remedy", check.remedy)]
        rows += [("suspect", it) for it in suspects if check.id == "computes-otherwise"]
    for check in warned(difference.checks):
        rows += [("noted", f"{check.id}: {check.message}"), ("remedy", check.remedy)]
    rows += _number_rows(difference, server, tokenizer)
    rows += [("ok", _evidence(check)) for check in difference.checks if check.verdict is Verdict.PASS]
    rows += [("not asked", f"{c.id}: {c.message}") for c in difference.checks if c.verdict is Verdict.SKIPPED]
    return [line(f"{name} against {server.client.root}: ", verdict), facts(rows)]


def _number_rows(difference: Difference, server: RemoteServer, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    n, asked = numbers(difference), server.request_form
    sent = "token ids" if asked.sends_ids else "text"
    prompts = counted(len(difference.comparisons), "prompt")
    return [
        ("asked", f"{server.form} log-probs at {asked.path}, {sent} sent, {asked.num_top} likeliest tokens"),
        (
            "positions",
            f"{n['num_positions']} of {prompts}, {n['num_divergent']} diverge ({_share(n['share_far'])} by more than"
            f" {difference.tolerance:g} nats)",
        ),
        ("first", _first(difference, tokenizer)),
        (
            "log-probs",
            f"|ours - theirs| {_shown(n['mean_delta'])} in the mean, {_shown(n['median_delta'])} the median,"
            f" {_shown(n['max_delta'])} at most (nats)",
        ),
        ("likeliest", f"the same token at {n['num_same_likeliest']} of {n['num_ranked']} positions"),
        (
            "KL",
            f"at least {_shown(n['mean_kl_at_least'])} in the mean, {_shown(n['median_kl_at_least'])} the median,"
            f" {_shown(n['max_kl_at_least'])} at most; their list leaves out {_shown(n['mean_outside'])} of the"
            " probability",
        ),
    ]


def difference_dict(
    difference: Difference, server: RemoteServer, name: str, seed: int, suspects: Sequence[str] = ()
) -> dict[str, object]:
    """Returns the same for programs, with every position. What is not finite is written as a string: JSON has no word
    for it."""
    first = first_divergence(difference)
    whole = {
        "model": name,
        "url": server.client.root,
        "agrees": difference.agrees,
        "diagnosis": difference.found[0].id if difference.found else None,
        "found": [check.id for check in difference.found],
        "noted": [check.id for check in warned(difference.checks)],
        "suspects": list(suspects),
        "form": server.form,
        "path": server.request_form.path,
        "sends_ids": server.request_form.sends_ids,
        "num_top": server.request_form.num_top,
        "refused": list(server.notes),
        "seed": seed,
        "tolerance": difference.tolerance,
        "num_rounds": difference.num_rounds,
        "numbers": numbers(difference),
        "first_divergence": None if first is None else {"prompt_idx": first[0], **asdict(first[1])},
        "checks": [_check_dict(check) for check in difference.checks],
        "positions": [
            {
                "prompt_idx": comparison.prompt_idx,
                **asdict(position),
                "diverges": position.diverges(difference.tolerance),
            }
            for comparison in difference.comparisons
            for position in comparison.positions
        ],
    }
    finite: dict[str, object] = _finite(whole)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _first(difference: Difference, tokenizer: Tokenizer) -> str:
    first = first_divergence(difference)
    if first is None:
        return "no position differs by more than the bound"
    prompt_idx, position = first
    token = f"token {position.token_id} {tokenizer.token_text(position.token_id)!r}"
    values = f"ours {_shown(position.ours)}, theirs {_shown(position.theirs)}"
    return f"prompt {prompt_idx}, position {position.idx}, {token}: {values}"


def _evidence(check: Finding) -> str:
    return f"{check.id}: {_shown(check.number)} (bound {_shown(check.limit)}): {check.message}"


def _check_dict(check: Finding) -> dict[str, object]:
    return {
        "id": check.id,
        "verdict": _WORDS[check.verdict],
        "number": check.number,
        "threshold": check.limit,
        "says": check.message,
        "remedy": check.remedy,
    }


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
