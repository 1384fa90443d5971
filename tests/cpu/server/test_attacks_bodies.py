"""Attacks by what a body holds: 4 MiB of any shape, answers that are long to write, many prompts for one client.

The limits are a second to an answer and 0.2 without a token for others, in the best of three tries: a busy machine
stops every process now and then. For the same reason time in which this process does not run counts a tenth. With
``OWNPATH_ATTACK=full`` in the environment, on an idle machine, the first try counts, and all of its time.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, VOCAB, WAIT_S, Gated, Harness, error, eventually, harness, listening
from cpu.server.sockets import connect, post, received

from ownpath.model.batch import ForwardBatch
from ownpath.server.body import Limits
from ownpath.server.chat import ChatFold
from ownpath.server.completions import CompletionFold
from ownpath.server.counts import MAX_MESSAGES, MAX_TOOLS
from ownpath.server.json_shape import JsonLimits, check_numbers, check_shape
from ownpath.server.json_text import to_json

IS_FULL = os.environ.get("OWNPATH_ATTACK") == "full"
ANSWERED_S, STALL_S, GROWTH_MB = 1.0, 0.2, 100
TRIES, SCORED_TOKENS = (1, 4000) if IS_FULL else (3, 500)
MAX_BYTES = Limits().max_body_bytes
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def filled(head: str, unit: str, tail: str) -> bytes:
    """A body of the largest size: head, as many units as fit, tail."""
    begin, end, one = head.encode(), tail.encode(), unit.encode()
    return begin + one * ((MAX_BYTES - len(begin) - len(end)) // len(one)) + end


TOOL = '{"messages":[],"tools":[{"type":"function","function":{"name":"a","parameters":{"e":['
SCHEMA = '{"messages":[],"response_format":{"type":"json_schema","json_schema":{"schema":{"e":['
NAMES = ",".join(f'\\"n{n}\\":{n}' for n in range(500))
ARGUMENTS = '{"id":"a","type":"function","function":{"name":"a","arguments":"{' + NAMES + '}"}}'
CALL = ARGUMENTS.replace(NAMES, NAMES[:2000].rpartition(",")[0] + f',\\"t\\":\\"{"word " * 3000}\\"')
DIGITS = ARGUMENTS.replace("{" + NAMES + "}", "9" * 4200)
CALLS, CALLED = '{"messages":[{"role":"assistant","tool_calls":[', ']},{"role":"user","content":"a"}]}'
MESSAGE = '{"role":"user","content":"a"},'
BODIES: dict[str, tuple[str, bytes]] = {
    "empty messages": (CHAT, filled('{"messages":[', "{},", "{}]}")),
    "messages": (CHAT, filled('{"messages":[', MESSAGE, MESSAGE[:-1] + "]}")),
    "lists": (CHAT, filled('{"messages":[', "[],", "[]]}")),
    "deep": (CHAT, filled('{"messages":[', "[" * 150 + "]" * 150 + ",", "[]]}")),
    "parts": (CHAT, filled('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"},', "1]}]}")),
    "empty calls": (CHAT, filled(CALLS, '{"id":"a","function":{}},', "1" + CALLED)),
    "tools": (CHAT, filled('{"messages":[],"tools":[', '{"type":"function","function":{"name":"a"}},', "1]}")),
    "a tool": (CHAT, filled(TOOL, '"abc",', "1]}}}]}")),
    "a schema": (CHAT, filled(SCHEMA, '"a",', "1]}}}}")),
    "numbers in a schema": (CHAT, filled(SCHEMA, "1,", "1]}}}}")),
    "digits in a schema": (CHAT, filled(SCHEMA, "9" * 4200 + ",", "1]}}}}")),
    "digits below the limit": (CHAT, filled(SCHEMA, "9" * 640 + ",", "1]}}}}")),
    "arguments": (CHAT, filled(CALLS, ARGUMENTS + ",", ARGUMENTS + CALLED)),
    "an argument": (CHAT, filled(CALLS + ARGUMENTS[:-5], "1,", '1]"}}' + CALLED)),
    "calls": (CHAT, filled(CALLS, CALL + ",", CALL + CALLED)),
    "calls with digits": (CHAT, filled(CALLS, DIGITS + ",", DIGITS + CALLED)),
    "many fields": (CHAT, b'{"response_format":{' + b",".join(b'"%x":1' % n for n in range(420_000)) + b"}}"),
    "a long text": (CHAT, filled('{"messages":[{"role":"user","content":"', "word ", '"}]}')),
    "a text of commas": (CHAT, filled('{"messages":[{"role":"user","content":"', ',[{:\\"', '"}]}')),
    "a long word": (COMPLETIONS, filled('{"prompt":"', "a", '"}')),
    "token ids": (COMPLETIONS, filled('{"prompt":[', "20,", "20]}")),
    "lists of ids": (COMPLETIONS, filled('{"prompt":[', "[20],", "[20]]}")),
    "texts": (COMPLETIONS, filled('{"prompt":[', '"ab",', '"a"]}')),
    "stops": (COMPLETIONS, filled('{"prompt":"a","stop":[', '"ab",', '"a"]}')),
    "a number": (COMPLETIONS, filled('{"prompt":"a","seed":', "9", "}")),
    "a fraction": (COMPLETIONS, filled('{"prompt":"a","top_p":0.', "9", "}")),
    "a bias": (COMPLETIONS, b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % n for n in range(370_000)) + b"}}"),
    "blanks": (COMPLETIONS, filled('{"prompt":"a"', " ", "}")),
}  # fmt: skip


class Ticking(FakeModel):
    """Takes 2 ms for a step, so that its answers show every stall."""

    def __init__(self, max_model_len: int = 4096) -> None:
        super().__init__(random_rule(VOCAB), VOCAB, max_model_len)
        self.rule = lambda history: torch.nn.functional.one_hot(torch.tensor(20 + len(history) % 40), VOCAB) * 9.0

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        time.sleep(0.002)
        return super().forward(batch)


@pytest.fixture(scope="module")
def ticking() -> Iterator[tuple[Harness, str]]:
    with harness(Ticking(), max_model_len=4096) as served, listening(served) as url:
        yield served, url


class Clock:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> float:
        wall, cpu = time.monotonic(), time.process_time()
        took, worked = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return took if IS_FULL else min(took, worked + max(0.0, took - worked) / 10)


class Watch:
    """Follows a stream of another client, and this process's memory, while a test attacks."""

    def __init__(self) -> None:
        self.longest_gap_s = 0.0
        self.num_events = 0
        self._base = self._peak = resident_mb()

    @property
    def growth_mb(self) -> float:
        return self._peak - self._base

    def see(self, gap_s: float) -> None:
        self.num_events += 1
        self.longest_gap_s = max(self.longest_gap_s, gap_s)
        self._peak = max(self._peak, resident_mb())


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 1e6


