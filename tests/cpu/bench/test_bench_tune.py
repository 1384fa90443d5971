"""The tuner's frame: the fastest right candidate of each case, in a table that kernels can read."""

import json

import pytest

from ownpath.bench.tune import CandidateFailed, chosen_cases, tune

TIMES = {("m=1", 64): 5.0, ("m=1", 128): 4.0, ("m=1", 256): None, ("m=64", 64): 7.0, ("m=64", 128): 7.0}
CANDIDATES = {
    "m=1": [{"tile_n": 64}, {"tile_n": 128}, {"tile_n": 256}],
    "m=64": [{"tile_n": 64}, {"tile_n": 128}],
}


def run(case, config) -> float:
    us = TIMES[case, config["tile_n"]]
    if us is None:
        raise CandidateFailed("shared memory: 260000 bytes wanted, 232448 there")
    return us


def test_the_fastest_is_kept_and_a_tie_goes_to_the_earlier(tmp_path) -> None:
    said = []
    out = tmp_path / "tuned" / "moe.json"
    best = tune("moe", CANDIDATES, run, out, {"device": "here", "commit": "abc"}, said.append)
    assert best["m=1"].us == 4.0
    table = json.loads(out.read_text(encoding="utf-8"))
    assert table["family"] == "moe"
    assert table["measured"] == {"device": "here", "commit": "abc"}
    assert table["entries"] == {
        "m=1": {"config": {"tile_n": 128}, "us": 4.0, "commit": "abc"},
        "m=64": {"config": {"tile_n": 64}, "us": 7.0, "commit": "abc"},
    }
    assert len(said) == 5
    assert any("shared memory" in line for line in said)


def test_cases_of_an_earlier_table_stay(tmp_path) -> None:
    out = tmp_path / "moe.json"
    tune("moe", CANDIDATES, run, out, {}, lambda _: None)
    tune("moe", {"m=9": [{"tile_n": 64}]}, lambda case, config: 1.0, out, {}, lambda _: None)
    assert list(json.loads(out.read_text(encoding="utf-8"))["entries"]) == ["m=1", "m=64", "m=9"]


def test_a_part_of_the_cases_can_be_tuned() -> None:
    cases = {f"tokens={tokens},rows={rows},cols=64": [{}] for tokens in (1, 16) for rows in (64, 640)}
    assert list(chosen_cases(cases, [], None)) == list(cases)
    assert list(chosen_cases(cases, ["rows=64,"], [1])) == ["tokens=1,rows=64,cols=64"]
    assert list(chosen_cases(cases, [], [16])) == ["tokens=16,rows=64,cols=64", "tokens=16,rows=640,cols=64"]
    with pytest.raises(ValueError, match="no case has rows=1,, tokens"):
        chosen_cases(cases, ["rows=1,"], None)


def test_a_case_without_a_candidate_that_runs_writes_nothing(tmp_path) -> None:
    def never(case, config) -> float:
        raise CandidateFailed("wrong answer")

    with pytest.raises(CandidateFailed, match=r"no candidate for m=1 runs: wrong answer; wrong answer"):
        tune("moe", {"m=1": CANDIDATES["m=1"][:2]}, never, tmp_path / "moe.json", {}, lambda _: None)
    assert not (tmp_path / "moe.json").exists()


def test_a_mistake_in_the_candidates_is_not_taken_for_a_slow_one(tmp_path) -> None:
    with pytest.raises(KeyError):
        tune("moe", {"m=1": [{"tile_m": 64}]}, run, tmp_path / "moe.json", {}, lambda _: None)
