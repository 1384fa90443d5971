"""``ownpath diff`` against vLLM 0.32 as it answered, intact and with known faults: each is named, and nothing else."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.diff.vllm_server import RECORDED, Vllm, running

from ownpath.chat.tokenizer import Tokenizer
from ownpath.cli import main
from ownpath.commands import session
from ownpath.config import EngineConfig
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


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch, ours: Model) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_: ours)


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
    """How it is served, and what is to be said of it."""

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
def test_a_vllm_is_called_what_it_is(
    name: str, peers: dict[str, Model | None], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    vllm = Vllm(peers[case.peer], tokenizer, case.thinks, case.parser, case.is_chatml)
    code, report = diff(capsys, vllm)
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


def test_a_server_of_nan_is_asked_again_without_log_probs(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(Vllm(None, tokenizer)) as url:
        assert main(["diff", "--against", url, "--max-tokens", "4", "--max-model-len", "512"]) == 1
    out = capsys.readouterr().out
    assert "found       non-finite: " in out
    assert "Out of range float values are not JSON compliant" in out
    assert (
        "found       all-special: 1 (bound 1): 16 of 16 generated tokens are special, and our model writes text" in out
    )


def test_default_mode_says_how_to_switch_it_off(
    peers: dict[str, Model | None], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = diff(capsys, Vllm(peers["intact"], tokenizer))
    says = next(check["says"] for check in report["checks"] if check["id"] == "default-mode")
    assert says.startswith("without a wish, its mode is thinking with effort max of v4")
    assert '{"chat_template_kwargs": {"thinking": false, "enable_thinking": false}}' in says