@contextmanager
def another_stream(url: str) -> Iterator[Watch]:
    watch = Watch()
    stop, begun = threading.Event(), threading.Event()

    def follow() -> None:
        while not stop.is_set():
            with connect(
                url, post(COMPLETIONS, b'{"prompt": "hello", "stream": true, "max_tokens": 3000}')
            ) as connection:
                assert connection.recv(65536)
                begun.set()
                clock = Clock()
                while not stop.is_set() and (piece := connection.recv(65536)):
                    watch.see(clock.read())
                    if b"[DONE]" in piece:
                        break

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        assert begun.wait(WAIT_S)
        yield watch
    finally:
        stop.set()
        thread.join(WAIT_S)


@pytest.mark.parametrize("name", BODIES)
def test_four_mib_of_any_shape_cost_little(name: str, ticking: tuple[Harness, str]) -> None:
    served, url = ticking
    path, body = BODIES[name]
    assert len(body) <= MAX_BYTES
    request = post(path, body)
    for _ in range(TRIES):
        with another_stream(url) as watch:
            clock = Clock()
            with connect(url, request) as connection:
                head = connection.recv(65536).partition(b"\r\n")[0]
            seconds = clock.read()
            time.sleep(0.02)
        print(f"{name}: {seconds * 1000:.0f} ms, stall {watch.longest_gap_s * 1000:.0f} ms, {watch.growth_mb:.0f} MB")
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
        assert watch.num_events > 1
        assert watch.growth_mb < GROWTH_MB
        if seconds < ANSWERED_S and watch.longest_gap_s < STALL_S:
            break
    assert seconds < ANSWERED_S
    assert watch.longest_gap_s < STALL_S
    assert eventually(lambda: served.engine.num_open == 0)


