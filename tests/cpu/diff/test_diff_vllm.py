"""``ownpath diff`` against vLLM 0.32 as it answered, intact and with known faults: each is named, and nothing else."""

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.diff.vllm_server import RECORDED, Vllm, running

from ownpath.chat.tokenizer import Tokenizer
from ownpath.cli import main
from ownpath.commands import session
from ownpath.config import EngineConfig
from ownpath.diff.local_model import LocalModel
from ownpath.diff.responses import SequenceReading
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model
from ownpath.official import Step

TINY = default_model_dir()
PEER = EngineConfig("cpu", torch.bfloat16, 512, 2, official=frozenset({Step.KV}))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model | None]:
    """The model as peers compute it: in BF16 with FP8 keys, and with faults of the checkpoint that is served."""
    rope, fused = (tmp_path_factory.mktemp(name) for name in ("rope", "fused"))
    for folder in (rope, fused):
        for path in TINY.iterdir():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((TINY / "config.json").read_text())
    (rope / "config.json").write_text(json.dumps(config | {"rope_theta": 100 * config["rope_theta"]}))
    join_scales(fused)
    return {
        "intact": load_model(TINY, PEER),
        "rope": load_model(rope, PEER),
        "fused": load_model(fused, PEER),
        "nan": None,
    }


def join_scales(folder: Path) -> None:
    """Gives w1 and w3 the larger of their global scales, as an engine does that keeps one for a fused pair."""
    places = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        places |= {name: (path, 8 + size + at["data_offsets"][0]) for name, at in header.items() if name[0] != "_"}
    for name in [name for name in places if name.endswith(".w1.weight_scale_2")]:
        pair = [places[name], places[name.replace(".w1.", ".w3.")]]
        values = [path.read_bytes()[at : at + 4] for path, at in pair]
        larger = max(values, key=lambda raw: float(struct.unpack("<f", raw)[0]))
        for path, at in pair:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(larger)


@pytest.fixture(scope="module")
def ours() -> Model:
    return load_model(TINY, EngineConfig("cpu", max_model_len=512, max_num_seqs=1))


@pytest.fixture(scope="module")
def computed() -> dict[object, Any]:
    """Results of our model and of each peer, computed once: every case asks for the same."""
    return {}


@pytest.fixture(autouse=True)
def _compute_once(monkeypatch: pytest.MonkeyPatch, ours: Model, computed: dict[object, Any]) -> None:
    compute = LocalModel.logprobs

    def logprobs(local: LocalModel, reading: SequenceReading) -> torch.Tensor:
        key = (reading.ids, reading.start, len(reading.scored))
        if key not in computed:
            computed[key] = compute(local, reading)
        rows: torch.Tensor = computed[key]
        return rows

    monkeypatch.setattr(session, "load_model", lambda *_: ours)
    monkeypatch.setattr(LocalModel, "logprobs", logprobs)


Serve = Callable[..., Vllm]


@pytest.fixture
def serve(peers: dict[str, Model | None], tokenizer: Tokenizer, computed: dict[object, Any]) -> Serve:
    """A vLLM of one of the peers, which keeps its answers from case to case."""
    return lambda peer, **options: Vllm(peers[peer], tokenizer, answers=computed.setdefault(peer, {}), **options)


def diff(capsys: pytest.CaptureFixture[str], vllm: Vllm, *options: str) -> tuple[int, dict[str, Any]]:
    with running(vllm) as url:
        short = ["--max-tokens", "4", "--together", "1", "--max-model-len", "512", "--seed", "1"]
        code = main(["diff", "--against", url, "--json", *short, *options])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, report


def shape_of(value: Any) -> Any:
    """A body without its values: what a client reads by name. Lists by their first element, ids by none."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items() if not key.lstrip("token_id:").isdecimal()}
    return [shape_of(item) for item in value[:1]] if isinstance(value, list) else type(value).__name__


def test_the_imitation_answers_what_vllm_answered(peers: dict[str, Model | None], tokenizer: Tokenizer) -> None:
    """Names, ids and texts to the letter; log-probs of likely tokens within what BF16 moves them."""
    intact, nan = Vllm(peers["intact"], tokenizer), Vllm(None, tokenizer)
    for name, line in RECORDED.items():
        status, body = (nan if name.startswith("nan") else intact).respond(line["path"], line["request"])
        assert (status, shape_of(body)) == (line["status"], shape_of(line["body"])), name
        if status == 200:
            theirs, mine = line["body"]["choices"][0], body["choices"][0]
            same = ("token_ids", "text", "finish_reason", "prompt_token_ids")
            assert [mine.get(key) for key in same] == [theirs.get(key) for key in same]
            message = theirs.get("message", {})
            assert {k: v for k, v in mine.get("message", {}).items() if k in message} == message
            assert body.get("prompt_token_ids") == line["body"].get("prompt_token_ids")
    mine = intact.respond("/v1/completions", RECORDED["prompt_logprobs"]["request"])[1]["choices"][0]
    for recorded, row in zip(
        RECORDED["prompt_logprobs"]["body"]["choices"][0]["prompt_logprobs"][1:],
        mine["prompt_logprobs"][1:],
        strict=True,
    ):
        assert recorded.keys() == row.keys()
        assert all(abs(recorded[i]["logprob"] - row[i]["logprob"]) <= 0.25 for i in row)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of serving, and the findings that it must have."""

    peer: str = "intact"
    thinks: bool = True
    parser: str = "deepseek_v4"
    is_chatml: bool = False
    found: tuple[str, ...] = ()
    noted: tuple[str, ...] = ("default-mode",)


