"""Counters since the start, in Prometheus' text format. Only the event loop touches them: no lock is needed."""

from collections import Counter
from collections.abc import Mapping

from ownpath.server.empty_content import EmptyContent

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "tool_calls", "error", "abandoned")
"""``abandoned``: nobody waited for the rest, or another prompt of the same request failed."""


class Metrics:
    """Counts answers and tokens, per prompt (a completions request may have several)."""

    def __init__(self) -> None:
        self._finished: Counter[str] = Counter()
        self._empty: Counter[str] = Counter()
        self._num_corrupted = 0
        self._num_tokens = 0

    def count_token(self) -> None:
        """Counts one generated token."""
        self._num_tokens += 1

    def count_finished(self, reason: str, empty: EmptyContent | None = None) -> None:
        """Counts an ended answer; ``empty`` says why it has no content."""
        assert reason in FINISH_REASONS, reason
        self._finished[reason] += 1
        if empty is not None:
            self._empty[empty.value] += 1

    def count_corrupted(self) -> None:
        """Counts an answer that ended because of logits that are not finite; it is counted as finished too."""
        self._num_corrupted += 1

    def render(self) -> str:
        """Renders the page. Every series is there from the start, so that its first event is a step from 0."""
        finished = {reason: self._finished[reason] for reason in FINISH_REASONS}
        empty = {reason.value: self._empty[reason.value] for reason in EmptyContent}
        lines = [
            *_label_lines("requests", "Prompts whose answer ended, by why.", "finish_reason", finished),
            *_plain("corrupted_requests", "Prompts whose logits were not finite.", self._num_corrupted),
            *_label_lines("empty_contents", "Answers without content, by why.", "reason", empty),
            *_plain("generated_tokens", "Tokens generated.", self._num_tokens),
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, text: str) -> list[str]:
    return [f"# HELP ownpath_{name}_total {text}", f"# TYPE ownpath_{name}_total counter"]


def _plain(name: str, text: str, value: int) -> list[str]:
    return [*_head(name, text), f"ownpath_{name}_total {value}"]


def _label_lines(name: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    series = [f'ownpath_{name}_total{{{label}="{key}"}} {value}' for key, value in values.items()]
    return [*_head(name, text), *series]