def test_counts_are_refused_by_name(served: Harness) -> None:
    for name, value in (("messages", HELLO * (MAX_MESSAGES + 1)), ("tools", [{}] * (MAX_TOOLS + 1))):
        found = error(served.post(CHAT, **({"messages": HELLO} | {name: value})), 400)
        assert found["param"] == name
        assert "at most" in found["message"]
    parts = [{"type": "text", "text": "a"}] * 1025
    found = error(served.post(CHAT, messages=[{"role": "user", "content": parts}]), 400)
    assert found["param"] == "messages.0.content"


def test_arguments_are_counted_together_and_by_what_they_hold(served: Harness) -> None:
    """They are JSON in a string, which nothing else counts. What stands in their own strings does not count."""

    def ask(arguments: str) -> httpx.Response:
        call = {"id": "a", "type": "function", "function": {"name": "a", "arguments": arguments}}
        return served.post(CHAT, messages=[{"role": "assistant", "tool_calls": [call] * 100}, *HELLO])

    found = error(ask(json.dumps({str(n): n for n in range(700)})), 400)
    assert found["message"] == "messages: the arguments of their calls have more than 65536 field names"
    assert "exceed the maximum context" in error(ask(json.dumps({"text": ":,[{" * 700})), 400)["message"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"a": [1, 2, 3], "b": "x,y:[{"}',
        r'{"a\"b,": "\\", "c": ["\\\"", 1]}',
        json.dumps({"k" * 70_000: ["," * 70_000, '"' * 70_000, "\\" * 70_001]}),
    ],
)
def test_the_shape_of_a_text_is_counted_exactly(text: str) -> None:
    """A limit at the count takes the text, one below it refuses it."""
    found = list(everything(json.loads(text)))
    names = sum(len(one) for one in found if isinstance(one, dict))
    containers = sum(isinstance(one, dict | list) for one in found)
    strings = sum(isinstance(one, str) for one in found) + names
    exact = {"max_containers": containers, "max_names": names, "max_strings": strings}
    check_shape([text.encode()], JsonLimits(**exact))
    for name, count in exact.items():
        if count:
            with pytest.raises(ValueError, match=f"more than {count - 1} "):
                check_shape([text.encode()], JsonLimits(**(exact | {name: count - 1})))
    with pytest.raises(ValueError, match="more than 1 values"):
        check_shape([b"[1", b",2]"], JsonLimits(max_values=1))


@pytest.mark.parametrize("text", ["[{}]", '{{"a":{}}}', '{{"a": -{}}}', '["{}\\"",\n{}]', '[" x",{}, "a"]'])
def test_whole_numbers_have_few_digits(text: str) -> None:
    """Wherever a number stands, and whatever stands in strings; fractions cost no square."""
    for digits, is_long in (("7" * 640, False), ("7" * 641, True), ("7" * 200_000, True), ("0." + "7" * 9000, False)):
        data = text.format(digits, digits).encode()
        with pytest.raises(ValueError, match="640 digits") if is_long else nullcontext():
            check_numbers(data)
    check_numbers(json.dumps({"a": [",:[ " + "7" * 9000, '\\",' + "7" * 9000]}).encode())
    check_numbers((" " * 65_000 + "7" * 640).encode())
    with pytest.raises(ValueError, match="640 digits"):
        check_numbers((" " * 65_000 + "7" * 641).encode())


