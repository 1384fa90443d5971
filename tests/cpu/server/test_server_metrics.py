"""``/metrics``, and the reason that every empty content carries."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cpu.chat.small_tokenizer import FIRST_BYTE_ID, THINK_END_ID
from cpu.engine.fake_model import EOS_ID, MAX_SEQUENCES, FakeModel, random_rule, script_rule
from cpu.server.harness import (
    HELLO,
    MAX_MODEL_LEN,
    TOKENIZER,
    VOCAB,
    WAIT_S,
    Gated,
    Harness,
    chat_ids,
    error,
    eventually,
    harness,
)

from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.server.empty_content import EmptyContent
from ownpath.server.timeline import Timeline

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER_ID = 2
ROOM_FOR_TOOLS = 2048
THINKING = {"thinking": {"type": "enabled"}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
COUNTED = ("requests", "corrupted_requests", "empty_contents", "generation_tokens")


def counters(served: Harness) -> dict[str, int]:
    """The page's counters of answers and generated tokens that are not 0; checks its form."""
    found = {}
    for series, value in page(served).items():
        name, label = re.fullmatch(r'ownpath_(\w+)_total(?:\{\w+="(\w+)"\})?|.*', series).groups()  # type: ignore[union-attr]
        if name in COUNTED:
            found[f"{name} {label}" if label else name] = int(value)
    assert {f"empty_contents {reason.value}" for reason in EmptyContent} <= set(found)
    return {name: value for name, value in found.items() if value}


def page(served: Harness) -> dict[str, float]:
    """The page's series and their values; checks that each is declared with its type before it comes."""
    response = served.ask("GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")
    found, declared, helped = {}, {}, set()
    for line in response.text.splitlines():
        if line.startswith("# HELP "):
            helped.add(line.split()[2])
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            declared[name] = kind
        else:
            series, value = line.rsplit(" ", 1)
            family = series.partition("{")[0]
            if family not in declared:
                family = re.sub("_(bucket|sum|count)$", "", family)
                assert declared[family] == "histogram"
            assert declared[family] in ("counter", "gauge", "histogram")
            assert (declared[family] == "counter") == family.endswith("_total")
            assert family in helped
            assert series not in found
            found[series] = float(value)
    return found


def writing(ids: list[int], prompt_ids: list[int]) -> AbstractContextManager[Harness]:
    """A server whose model answers this prompt with these tokens, then EOS."""
    model = FakeModel(script_rule(ids, VOCAB, len(prompt_ids)), VOCAB, ROOM_FOR_TOOLS)
    return harness(model, max_model_len=ROOM_FOR_TOOLS)


def prompt_ids(**fields: Any) -> list[int]:
    with writing([], []) as served:
        ids: list[int] = served.chat(max_tokens=1, return_token_ids=True, **fields)["prompt_token_ids"]
        return ids


def ids_of(text: str) -> list[int]:
    """Token ids of what the model writes; markers spelled out are tokens."""
    return TOKENIZER.encode_raw(text)


CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n'
    '<｜DSML｜parameter name="a" string="true">b</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
EMPTY: dict[str, tuple[list[int], dict[str, Any]]] = {
    "eos_at_once": ([], {}),
    "only_special_tokens": ([USER_ID, USER_ID], {}),
    "cut_off_character": ([FIRST_BYTE_ID + 0xE2], {"max_tokens": 1}),
    "stop_string": (ids_of("hello"), {"stop": "h"}),
    "reasoning_exhausted": (ids_of("thinking and thinking"), {"max_tokens": 3, **THINKING}),
    "reasoning_not_closed": (ids_of("thinking"), THINKING),
    "nothing_after_reasoning": ([*ids_of("thinking"), THINK_END_ID], THINKING),
    "tool_calls": (ids_of(CALL), {"tools": [TOOL]}),
    "tool_parse_failed": (ids_of(CALL + "behind"), {"tools": [TOOL], "stop": "behind"}),
}


def test_every_reason_is_tried() -> None:
    assert set(EMPTY) == {reason.value for reason in EmptyContent}


@pytest.mark.parametrize("reason", EMPTY)
def test_empty_content_carries_its_reason(reason: str) -> None:
    ids, fields = EMPTY[reason]
    context = {name: value for name, value in fields.items() if name in ("thinking", "tools")}
    with writing(ids, prompt_ids(**context)) as served:
        (choice,) = served.chat(temperature=0, **fields)["choices"]
        assert not choice["message"]["content"]
        assert choice["empty_content"] == reason
        events = served.stream(CHAT, messages=HELLO, temperature=0, **fields)
        choices = [event["choices"][0] for event in events]
        assert [c["empty_content"] for c in choices if "empty_content" in c] == [reason]
        assert choices[-1]["empty_content"] == reason
        assert choices[-1]["finish_reason"] == choice["finish_reason"]
        assert counters(served)[f"empty_contents {reason}"] == 2
        assert served.settled()


