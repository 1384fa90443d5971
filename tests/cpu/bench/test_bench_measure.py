"""The harness itself, on the CPU with the reference kernels: who is right, who is wrong, which clock."""

import contextlib
import itertools
import json
import math

import pytest
import torch

from ownpath.bench import rotation
from ownpath.bench.check import NUM_SAMPLED, rel_l2, sample
from ownpath.bench.contender import W4A16_MAX_REL_L2, LinearCall, Missing, MoeCall
from ownpath.bench.linear import FP8_BENCH, NVFP4_BENCH, run_linear
from ownpath.bench.measure import Settings
from ownpath.bench.moe import run_moe
from ownpath.bench.ours import OwnFp8Linear, OwnMoe, OwnNvfp4Linear
from ownpath.bench.peers.cublas import CublasNvfp4
from ownpath.bench.peers.flashinfer import FlashinferMoe
from ownpath.bench.peers.humming import HummingMoe, HummingNvfp4
from ownpath.bench.peers.quack import QuackNvfp4
from ownpath.bench.shapes import linear_shape, moe_shape
from ownpath.bench.timing import CudaGraph, WallClock, choose_timer
from ownpath.cli import main

SETTINGS = Settings.of("cpu", seed=1, budget_s=0.0)
MOE, LINEAR = moe_shape("tiny"), linear_shape("tiny")


@pytest.fixture(autouse=True)
def few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks whether a CPU's caches are cold, and 128 MB of weights for each round took minutes."""
    monkeypatch.setattr(rotation, "COLD_BYTES", 1_000_000)


class Peer:
    """A contender made of another one's calls."""

    name, is_peer, max_rel_l2 = "peer", True, W4A16_MAX_REL_L2

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def missing(self, device: str) -> Missing | None:
        return None

    def prepare(self, operands, num_rows) -> LinearCall:
        linear = OwnNvfp4Linear().prepare(operands, num_rows)
        return lambda x: self.spoil(linear(x))


def linear_rows(*contenders):
    return list(run_linear(NVFP4_BENCH, SETTINGS, LINEAR, [1, 5], contenders))


def test_our_moe_is_right_and_timed() -> None:
    rows = list(run_moe(SETTINGS, MOE, [1, 20], [OwnMoe()]))
    assert [row.status for row in rows] == ["ok", "ok"]
    for row in rows:
        assert row.timing is not None
        assert row.timing.us_p10 <= row.timing.us <= row.timing.us_p90
        assert row.timing.num_calls >= 8
        # The output and what passes between the products are rounded to bfloat16: two errors of at most 2^-8.
        assert row.rel_l2 is not None
        assert 0 < row.rel_l2 < 2**-7
    assert rows[0].case.distinct_experts == 2  # one token, two experts
    assert rows[1].case.distinct_experts == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize(("bench", "contender"), [(NVFP4_BENCH, OwnNvfp4Linear()), (FP8_BENCH, OwnFp8Linear())])
def test_our_linears_are_right_and_timed(bench, contender) -> None:
    rows = list(run_linear(bench, SETTINGS, LINEAR, [1, 5], [contender]))
    assert [(row.status, row.case.num_tokens) for row in rows] == [("ok", 1), ("ok", 5)]
    assert all(row.rel_l2 < 2**-8 for row in rows)  # one rounding to bfloat16


def test_no_floor_is_shown_for_a_device_nobody_measured() -> None:
    assert all(row.case.floor_us is None for row in linear_rows(OwnNvfp4Linear()))


def test_peers_that_cannot_run_here_have_a_row_each() -> None:
    rows = linear_rows(OwnNvfp4Linear(), HummingNvfp4(), QuackNvfp4(), CublasNvfp4())
    absent = [row for row in rows if row.is_peer]
    assert len(absent) == 6
    assert {(row.status, row.reason) for row in absent} == {("not applicable", "needs a CUDA device")}
    moe = list(run_moe(SETTINGS, MOE, [1], [HummingMoe(), FlashinferMoe()]))
    assert [row.status for row in moe] == ["not applicable"] * 2


def test_a_package_that_is_not_there_is_named() -> None:
    from ownpath.bench.peers import missing_package

    assert missing_package("no_such_module", "no-such-package", "cuda") == Missing(
        "not installed", "no package no-such-package"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * 1.05,
        lambda y: torch.cat([y[:-1], y[-1:] * float("nan")]),
        lambda y: torch.zeros_like(y),
    ],
    ids=["off by 5%", "last row not written", "all zero"],
)
def test_a_wrong_answer_is_found(spoil) -> None:
    rows = linear_rows(Peer(spoil))
    assert {row.status for row in rows} == {"wrong"}
    assert all(row.timing is not None and not row.counts and "relative L2" in row.reason for row in rows)


