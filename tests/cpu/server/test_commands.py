"""``ownpath generate`` and ``ownpath serve``, as people start them."""

import asyncio
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cpu.chat.small_tokenizer import small_tokenizer, tokenizer_spec
from cpu.server.model_folder import write_model_folder

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.cli import main
from ownpath.commands import session
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.selftest.checks import REMEDIES

TOKENIZER = small_tokenizer()
load_once = functools.cache(session.load_model)
GENERATED = ["--max-tokens", "12", "--max-model-len", "128"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("random-v4"))


@pytest.fixture(autouse=True)
def _load_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_model", load_once)


def generate(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["generate", *args, *GENERATED]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def text_of(ids: list[int]) -> str:
    return b"".join(TOKENIZER.token_bytes(i) for i in ids if not TOKENIZER.is_hidden(i)).decode("utf-8", "replace")


def test_generate_prints_the_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(capsys, str(folder), "hello")
    ids = [int(line) for line in generate(capsys, str(folder), "hello", "--token-ids").split()]
    assert 0 < len(ids) <= 12
    whole = text_of(ids)
    assert text.endswith("\n")
    assert whole.startswith(text[:-1])
    assert len(whole) - len(text[:-1]) <= 1, "only a character that was cut off may be missing"


def test_generate_is_greedy_unless_told_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, str(folder), "hello") == generate(capsys, str(folder), "hello")
    drawn = [generate(capsys, str(folder), "hello", "--temperature", "2", "--seed", str(n)) for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_knows_two_forms_of_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The raw form that spells the chat format out is the chat form."""
    raw = "".join(s if isinstance(s, str) else s.text for s in encode_messages([Message("user", "hello")]))
    chat = generate(capsys, str(folder), "hello", "--chat", "--token-ids")
    assert generate(capsys, str(folder), raw, "--token-ids") == chat
    assert generate(capsys, str(folder), raw, "--chat", "--token-ids") != chat
    assert generate(capsys, str(folder), "hello", "--token-ids") != chat


def test_generate_stops_at_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(capsys, str(folder), "hello")
    assert len(text) > 4
    stopped = generate(capsys, str(folder), "hello", "--stop", text[2:4])
    assert stopped == text[: text.index(text[2:4])] + "\n"


def failing(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ownpath")
    assert captured.err.count("\n") == 1, "one line"
    return captured.err


def test_what_users_can_cause_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(folder)
    assert "no such model folder" in failing(capsys, "generate", str(tmp_path / "nothing"), "a")
    assert "tokenizer.json" in failing(capsys, "generate", str(tmp_path), "a")
    assert "no such model folder" in failing(capsys, "serve", str(tmp_path / "nothing"))
    assert "temperature" in failing(capsys, "generate", name, "a", "--temperature", "9")
    assert "--max-tokens" in failing(capsys, "generate", name, "a", "--max-tokens", "-1")
    assert "--stop" in failing(capsys, "generate", name, "a", "--stop", "")
    assert "the prompt is empty" in failing(capsys, "generate", name, "")
    assert "maximum context of 8" in failing(capsys, "generate", name, "a" * 9, "--max-model-len", "8")
    assert "not valid Unicode" in failing(capsys, "generate", name, "a\udcff")
    assert "device" in failing(capsys, "generate", name, "a", "--device", "abacus")


def test_an_engine_that_fails_is_one_line_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "forward", lambda self, batch: torch.full((1, self.config.vocab_size), torch.nan))
    assert main(["generate", str(folder), "a"]) == 1
    assert capsys.readouterr() == ("", "ownpath: the model produced a logit that is not finite\n")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path)
    specials = {"<｜begin▁of▁sentence｜>": 1, "<｜end▁of▁sentence｜>": 0}
    spec = tokenizer_spec(specials=specials)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert "eos_token_id 1, but the tokenizer's EOS is 0" in failing(capsys, "generate", str(folder), "a")


def test_an_answer_ends_at_any_end_token_of_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third token of an answer becomes an end token, by generation_config.json or by a list in config.json."""
    folder = write_model_folder(tmp_path)
    asked = ["generate", str(folder), "a", "--max-tokens", "6", "--token-ids"]
    assert main(asked) == 0
    ids = [int(line) for line in capsys.readouterr().out.split()]
    stop = ids[: ids.index(ids[2]) + 1]
    generation, config = folder / "generation_config.json", folder / "config.json"
    generation.write_text(json.dumps({"eos_token_id": [ids[2], 10**6]}))
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert [int(line) for line in captured.out.split()] == stop
    assert "generation_config.json: eos_token_id has 1000000, which is no token of this model" in captured.err
    generation.unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, ids[2]]}))
    assert main(asked) == 0
    assert [int(line) for line in capsys.readouterr().out.split()] == stop


