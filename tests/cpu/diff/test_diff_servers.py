"""``ownpath diff`` against servers of other makes, intact and broken, each around a real model."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.chat.small_tokenizer import small_tokenizer
from cpu.diff.other_server import Dialect, Fault, Other, Rows, other_server
from cpu.server.harness import harness, listening
from cpu.server.model_folder import write_model_folder

from ownpath.cli import main
from ownpath.commands import diff as diff_command
from ownpath.commands import session
from ownpath.config import EngineConfig
from ownpath.diff.local_model import LocalModel
from ownpath.diff.responses import SequenceReading
from ownpath.loading import load_model
from ownpath.model.model import Model

TOKENIZER = small_tokenizer()
MAX_MODEL_LEN = 256
# The same products in other batch shapes, as tests/cpu/server bounds them: 64 of float32's steps for each of 5 layers,
# in each of the two log-probs.
TOLERANCE = 2 * 5 * 64 * 2**-23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("random-v4"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, EngineConfig(device="cpu", max_model_len=MAX_MODEL_LEN))


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The logits that the broken servers of one model start from."""
    return {}


@pytest.fixture(scope="module")
def logprobs() -> Callable[[LocalModel, SequenceReading], torch.Tensor]:
    """``LocalModel.logprobs``, computed once for what several servers answered alike."""
    compute = LocalModel.logprobs
    known: dict[object, tuple[Model, torch.Tensor]] = {}  # with the model, which therefore keeps its id

    def compute_once(local: LocalModel, reading: SequenceReading) -> torch.Tensor:
        key = id(local.model), reading.ids, reading.start, len(reading.scored)
        if key not in known:
            known[key] = local.model, compute(local, reading)
        return known[key][1].clone()

    return compute_once


@pytest.fixture(scope="module")
def suspects() -> Callable[[Path], tuple[str, ...]]:
    """The checkpoint's own scalars, read once: no server changes them."""
    return lru_cache(maxsize=8)(diff_command._suspects)


@pytest.fixture(autouse=True)
def _load_and_compute_once(
    monkeypatch: pytest.MonkeyPatch,
    model: Model,
    logprobs: Callable[[LocalModel, SequenceReading], torch.Tensor],
    suspects: Callable[[Path], tuple[str, ...]],
) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_: model)
    monkeypatch.setattr(diff_command, "_suspects", suspects)
    monkeypatch.setattr(LocalModel, "logprobs", logprobs)