def test_a_peer_that_raises_is_a_row_with_the_reason() -> None:
    def fail(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this shape")

    rows = linear_rows(Peer(fail))
    assert [(row.status, row.reason) for row in rows] == [("failed", "RuntimeError: no kernel for this shape")] * 2


def test_a_peer_that_cannot_be_prepared_is_a_row_with_the_reason() -> None:
    class Broken(OwnMoe):
        name, is_peer = "broken", True

        def prepare(self, operands, num_tokens, top_k) -> MoeCall:
            raise ValueError("no compiler")

    rows = list(run_moe(SETTINGS, MOE, [1, 2], [Broken()]))
    assert [(row.status, row.reason) for row in rows] == [("failed", "ValueError: no compiler")] * 2


def test_errors_are_measured_against_the_reference() -> None:
    y = torch.tensor([[3.0, 4.0]])
    reference = torch.tensor([[3.0, 4.5]], dtype=torch.float64)
    assert rel_l2(y, reference) == pytest.approx(0.5 / math.hypot(3, 4.5))
    assert math.isnan(rel_l2(torch.tensor([[3.0, math.inf]]), reference))


def test_sampled_rows_span_the_batch() -> None:
    assert sample(1).tolist() == [0]
    assert sample(3).tolist() == [0, 1, 2]
    rows = sample(8192).tolist()
    assert (rows[0], rows[-1], len(set(rows))) == (0, 8191, NUM_SAMPLED)


def test_a_cpu_gets_a_wall_clock_and_a_gpu_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_timer("cpu"), WallClock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(choose_timer("cuda"), CudaGraph)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="say nothing about a GPU"):
        choose_timer("cuda")
    with pytest.raises(ValueError, match="cuda or cpu"):
        choose_timer("meta")


def test_the_wall_clock_times_one_call_of_the_round() -> None:
    calls = [lambda: sum(range(20_000)) for _ in range(5)]
    one = WallClock(0.0).time(calls[:1])
    five = WallClock(0.0).time(calls)
    assert five.num_calls == 5
    assert five.num_replays >= 3
    assert five.us_p10 < 4 * one.us  # of one call, not of all five


def test_the_command_prints_a_table_that_is_a_cpus(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    arguments = ["bench", "linear", "--device", "cpu", "--shape", "tiny", "--tokens", "1", "--seconds", "0"]
    assert main([*arguments, "--out", str(tmp_path / "rows.jsonl"), "--commit", "abc"]) == 0
    out = capsys.readouterr().out
    assert "says nothing about a GPU" in out
    assert "humming: not applicable" in out
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    record = json.loads(lines[0])
    assert record["commit"] == "abc"
    command = "ownpath bench linear --shape tiny --tokens 1 --device cpu --seed 0 --seconds 0.0"
    assert record["command"] == command, "it reproduces the row, and names no folder of this machine"


def test_a_run_that_ends_early_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    import ownpath.bench.linear as linear

    def interrupted(*args, measured=linear.run_linear):
        yield from itertools.islice(measured(*args), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "run_linear", interrupted)
    arguments = ["bench", "linear", "--device", "cpu", "--shape", "tiny", "--tokens", "1", "--seconds", "0"]
    with contextlib.suppress(KeyboardInterrupt):
        assert main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) != 0
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one of moe, linear, fp8"),
        (["moe", "--tune", "moe"], "name one of moe, linear, fp8"),
        (["attention"], "BENCH: invalid choice: 'attention'"),
        (["moe", "--device", "cpu", "--shape", "v5"], "no MoE shape 'v5'"),
        (["attend", "--device", "cpu", "--shape", "flash v5"], "no case has the words of 'flash v5'"),
        (["step", "--device", "cpu", "--shape", "v5"], "no model 'v5'; known: flash, pro, small"),
        (["step", "--device", "cpu", "--contenders", "vllm"], "bench step has none but ownpath"),
        (["moe", "--device", "cpu", "--context", "8"], "--context: an option of bench step"),
        (["step", "--device", "cpu", "--chunks", "8"], "--chunks: an option of bench prompt"),
        (["step", "--device", "cpu", "--numerics", "fp8_inputs"], "--numerics: an option of bench prompt"),
        (["prompt", "--numerics", "fp8"], "'fp8' is none of plain, official"),
        (["moe", "--device", "cpu", "--layers", "8"], "--layers: an option of bench step and bench prompt"),
        (["moe", "--device", "cpu", "--library", "vllm"], "vllm: not SYSTEM=FILE"),
        (["moe", "--device", "cpu", "--shape", "tiny", "--tokens", "0"], "at least 1"),
        (["moe", "--device", "cpu", "--shape", "tiny", "--contenders", "marlin"], "marlin not among ownpath, humming"),
        (["--tune", "no_such_family", "--device", "cpu"], "no kernel family 'no_such_family'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