def everything(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything(inner)


def test_slow_bodies_make_room_for_others() -> None:
    """Bodies that are held count together; beyond the limit the one that came first gives way."""
    limits = Limits(max_body_bytes=200_000, max_held_bytes=450_000)
    with harness(limits=limits) as served, listening(served) as url:
        whole = post(COMPLETIONS, b'{"prompt": "hello", "max_tokens": 1}'.ljust(190_000))
        slow = [connect(url, whole[:150_000]) for _ in range(3)]
        time.sleep(0.1)
        with connect(url, whole.replace(b"Host: x", b"Host: x\r\nConnection: close")) as connection:
            assert received(connection).startswith(b"HTTP/1.1 200 ")
        assert slow[0].recv(65536).startswith(b"HTTP/1.1 429 ")
        slow[2].sendall(whole[150_000:])
        assert slow[2].recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in slow:
            connection.close()


def seconds_of_fold(fold: ChatFold | CompletionFold, chunk: dict[str, Any], count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        fold.add(json.loads(json.dumps(chunk)))
    fold.whole()
    return time.process_time() - begin


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_fold_costs_linear_time(kind: str) -> None:
    """Eight times as many chunks may cost at most sixteen times as much; a square would cost 64 times."""
    logprobs = {"content": [{"token": "abcd", "logprob": 0.0}], "refusal": None}
    chat = {"choices": [{"delta": {"content": "abcd" * 50, "reasoning_content": "abcd" * 50}, "logprobs": logprobs}]}
    chat["choices"][0] |= {"index": 0, "finish_reason": None, "token_ids": [1]}
    lists = {name: [1] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    completion = {"choices": [{"index": 0, "text": "abcd" * 50, "finish_reason": None, "logprobs": lists}]}
    completion["choices"][0] |= {"token_ids": [1]}
    new, chunk = (ChatFold, chat) if kind == "chat" else (CompletionFold, completion)
    seconds_of_fold(new(), chunk, 200)
    few, many = (min(seconds_of_fold(new(), chunk, count) for _ in range(2)) for count in (1000, 8000))
    assert many < 16 * few


async def written(value: object) -> bytes:
    return await to_json(value)


def test_large_answers_are_written_as_small_ones() -> None:
    import asyncio

    heavy = {
        "a": list(range(5000)),
        "b": [{"c": ["x\u00e9\u2028", None, True, 1.5]}] * 3,
        "d": {"e": [[n] * 3 for n in range(999)]},
    }
    for value in (heavy, {"choices": [heavy] * 3}, [], {}, {"a": {}}, list(range(1001)), [[], {}] * 700):
        text = asyncio.run(written(value))
        assert text == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        asyncio.run(written({"a": [0.5] * 3000 + [float("nan")]}))


def test_a_scored_prompt_stalls_nobody(ticking: tuple[Harness, str]) -> None:
    """``echo`` with log-probabilities of several prompts, 20 others for each token."""
    _, url = ticking
    ids = [[20 + n % 40 for n in range(SCORED_TOKENS)]] * 4
    body = json.dumps({"prompt": ids, "echo": True, "logprobs": 20, "max_tokens": 0}).encode()
    for _ in range(TRIES):
        with another_stream(url) as watch:
            clock = Clock()
            with connect(url, post(COMPLETIONS, body, b"Connection: close")) as connection:
                answer = received(connection)
        seconds = clock.read()
        print(f"scored: {seconds:.1f} s, {len(answer) / 1e6:.0f} MB, stall {watch.longest_gap_s * 1000:.0f} ms")
        if watch.longest_gap_s < STALL_S:
            break
    assert answer.startswith(b"HTTP/1.1 200 ")
    choices = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [SCORED_TOKENS] * 4
    assert watch.longest_gap_s < STALL_S


def test_many_prompts_of_one_body_do_not_hold_up_another_client() -> None:
    """The body's 60 prompts would run for 200 steps each; who comes then needs a few steps, and has them at once."""
    with harness(Ticking(256)) as served, listening(served) as url, ThreadPoolExecutor(1) as pool:
        many = pool.submit(
            httpx.post, url + COMPLETIONS, json={"prompt": ["hello"] * 60, "max_tokens": 200}, timeout=60
        )
        assert eventually(lambda: served.engine.num_open == 60)
        clock = Clock()
        answer = httpx.post(url + COMPLETIONS, json={"prompt": "hello", "max_tokens": 5}, timeout=WAIT_S)
        seconds = clock.read()
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert served.engine.num_open == 60, "none of them is done"
        assert seconds < ANSWERED_S
        print(f"beside 60 prompts: {seconds * 1000:.0f} ms")
        served.engine.stop()
        many.result()


def test_a_full_queue_refuses_at_once_and_takes_again() -> None:
    model = Gated()
    with harness(model, max_num_queued=0) as served, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(served.complete, prompt=["hello"] * 8, max_tokens=1)
        assert eventually(lambda: served.engine.num_open == 8)
        refused = served.post(COMPLETIONS, prompt="hello")
        assert error(refused, 429)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        for _ in range(100):
            model.permits.release()
        pending.result(WAIT_S)
        assert served.complete(max_tokens=1)["usage"]["completion_tokens"] == 1