@pytest.mark.parametrize("reason", ["eos_at_once", "only_special_tokens", "cut_off_character", "stop_string"])
def test_completions_say_why_too(reason: str) -> None:
    ids, fields = EMPTY[reason]
    prompt = [20, 21, 22]
    with writing(ids, prompt) as served:
        (choice,) = served.complete(prompt=prompt, temperature=0, **fields)["choices"]
        assert (choice["text"], choice["empty_content"]) == ("", reason)
        events = served.stream(COMPLETIONS, prompt=prompt, temperature=0, **fields)
        assert events[-1]["choices"][0]["empty_content"] == reason
        assert counters(served)[f"empty_contents {reason}"] == 2
        assert served.settled()


def test_content_has_no_reason(served: Harness) -> None:
    before = counters(served)
    assert "empty_content" not in served.chat(max_tokens=5)["choices"][0]
    scored = served.complete(prompt="hello", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert "empty_content" not in scored, "nothing was to be generated"
    after = counters(served)
    assert after["requests length"] == before.get("requests length", 0) + 2
    assert after["generation_tokens"] == before.get("generation_tokens", 0) + 5
    assert not any(name.startswith("empty_contents") for name in after)


POISON_ID = 40


def poisoned() -> FakeModel:
    """One token in the prompt makes the logits NaN."""
    healthy = random_rule(VOCAB)

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        return healthy(history) * (float("nan") if POISON_ID in history[:3] else 1.0)

    return FakeModel(rule, VOCAB, MAX_MODEL_LEN)


@pytest.mark.parametrize("is_stream", [False, True])
def test_logits_that_are_not_finite_end_their_request_and_are_counted(is_stream: bool) -> None:
    with harness(poisoned()) as served:
        response = served.post(COMPLETIONS, prompt=[20, POISON_ID, 21], max_tokens=4, stream=is_stream)
        if is_stream:
            assert '"code":"non_finite_logits"' in response.text
            assert "[DONE]" not in response.text
        else:
            assert error(response, 500)["code"] == "non_finite_logits"
        assert counters(served) == {"requests error": 1, "corrupted_requests": 1}
        assert served.complete(prompt=[20, 21, 22], max_tokens=4)["usage"]["completion_tokens"] == 4
        assert counters(served) == {
            "requests error": 1,
            "corrupted_requests": 1,
            "requests length": 1,
            "generation_tokens": 4,
        }
        assert served.settled()


def test_every_prompt_of_a_request_is_counted() -> None:
    """One prompt fails, which fails the whole request: nobody waits for the other one."""
    with harness(poisoned()) as served:
        served.complete(prompt=[[20, 21], [22, 23]], max_tokens=3, seed=1)
        assert counters(served) == {"requests length": 2, "generation_tokens": 6}
        error(served.post(COMPLETIONS, prompt=[[20, POISON_ID], [22, 23]], max_tokens=200), 500)
        found = counters(served)
        assert (found["requests error"], found["requests abandoned"]) == (1, 1)
        assert served.settled()


def test_eos_is_a_generated_token() -> None:
    with writing(ids_of("a"), [20, 21]) as served:
        answer = served.complete(prompt=[20, 21], return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == [*ids_of("a"), EOS_ID]
        assert counters(served) == {"requests stop": 1, "generation_tokens": 2}


def test_durations_and_http_answers_have_the_fields_names(served: Harness) -> None:
    """vLLM's names, behind ownpath's prefix."""
    before = page(served)
    served.chat(max_tokens=5)
    error(served.post(COMPLETIONS), 400)
    error(served.ask("GET", "/nothing/" + "x" * 1000), 404)
    after = page(served)
    assert "x" * 100 not in "".join(after)

    def grown(series: str) -> float:
        return after[f"ownpath_{series}"] - before.get(f"ownpath_{series}", 0)

    for name, count in (("time_to_first_token", 1), ("time_per_output_token", 4), ("e2e_request_latency", 1)):
        assert grown(f"{name}_seconds_count") == count
        assert grown(f'{name}_seconds_bucket{{le="+Inf"}}') == count
        assert grown(f"{name}_seconds_sum") >= 0
        buckets = [value for series, value in after.items() if series.startswith(f"ownpath_{name}_seconds_bucket")]
        assert buckets == sorted(buckets)
    assert grown("prompt_tokens_total") == len(chat_ids("hello"))
    answered = 'http_requests_total{{handler="{}",method="{}",status="{}"}}'
    assert grown(answered.format(CHAT, "POST", 200)) == 1
    assert grown(answered.format(COMPLETIONS, "POST", 400)) == 1
    assert grown(answered.format("other", "GET", 404)) == 1


@pytest.mark.parametrize(
    ("counter", "series"),
    [("count", "ownpath_kernels_compiled_total"), ("num_captured", "ownpath_graphs_captured_total")],
)
def test_what_is_made_after_the_start_is_counted(counter: str, series: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPILATIONS, counter, 7)  # the start's own
    with harness(Gated()) as served:
        assert page(served)[series] == 0
        monkeypatch.setattr(COMPILATIONS, counter, 9)
        assert page(served)[series] == 2


def test_gauges_follow_what_runs() -> None:
    model = Gated()
    with harness(model) as served, ThreadPoolExecutor(1) as pool:
        assert (page(served)["ownpath_num_requests_running"], page(served)["ownpath_kv_cache_usage_perc"]) == (0, 0)
        pending = pool.submit(served.complete, prompt=[[20, 21, 22]] * 10, max_tokens=2)
        try:
            model.permits.release()
            assert eventually(lambda: page(served)["ownpath_num_requests_running"] == 6)
            assert page(served)["ownpath_num_requests_waiting"] == 4
            assert eventually(
                lambda: page(served)["ownpath_kv_cache_usage_perc"] == round(18 / (MAX_SEQUENCES * 256), 6)
            )
        finally:
            for _ in range(100):
                model.permits.release()
        pending.result(WAIT_S)
        assert eventually(lambda: page(served)["ownpath_num_requests_running"] == 0)


def test_the_engines_own_counts_are_on_the_page() -> None:
    """Written as the engine's thread writes them; a duration at a bound belongs to its bucket."""
    with harness(Gated()) as served:
        counts, times = served.engine.counts, served.engine.load().times
        counts.num_prefix_queried, counts.num_prefix_hit = 1000, 768
        counts.num_prefix_hits, counts.num_blocks_evicted = 4, 7
        counts.num_snapshots_taken, counts.num_snapshots_evicted = 6, 5
        counts.num_preempted, counts.num_step_retries = 3, 2
        for seconds in (0.0005, 0.003, 1000):
            times.busy.observe(seconds)
        for seconds in (4e-6, 25e-6, 30e-6, 31e-6):
            times.gaps.observe(seconds)
        found = {name.removeprefix("ownpath_"): value for name, value in page(served).items()}
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (1000, 768)
    assert (found["prefix_cache_hit_requests_total"], found["prefix_blocks_evicted_total"]) == (4, 7)
    assert (found["prefix_snapshots_taken_total"], found["prefix_snapshots_evicted_total"]) == (6, 5)
    assert (found["num_preemptions_total"], found["step_retries_total"]) == (3, 2)
    assert [found[f'step_time_seconds_bucket{{le="{bound}"}}'] for bound in ("0.0005", "0.0025", "0.005", "300")] == [
        *(1, 1, 2, 2)
    ]
    assert found["step_time_seconds_count"] == 3
    assert found["step_time_seconds_sum"] == pytest.approx(1000.0035)
    assert [found[f'step_gap_seconds_bucket{{le="{bound}"}}'] for bound in ("5e-06", "2e-05", "3e-05", "5e-05")] == [
        *(1, 1, 3, 4)
    ]
    assert found["step_gap_seconds_sum"] == pytest.approx(90e-6)


def test_an_answers_phases_add_up() -> None:
    """A prompt that waits for another one's slots: its time is the queue's until it begins."""
    model = Gated()
    with harness(model) as served, ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.complete, prompt=[[20, 21, 22]] * 8, max_tokens=2)
        try:
            assert eventually(lambda: page(served)["ownpath_num_requests_waiting"] == 2), "a body runs 6 of 8 at most"
        finally:
            for _ in range(100):
                model.permits.release()
        first.result(WAIT_S)
        error(served.post(COMPLETIONS, prompt=[20, TOKENIZER.num_tokens]), 400)
        found = page(served)
    sums = [found[f"ownpath_request_{phase}_time_seconds_sum"] for phase in ("queue", "prefill", "decode")]
    counts = [found[f"ownpath_request_{phase}_time_seconds_count"] for phase in ("queue", "prefill", "decode")]
    assert counts == [8, 8, 8]
    assert sum(sums[:2]) == pytest.approx(found["ownpath_time_to_first_token_seconds_sum"], abs=1e-6)
    assert sums[2] == pytest.approx(found["ownpath_time_per_output_token_seconds_sum"], abs=1e-6)
    assert sum(sums) <= found["ownpath_e2e_request_latency_seconds_sum"]


@pytest.mark.parametrize(
    ("points", "phases"),
    [
        ({"ended": 9.0}, {"queue": (1.0, 9.0)}),
        ({"begun": 2.0, "ended": 9.0}, {"queue": (1.0, 2.0), "prefill": (2.0, 9.0)}),
        (
            {"begun": 2.0, "first_token": 4.0, "last_token": 8.0, "ended": 9.0},
            {"queue": (1.0, 2.0), "prefill": (2.0, 4.0), "decode": (4.0, 8.0)},
        ),
    ],
)
def test_phases_end_where_the_answer_was_cut(points: dict[str, float], phases: dict[str, tuple[float, float]]) -> None:
    assert Timeline(1.0, **points).phases() == phases  # type: ignore[arg-type]
