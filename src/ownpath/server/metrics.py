"""Counts and durations of the server, in Prometheus' text format. Only the event loop touches it: no lock is needed."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from starlette.types import Scope

from ownpath.engine.load import EngineLoad
from ownpath.server.empty_content import EmptyContent
from ownpath.server.route_table import ROUTES

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "tool_calls", "error", "abandoned")
"""``abandoned``: nobody waited for the rest, or another prompt of the same request failed."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
"""Upper bounds of the histograms' buckets, from one decoded token to the longest answer."""
_PATHS = frozenset(route.path for route in ROUTES if "{" not in route.path)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Histogram:
    """Counts durations by upper bound."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def observe_between(self, since: float, times: Sequence[float]) -> None:
        """Counts the durations from one point in time to the next, beginning with ``since``."""
        last = since
        for point in times:
            self._counts[bisect_left(SECONDS, point - last)] += 1
            last = point
        self._sum += last - since

    def lines(self, name: str, text: str) -> Iterable[str]:
        """Returns the series: each bucket counts what is at most its bound."""
        yield from _head(name, text, "histogram")
        total = 0
        for bound, count in zip((*(f"{bound:g}" for bound in SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'ownpath_{name}_bucket{{le="{bound}"}} {total}'
        yield f"ownpath_{name}_sum {self._sum:.6f}"
        yield f"ownpath_{name}_count {total}"


class Metrics:
    """Counts answers and tokens, per prompt (a completions request may have several), and HTTP answers."""

    def __init__(self) -> None:
        self._finished: Counter[str] = Counter()
        self._empty: Counter[str] = Counter()
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._num_corrupted = 0
        self._num_tokens = 0
        self._num_prompt_tokens = 0
        self.time_to_first_token = Histogram()
        self.time_per_output_token = Histogram()
        self.request_latency = Histogram()

    def count_tokens(self, count: int) -> None:
        """Counts generated tokens."""
        self._num_tokens += count

    def count_prompt(self, num_tokens: int) -> None:
        """Counts the tokens of a prompt that the engine has taken."""
        self._num_prompt_tokens += num_tokens

    def count_finished(self, reason: str, empty: EmptyContent | None = None) -> None:
        """Counts an ended answer; ``empty`` says why it has no content."""
        assert reason in FINISH_REASONS, reason
        self._finished[reason] += 1
        if empty is not None:
            self._empty[empty.value] += 1

    def count_corrupted(self) -> None:
        """Counts an answer that ended because of numbers that are not finite; it is counted as finished too."""
        self._num_corrupted += 1

    def count_http(self, scope: Scope, status: int | None) -> None:
        """Counts an HTTP answer; 499 without a status: the client went. What clients may name is counted as other."""
        path = scope["path"] if scope["path"] in _PATHS else "other"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._http[path, method, str(status or 499)] += 1

    def render(self, load: EngineLoad) -> str:
        """Renders the page. Every series without a status is there from the start, so that its first event is a step
        from 0."""
        finished = {reason: self._finished[reason] for reason in FINISH_REASONS}
        empty = {reason.value: self._empty[reason.value] for reason in EmptyContent}
        lines = [
            *_plain("num_requests_running", "Prompts that run now.", load.num_running, "gauge"),
            *_plain("num_requests_waiting", "Prompts that wait to run.", load.num_waiting, "gauge"),
            *_plain("kv_cache_usage_perc", "Share of the caches in use; 1 is all.", round(load.cache_use, 6), "gauge"),
            *_plain("kernels_compiled_total", "Kernels first needed after the start.", load.num_compiled),
            *_plain("graphs_captured_total", "Graphs captured after the start.", load.num_captured),
            *_label_lines("requests_total", "Prompts whose answer ended, by why.", "finish_reason", finished),
            *_plain(
                "corrupted_requests_total", "Prompts whose logits or index scores were not finite.", self._num_corrupted
            ),
            *_label_lines("empty_contents_total", "Answers without content, by why.", "reason", empty),
            *_plain("prompt_tokens_total", "Tokens of prompts taken.", self._num_prompt_tokens),
            *_plain("generation_tokens_total", "Tokens generated.", self._num_tokens),
            *self.time_to_first_token.lines("time_to_first_token_seconds", "From arrival to the first token."),
            *self.time_per_output_token.lines("time_per_output_token_seconds", "Between two tokens, in the engine."),
            *self.request_latency.lines("e2e_request_latency_seconds", "From arrival to the end of the answer."),
            *_head("http_requests_total", "HTTP answers.", "counter"),
            *(
                f'ownpath_http_requests_total{{handler="{path}",method="{method}",status="{status}"}} {count}'
                for (path, method, status), count in sorted(self._http.items())
            ),
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP ownpath_{name} {text}", f"# TYPE ownpath_{name} {kind}"]


def _plain(name: str, text: str, value: float, kind: str = "counter") -> list[str]:
    return [*_head(name, text, kind), f"ownpath_{name} {value}"]


def _label_lines(name: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    series = [f'ownpath_{name}{{{label}="{key}"}} {value}' for key, value in values.items()]
    return [*_head(name, text, "counter"), *series]