def diff(capsys: pytest.CaptureFixture[str], folder: Path, url: str, *options: str) -> tuple[int, dict[str, Any]]:
    """The command with --json: its exit code, and the object."""
    short = ["--max-tokens", "5", "--max-model-len", str(MAX_MODEL_LEN), "--seed", "1"]
    code = main(["diff", str(folder), "--against", url, "--json", *short, *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def found_in(report: dict[str, Any]) -> list[str]:
    return [check["id"] for check in report["checks"] if check["verdict"] == "found"]


FORMS = {
    Dialect.VLLM: ("prompt_logprobs", True, 20),
    Dialect.OPENAI: ("echo", True, 5),
    Dialect.LLAMA_CPP: ("generated", True, 20),
    Dialect.TEXT_ONLY: ("echo", False, 20),
    Dialect.CHAT_ONLY: ("generated", False, 20),
}


# Half of this vocabulary is bytes that are no character: such servers give them a name that is no token's, or one for
# all.
NAMES_ONLY = (Dialect.OPENAI, Dialect.TEXT_ONLY)


@pytest.mark.parametrize("dialect", Dialect)
def test_an_intact_server_agrees_whatever_it_offers(
    dialect: Dialect, model: Model, rows: Rows, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_server(model, TOKENIZER, dialect, rows=rows) as other:
        code, report = diff(capsys, folder, other.url)
    assert (code, report["agrees"], found_in(report)) == (0, True, [])
    assert (report["form"], report["sends_ids"], report["num_top"]) == FORMS[dialect]
    numbers = report["numbers"]
    assert numbers["num_positions"] > 0
    assert numbers["max_delta"] <= TOLERANCE
    assert numbers["num_same_likeliest"] == numbers["num_ranked"] <= numbers["num_positions"]
    if dialect not in NAMES_ONLY:
        assert numbers["num_ranked"] == numbers["num_positions"]
    # KL sums probability times difference, so no more than the largest difference.
    assert 0 <= numbers["max_kl_at_least"] <= 2 * TOLERANCE
    assert 0 < numbers["mean_outside"] < 1


@pytest.mark.parametrize("seed", [2, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (11, 12))])
def test_other_random_models_and_prompts_agree_too(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model_folder(tmp_path, seed=seed)
    model = load_model(folder, EngineConfig(device="cpu", max_model_len=MAX_MODEL_LEN))
    monkeypatch.setattr(session, "load_model", lambda *_: model)
    with other_server(model, TOKENIZER, Dialect.VLLM) as other:
        code, report = diff(capsys, folder, other.url, "--seed", str(seed))
    assert (code, found_in(report)) == (0, [])


DIAGNOSES = {
    Fault.ALL_EOS: "all-special",
    Fault.ONLY_BOS: "all-special",
    Fault.FROZEN: "input-independent",
    Fault.ONE_POSITION: "identical-logprob",
    Fault.TEMPLATE: "prompt-template",
    Fault.SWALLOWED: "reasoning-swallowed",
    Fault.ALL_REASONING: "reasoning-swallowed",
    Fault.STALE_CACHE: "cold-cached",
    Fault.BATCH: "batch-dependent",
    Fault.NAN: "non-finite",
    Fault.TOO_SURE: "computes-otherwise",
}


OTHERS = (Dialect.OPENAI, Dialect.LLAMA_CPP)


@pytest.mark.parametrize(
    ("fault", "dialect"),
    [
        *((fault, Dialect.VLLM) for fault in DIAGNOSES),
        *(
            pytest.param(fault, dialect, marks=pytest.mark.slow if (idx + at) % 2 else ())
            for idx, fault in enumerate(DIAGNOSES)
            for at, dialect in enumerate(OTHERS)
        ),
    ],
)
def test_a_broken_server_is_diagnosed(
    fault: Fault, dialect: Dialect, model: Model, rows: Rows, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (fault, dialect) == (Fault.ALL_REASONING, Dialect.OPENAI):
        pytest.skip("it tells a length that two modes have, and names of bytes that are no token's")
    with other_server(model, TOKENIZER, dialect, fault, rows) as other:
        code, report = diff(capsys, folder, other.url)
    assert code == 1
    assert not report["agrees"]
    assert report["diagnosis"] == DIAGNOSES[fault]
    found = [check for check in report["checks"] if check["verdict"] == "found"]
    assert all(check["remedy"] and check["number"] is not None for check in found)
    if fault in (Fault.TEMPLATE, Fault.SWALLOWED, Fault.ALL_REASONING, Fault.STALE_CACHE, Fault.BATCH, Fault.TOO_SURE):
        assert len(found) == 1, "these break one thing only"


def test_the_first_divergence_is_named(
    model: Model, rows: Rows, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits four times as large: log-probs from the model itself say where it shows first."""
    with other_server(model, TOKENIZER, Dialect.VLLM, Fault.TOO_SURE, rows) as other:
        _, report = diff(capsys, folder, other.url)
        scored = [body for _, _, body in other.asked if body is not None and "prompt_logprobs" in body]
        sent = scored[1]["prompt"]  # the first found out that the server has them
        logits = other.logits_TV(tuple(sent))
    first = report["first_divergence"]
    ours, theirs = (rows.log_softmax(-1) for rows in (logits, 4 * logits))
    for n, token_id in enumerate(sent[1:]):
        gap = abs(float(ours[n, token_id] - theirs[n, token_id]))
        if gap > 0.25:
            assert (first["prompt_idx"], first["idx"], first["token_id"]) == (0, n + 1, token_id)
            assert first["theirs"] == pytest.approx(float(theirs[n, token_id]), abs=TOLERANCE * 4)
            return
    pytest.fail("the fault shows nowhere")


def test_people_read_the_verdict_first(
    model: Model, rows: Rows, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--max-tokens", "5", "--seed", "1"]
    with other_server(model, TOKENIZER, Dialect.VLLM, Fault.STALE_CACHE, rows) as other:
        assert main(["diff", str(folder), "--against", other.url + "/v1/", *short]) == 1
        lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder.name} against {other.url}: DIFFER"
    assert lines[1].split()[:2] == ["found", "cold-cached:"]
    assert lines[2].split()[0] == "remedy"


def test_text_is_sent_only_where_ids_are_refused(
    model: Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_server(model, TOKENIZER, Dialect.TEXT_ONLY) as other:
        assert main(["diff", str(folder), "--against", other.url, "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "text sent" in captured.out
    assert captured.err == (
        "warning: the server takes no token ids, so text was sent; it may be split into other tokens there\n"
    )
    assert ["ok", "text-tokens:"] in [line.split()[:2] for line in captured.out.splitlines()], "/tokenize told its ids"


def test_another_tokenizer_is_told_where_only_text_is_taken(
    model: Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_server(model, small_tokenizer(add_bos=True), Dialect.TEXT_ONLY) as other:
        code, report = diff(capsys, folder, other.url)
    assert (code, report["diagnosis"]) == (1, "text-tokens")
    assert report["checks"][4]["number"] > 0


def test_our_own_server_agrees(model: Model, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes token ids, scores prompts, and tells every id."""
    with harness(model) as served, listening(served) as url:
        code, report = diff(capsys, folder, url)
        assert served.settled()
    assert (code, found_in(report)) == (0, [])
    assert (report["form"], report["sends_ids"], report["num_top"]) == ("prompt_logprobs", True, 20)
    assert report["numbers"]["max_delta"] <= TOLERANCE
    assert [c["id"] for c in report["checks"] if c["verdict"] == "not asked"] == ["text-tokens"]


def test_the_api_key_goes_by_environment(
    model: Model, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "sesame")
    with other_server(model, TOKENIZER, Dialect.VLLM) as other:
        assert (
            main(["diff", str(folder), "--against", other.url, "--max-tokens", "1", "--api-key-env", "OTHER_KEY"]) == 0
        )
        assert all(headers.get("Authorization") == "Bearer sesame" for _, headers, _ in other.asked)
    captured = capsys.readouterr()
    assert "sesame" not in captured.out + captured.err


def test_json_has_no_words_that_json_lacks(
    model: Model, rows: Rows, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_server(model, TOKENIZER, Dialect.VLLM, Fault.NAN, rows) as other:
        main(["diff", str(folder), "--against", other.url, "--json", "--max-tokens", "2", "--seed", "1"])

    def refuse(word: str) -> float:
        raise AssertionError(word)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["checks"][0]["number"] >= report["numbers"]["num_positions"]
    assert report["numbers"]["max_delta"] is None
    assert report["positions"][0]["theirs"] == "nan"


def test_a_fresh_seed_each_time(model: Model, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the first answer of a second run would not be a cold one."""

    def prompts_of(other: Other) -> set[tuple[int, ...]]:
        return {tuple(body["prompt"]) for path, _, body in other.asked if path == "/v1/completions"}

    with other_server(model, TOKENIZER, Dialect.VLLM) as other:
        main(["diff", str(folder), "--against", other.url, "--max-tokens", "1"])
        first = prompts_of(other)
        other.asked.clear()
        main(["diff", str(folder), "--against", other.url, "--max-tokens", "1"])
        assert len(first) == 5
        assert len(first & prompts_of(other)) == 1, "the one that finds out how to ask"