@pytest.mark.parametrize("text", ['{"eos_token_id": "stop"}', '{"eos_token_id": [1, null]}', "{"])
def test_end_tokens_that_cannot_be_read_are_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in failing(capsys, "generate", str(folder), "a")


@pytest.mark.parametrize(
    "args",
    [
        ["dance"],
        ["serve", "--port", "70000"],
        ["serve", "--release", "v3"],
        ["generate", "a", "--max-model-len", "0"],
    ],
)
def test_wrong_usage_explains_itself(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = failing(capsys, *args)
    assert "--help" in told
    assert next((word for word in args if word.startswith("--")), "dance") in told


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``ownpath serve`` as a process of its own; yields it and its base URL."""
    command = [sys.executable, "-m", "ownpath", "serve", str(folder), "--port", "0", "--max-model-len", "4096"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")  # on a busy machine loading is told first
        said = (re.fullmatch(r"ownpath serves (\S+) at (http://127\.0\.0\.1:\d+/v1)\n", line) for line in lines)
        found = next(filter(None, said))
        assert found[1] == folder.name
        yield process, found[2]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_and_ends_cleanly(
    server: tuple[subprocess.Popen[str], str], number: signal.Signals, folder: Path
) -> None:
    process, url = server
    assert [model["id"] for model in httpx.get(url + "/models").json()["data"]] == [folder.name]
    answer = httpx.post(
        url + "/completions", json={"prompt": "hello", "max_tokens": 3, "model": folder.name}, timeout=30
    )
    num_steps = answer.json()["usage"]["completion_tokens"]
    assert 1 <= num_steps <= 3
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert process.stdout is not None
    told = [line for line in process.stderr if not line.startswith("info: 127.0.0.1 ")]
    ran = [re.fullmatch(r"ran: (\d+) modules? on \w+ \(ref\.\w+\), (\d+) calls?\n", line) for line in told]
    assert ran, "the end says what ran"
    for match in ran:
        assert match
        assert int(match[2]) == int(match[1]) * num_steps, "every module ran once for each generated token"
    assert process.stdout.read() == ""


@pytest.mark.parametrize(("options", "wanted"), [([], 16), (["--max-num-seqs", "3"], 3)])
def test_as_many_requests_run_together_as_are_asked_for(
    options: list[str], wanted: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(args: object, max_num_seqs: int, num_cache_blocks: int | None, group: None) -> None:
        raise ValueError(f"room for {max_num_seqs} in {num_cache_blocks} blocks")

    monkeypatch.setattr(session, "load_for", load)
    assert main(["serve", str(folder), "--port", "0", *options]) == 2
    assert f"room for {wanted} in None blocks" in capsys.readouterr().err.replace("\n", " ")
    assert main(["serve", str(folder), "--port", "0", "--num-cache-blocks", "40", *options]) == 2
    assert f"room for {wanted} in 40 blocks" in capsys.readouterr().err.replace("\n", " ")
    assert main(["serve", str(folder), "--port", "0", "--max-num-seqs", "0"]) == 2
    assert "--max-num-seqs" in capsys.readouterr().err


def test_caches_that_cannot_hold_one_request_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--port", "0", "--num-cache-blocks", "3", "--max-model-len", "1000"]
    assert main(["serve", str(folder), *options]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--num-cache-blocks 3: a request of --max-model-len 1000 tokens needs 4 blocks of 256" in told


def test_a_port_in_use_is_an_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "ownpath", "serve", str(folder), "--port", str(taken.getsockname()[1])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert "another program listens there" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("options", "level"), [([], "high"), (["0813"], "low")])
def test_the_release_of_the_chat_format_is_an_option(
    options: list[str], level: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The level that runs for a word depends on the release: the first has no low."""
    told = []

    def run_server(app: Any, *_: object) -> int:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                fields = {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low", "max_tokens": 1}
                return await client.post("/v1/chat/completions", json=fields)

        told.append(asyncio.run(ask()).json()["reasoning_effort"])
        return 0

    monkeypatch.setattr("ownpath.server.run.run_server", run_server)
    arguments = [
        "serve",
        str(folder),
        "--port",
        "0",
        "--max-model-len",
        "256",
        *(["--release", *options] if options else []),
    ]
    assert main(arguments) == 0
    assert told == [level]


def not_finite(self: Model, batch: ForwardBatch) -> torch.Tensor:
    return torch.full((len(batch.logits_ids), self.config.vocab_size), torch.nan)


def test_a_model_that_fails_its_self_test_is_not_served(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, before any port is opened, and a table that names the check and what to do."""
    monkeypatch.setattr("ownpath.server.run.run_server", lambda *_: pytest.fail("nothing is served"))
    monkeypatch.setattr(Model, "forward", not_finite)
    assert main(["serve", str(folder), "--port", "0", "--max-model-len", "256"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    title, _, failed, *passed, remedy, last = captured.err.splitlines()
    assert re.fullmatch(r"self-test: 1 of 13 checks failed, \d+\.\d s", title)
    assert re.fullmatch(
        r"FAIL +S03-finite +5 +at most 0 +prompts with logits or index scores that are not finite", failed
    )
    assert remedy == f"remedy for S03-finite: {REMEDIES['S03-finite']}"
    assert len(passed) == 12
    assert all(line.startswith(("pass ", "skipped ")) for line in passed)
    assert "--allow-unverified" in last


def test_only_allow_unverified_serves_it_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownpath.server.run.run_server", lambda *_: 0)
    monkeypatch.setattr(Model, "forward", not_finite)
    assert main(["serve", str(folder), "--port", "0", "--max-model-len", "256", "--allow-unverified"]) == 0
    warning = "warning: served unverified: the self-test failed S03-finite (--allow-unverified)"
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("ran: ")]
    assert told[0] == warning
    assert told[1].startswith("release v4, guessed by the absence of ")
    assert told[2].startswith("prefix cache: ")
    assert len(told) == 3


def test_a_model_that_passes_is_served_with_its_release_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test's own steps are not among those that the end tells of."""
    monkeypatch.setattr("ownpath.server.run.run_server", lambda *_: 0)
    for options in ([], ["--allow-unverified"]):
        assert main(["serve", str(folder), "--port", "0", "--max-model-len", "256", *options]) == 0
        told = r"release v4, guessed [^\n]+\nprefix cache: 64 snapshots of [^\n]+ together; 16 tails of [^\n]+\n"
        assert re.fullmatch(told, capsys.readouterr().err)


def test_the_embedded_model_is_asked_what_it_knows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownpath.server.run.run_server", lambda *_: 0)
    monkeypatch.setattr("ownpath.selftest.run.KNOWN_ANSWER", "Tokyo")
    assert main(["serve", "--port", "0"]) == 1
    assert re.search(r"^FAIL +S01-golden ", capsys.readouterr().err, re.M)


@pytest.mark.parametrize("order", ["before", "between", "after"])
def test_options_go_anywhere(order: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chat", "--max-tokens", "2", "--token-ids"]
    arguments = {
        "before": [*options, str(folder), "hello"],
        "between": [str(folder), *options, "hello"],
        "after": [str(folder), "hello", *options],
    }
    assert main(["generate", *arguments[order]]) == 0
    assert capsys.readouterr().out.split()
