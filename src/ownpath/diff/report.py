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
from ownpath.finding import Finding, Verdict
from ownpath.terminal.page import facts, line
from ownpath.terminal.text import counted

_WORDS = MappingProxyType({Verdict.PASS: "ok", Verdict.FAIL: "found", Verdict.SKIPPED: "not asked"})
_UNKNOWN = "no known cause: the server reads, caches and batches alike, and computes something else"


def numbers(difference: Difference) -> dict[str, float | int | None]:
    """Averages and counts over positions. Units: nats; None where nothing was given."""
    positions = [p for comparison in difference.comparisons for p in comparison.positions]
    deltas = [abs(p.ours - p.theirs) for p in positions if p.theirs is not None]
    ranked = [p for p in positions if p.gap is not None]
    kls = [p.kl for p in positions if p.kl is not None]
    return {
        "num_positions": len(positions),
        "num_divergent": difference.num_divergent,
        "mean_delta": _mean(deltas),
        "max_delta": _max(deltas),
        "num_ranked": len(ranked),
        "num_same_likeliest": sum(p.gap == 0 for p in ranked),
        "mean_kl_at_least": _mean(kls),
        "max_kl_at_least": _max(kls),
        "mean_outside": _mean([p.outside for p in positions if p.outside is not None]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _max(values: Sequence[float]) -> float | None:
    """Returns the maximum; NaN if there is one."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=None)


def first_divergence(difference: Difference) -> tuple[int, PositionComparison] | None:
    """Returns the first divergence of the first prompt that has one."""
    for comparison in difference.comparisons:
        position = comparison.first_divergence(difference.tolerance)
        if position is not None:
            return comparison.prompt_idx, position
    return None


def difference_page(
    difference: Difference, server: RemoteServer, tokenizer: Tokenizer, name: str
) -> list[RenderableType]:
    """Returns the verdict, the diagnosis, then the numbers."""
    verdict = "AGREE" if difference.agrees else "DIFFER"
    rows = [("found", f"{c.id}: {_shown(c.number)} ({c.message}; bound {c.limit:.3g})") for c in difference.found]
    rows += [("remedy", c.remedy) for c in difference.found[:1]]
    rows += [] if difference.agrees or difference.found else [("found", _UNKNOWN)]
    rows += _number_rows(difference, server, tokenizer)
    rows += [("not asked", f"{c.id}: {c.message}") for c in difference.checks if c.verdict is Verdict.SKIPPED]
    return [line(f"{name} against {server.client.root}: ", verdict), facts(rows)]


def _number_rows(difference: Difference, server: RemoteServer, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    n, asked = numbers(difference), server.request_form
    sent = "token ids" if asked.sends_ids else "text"
    prompts = counted(len(difference.comparisons), "prompt")
    return [
        ("asked", f"{server.form} log-probs at {asked.path}, {sent} sent, {asked.num_top} likeliest tokens"),
        ("positions", f"{n['num_positions']} of {prompts}, {n['num_divergent']} differ by more than the bound"),
        ("first", _first(difference, tokenizer)),
        (
            "log-probs",
            f"mean |ours - theirs| {_shown(n['mean_delta'])}, max {_shown(n['max_delta'])} nats"
            f" (bound {difference.tolerance:g})",
        ),
        ("likeliest", f"the same token at {n['num_same_likeliest']} of {n['num_ranked']} positions"),
        (
            "KL",
            f"at least {_shown(n['mean_kl_at_least'])} in the mean, {_shown(n['max_kl_at_least'])} at most;"
            f" their list leaves out {_shown(n['mean_outside'])} of the probability",
        ),
        ("looked for", f"{_pass_line(difference)}: none"),
    ]


def difference_dict(difference: Difference, server: RemoteServer, name: str, seed: int) -> dict[str, object]:
    """Returns the same for programs. What is not finite is written as a string: JSON has no word for it."""
    first = first_divergence(difference)
    whole = {
        "model": name,
        "url": server.client.root,
        "agrees": difference.agrees,
        "diagnosis": difference.found[0].id if difference.found else None,
        "form": server.form,
        "path": server.request_form.path,
        "sends_ids": server.request_form.sends_ids,
        "num_top": server.request_form.num_top,
        "refused": list(server.notes),
        "seed": seed,
        "tolerance": difference.tolerance,
        "numbers": numbers(difference),
        "first_divergence": None if first is None else {"prompt_idx": first[0], **asdict(first[1])},
        "checks": [_check_dict(check) for check in difference.checks],
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


def _pass_line(difference: Difference) -> str:
    return ", ".join(check.id for check in difference.checks if check.verdict is Verdict.PASS) or "nothing"


def _check_dict(check: Finding) -> dict[str, object]:
    return {
        "id": check.id,
        "verdict": _WORDS[check.verdict],
        "number": check.number,
        "threshold": check.limit,
        "says": check.message,
        "remedy": check.remedy,
    }


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
