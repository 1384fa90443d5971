"""Counts and durations of the server, in Prometheus' text format. Only the event loop touches it: no lock is needed."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from starlette.types import Scope

from ownpath.engine.load import DraftCounts, Durations, EngineLoad
from ownpath.server.empty_content import EmptyContent
from ownpath.server.route_table import ROUTES
from ownpath.server.timeline import Timeline

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "tool_calls", "error", "abandoned")
"""``abandoned``: nobody waited for the rest, or another prompt of the same request failed."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
"""Upper bounds of the histograms' buckets, from one decoded token to the longest answer."""
PHASES = {
    "queue": "From arrival to the first step.",
    "prefill": "From the first step to the first token.",
    "decode": "From the first token to the last.",
}
_PATHS = frozenset(route.path for route in ROUTES if "{" not in route.path)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Histogram(Durations):
    """Durations of what the server sees."""

    def __init__(self) -> None:
        super().__init__(SECONDS)

    def observe_between(self, since: float, times: Sequence[float]) -> None:
        """Counts the durations from one point in time to the next, beginning with ``since``."""
        last = since
        for point in times:
            self.counts[bisect_left(SECONDS, point - last)] += 1
            last = point
        self.total_s += last - since


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
        self._latency = Histogram()
        self._phases = {phase: Histogram() for phase in PHASES}

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

    def observe_answer(self, timeline: Timeline) -> None:
        """Counts how long an answer took that ended by itself, and each of its phases that it reached."""
        for phase, (begin, end) in timeline.phases().items():
            self._phases[phase].observe(end - begin)
        if timeline.ended is not None:
            self._latency.observe(timeline.ended - timeline.arrived)

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
            *_engine_lines(load),
            *_label_lines("requests_total", "Prompts whose answer ended, by why.", "finish_reason", finished),
            *_plain(
                "corrupted_requests_total", "Prompts whose logits or index scores were not finite.", self._num_corrupted
            ),
            *_label_lines("empty_contents_total", "Answers without content, by why.", "reason", empty),
            *_plain("prompt_tokens_total", "Tokens of prompts taken.", self._num_prompt_tokens),
            *_plain("generation_tokens_total", "Tokens generated.", self._num_tokens),
            *_histogram("time_to_first_token_seconds", "From arrival to the first token.", self.time_to_first_token),
            *_histogram("time_per_output_token_seconds", "Between two tokens.", self.time_per_output_token),
            *_histogram("e2e_request_latency_seconds", "From arrival to the end of the answer.", self._latency),
            *(
                line
                for phase, text in PHASES.items()
                for line in _histogram(f"request_{phase}_time_seconds", text, self._phases[phase])
            ),
            *_head("http_requests_total", "HTTP answers.", "counter"),
            *(
                f'ownpath_http_requests_total{{handler="{path}",method="{method}",status="{status}"}} {count}'
                for (path, method, status), count in sorted(self._http.items())
            ),
        ]
        return "\n".join(lines) + "\n"


def _engine_lines(load: EngineLoad) -> list[str]:
    """Renders what the engine counts."""
    counts = load.counts
    return [
        *_plain("kv_cache_blocks_used", "Blocks of the caches that requests hold.", load.blocks.used, "gauge"),
        *_plain("kv_cache_blocks", "Blocks of the caches.", load.blocks.total, "gauge"),
        *_plain("kv_cache_slots_used", "Slots of the caches that requests hold.", load.slots.used, "gauge"),
        *_plain("kv_cache_slots", "Slots of the caches.", load.slots.total, "gauge"),
        *_plain("prefix_cache_queries_total", "Prompt tokens looked up for their prefix.", counts.num_prefix_queried),
        *_plain("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", counts.num_prefix_hit),
        *_plain("prefix_cache_hit_requests_total", "Prompts that began where others had been.", counts.num_prefix_hits),
        *_plain("prefix_snapshots_taken_total", "Snapshots that the prefix cache took.", counts.num_snapshots_taken),
        *_plain("prefix_snapshots_evicted_total", "Snapshots given up for others.", counts.num_snapshots_evicted),
        *_plain("prefix_blocks_evicted_total", "Known blocks given up for requests.", counts.num_blocks_evicted),
        *_plain("num_preemptions_total", "Times that a running prompt had to wait again.", counts.num_preempted),
        *_plain("step_retries_total", "Failed steps that ran again, prompt by prompt.", counts.num_step_retries),
        *_plain("kernels_compiled_total", "Kernels first needed after the start.", load.num_compiled),
        *_plain("graphs_captured_total", "Graphs captured after the start.", load.num_captured),
        *_plain("graph_replays_total", "Steps that a captured graph ran.", load.num_replays),
        *_histogram("step_time_seconds", "From the later of a step's launch and the last one's end.", load.times.busy),
        *_histogram("step_gap_seconds", "The device's wait between two steps in a row.", load.times.gaps),
        *_draft_lines(load.drafts),
    ]


def _draft_lines(drafts: DraftCounts) -> list[str]:
    """Renders how often guesses were right. A step has one guess of each request, at position 0."""
    per_position = {"0": drafts.num_right}
    return [
        *_plain("spec_decode_num_draft_tokens_total", "Tokens that were guessed.", drafts.num_guesses),
        *_plain("spec_decode_num_accepted_tokens_total", "Guesses that were right.", drafts.num_right),
        *_label_lines("spec_decode_num_accepted_tokens_per_pos_total", "The same, by place.", "position", per_position),
        *_plain("spec_decode_steps_total", "Steps with drafts.", drafts.num_steps),
    ]


def _histogram(name: str, text: str, durations: Durations) -> Iterable[str]:
    """Yields the series: each bucket counts what is at most its bound."""
    yield from _head(name, text, "histogram")
    total = 0
    for bound, count in zip((*(f"{bound:g}" for bound in durations.bounds), "+Inf"), durations.counts, strict=True):
        total += count
        yield f'ownpath_{name}_bucket{{le="{bound}"}} {total}'
    yield f"ownpath_{name}_sum {durations.total_s:.9f}"
    yield f"ownpath_{name}_count {total}"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP ownpath_{name} {text}", f"# TYPE ownpath_{name} {kind}"]


def _plain(name: str, text: str, value: float, kind: str = "counter") -> list[str]:
    return [*_head(name, text, kind), f"ownpath_{name} {value}"]


def _label_lines(name: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    series = [f'ownpath_{name}{{{label}="{key}"}} {value}' for key, value in values.items()]
    return [*_head(name, text, "counter"), *series]