CASES = {
    "healthy": Case(),
    "healthy, thinking off": Case(thinks=False, noted=()),
    "deepseek_r1, thinking": Case(parser="deepseek_r1", found=("reasoning-swallowed",)),
    "rope": Case("rope", found=("computes-otherwise",)),
    "rope behind a wrong template": Case(
        "rope", is_chatml=True, noted=(), found=("computes-otherwise", "prompt-template")
    ),
    "fused-scale": Case("fused", thinks=False, noted=(), found=("computes-otherwise",)),
    "nan": Case("nan", thinks=False, noted=(), found=("non-finite", "all-special")),
    "chatml": Case(is_chatml=True, noted=(), found=("prompt-template",)),
    "deepseek_r1": Case(thinks=False, parser="deepseek_r1", noted=(), found=("reasoning-swallowed",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_vllm_is_called_what_it_is(name: str, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    code, report = diff(capsys, serve(case.peer, thinks=case.thinks, parser=case.parser, is_chatml=case.is_chatml))
    assert (report["found"], report["noted"]) == (list(case.found), list(case.noted))
    assert (code, report["agrees"]) == ((1, False) if case.found else (0, True))
    assert report["diagnosis"] == (case.found[0] if case.found else None)
    remedies = {check["id"]: check["remedy"] for check in report["checks"] if check["remedy"]}
    assert remedies.keys() == {*case.found, *case.noted}, "each finding has its own remedy"
    assert len(set(remedies.values())) == len(remedies)
    assert [(line["prompt_idx"], line["idx"]) for line in report["positions"][:2]] == [(0, 1), (0, 2)]
    assert len(report["positions"]) == report["numbers"]["num_positions"]
    joined = any("w1 and w3 have different global scales" in text for text in report["suspects"])
    assert joined == ("computes-otherwise" in case.found)


def test_a_server_of_nan_is_asked_again_without_log_probs(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    with running(serve("nan")) as url:
        assert main(["diff", "--against", url, "--max-tokens", "4", "--max-model-len", "512", "--seed", "1"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "found non-finite: " in out
    assert "Out of range float values are not JSON compliant" in out
    assert "found all-special: 1 (bound 1): 16 of 16 generated tokens are special, and our model writes text" in out


def test_default_mode_says_how_to_switch_it_off(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = diff(capsys, serve("intact"))
    says = next(check["says"] for check in report["checks"] if check["id"] == "default-mode")
    assert says.startswith("without a wish, its mode is thinking with effort max of v4")
    assert '{"chat_template_kwargs": {"thinking": false, "enable_thinking": false}}' in says


OTHERS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "DeepSeek's field": ({"obeys": "thinking"}, [], ["default-mode"]),
    "OpenAI's field, others refused": ({"obeys": "reasoning_effort", "is_strict": True}, [], ["default-mode"]),
    "no field": ({"obeys": ""}, [], ["default-mode"]),
    "only a number of tokens": ({"tells_ids": False}, [], ["default-mode"]),
    "only a number, swallowed": (
        {"tells_ids": False, "thinks": False, "parser": "deepseek_r1"},
        ["reasoning-swallowed"],
        [],
    ),
    "only a chat": ({"has_completions": False}, [], ["default-mode"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_servers_like_vllm_are_understood_too(name: str, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    options, found, noted = OTHERS[name]
    _, report = diff(capsys, serve("intact", **options))
    assert (report["found"], report["noted"]) == (found, noted)
    verdicts = {check["id"]: check["verdict"] for check in report["checks"]}
    assert verdicts["prompt-template"] == "ok"
    assert verdicts["reasoning-swallowed"] == ("found" if found else "ok")


def test_nan_is_known_by_a_failure_where_log_probs_are_asked(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that cannot write NaN and says nothing of it: 500 with log-probs, 200 without."""
    code, report = diff(capsys, serve("nan", thinks=False, nan_status=500))
    assert (code, report["found"]) == (1, ["non-finite", "all-special"])


def test_nan_after_one_prompt_leaves_the_others_compared(
    serve: Serve, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (kettle,) = tokenizer.encode_raw(" kettle")[:1]
    code, report = diff(capsys, serve("rope", thinks=False, nan_id=kettle))
    assert (code, report["found"]) == (1, ["non-finite", "computes-otherwise"])
    numbers = report["numbers"]
    assert 0 < numbers["num_compared"] < numbers["num_positions"]


def test_greedy_answers_alone_tell_a_joined_scale(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Likely tokens move less than a prompt's; KL sees it."""
    for peer, found in (("intact", []), ("fused", ["computes-otherwise"])):
        _, report = diff(capsys, serve(peer, thinks=False, scores_prompts=False), "--max-tokens", "10")
        assert (report["form"], report["found"]) == ("generated", found)
        assert report["numbers"]["num_positions"] >= 30
