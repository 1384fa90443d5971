"""Exchanges between GPUs, a process each: replays with delays, and a rank that dies. On as many GPUs as there are, up
to eight; docs/parallel.md says on how many they ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exchange_ranks import LOST_EXIT

TESTS = Path(__file__).parents[1]
MOST_SECONDS = 6.0

pytestmark = [pytest.mark.multigpu, pytest.mark.sm90]


@pytest.fixture
def size(device: torch.device) -> int:
    """Ranks: all GPUs, at most eight."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        pytest.skip(f"needs two GPUs, found {count}")
    return min(count, 8)


def run_ranks(size: int, meeting: Path, task: str, *rest: str) -> list[tuple[int, str, str]]:
    """Runs a task on every rank. Returns exit codes, outputs and errors, in the order of ranks."""
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "support.exchange_ranks", task]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(meeting), *rest],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *both) for rank, both in zip(ranks, said, strict=True)]


def test_a_hundred_thousand_replays(size: int, tmp_path: Path) -> None:
    """Random sizes and delays: no bit is wrong on any rank."""
    found = run_ranks(size, tmp_path / "meeting", "replays", "100000")
    assert [code for code, *_ in found] == [0] * size, found


def test_rows_and_sums_share_a_window(size: int, tmp_path: Path) -> None:
    """As many replays of rows there and sums back, columns and sums: no bit is wrong on any rank."""
    found = run_ranks(size, tmp_path / "meeting", "rows", "100000")
    assert [code for code, *_ in found] == [0] * size, found


def test_experts_over_ranks(size: int, tmp_path: Path) -> None:
    """``MegaMoE`` by kernels has the bits of exchanges through the host, eagerly and as a graph, in every form."""
    found = run_ranks(size, tmp_path / "meeting", "mega")
    assert [code for code, *_ in found] == [0] * size, found


@pytest.mark.parametrize("phase", ["before the push", "in the push", "after the push", "in the wait"])
def test_a_rank_dies(size: int, tmp_path: Path, phase: str) -> None:
    """The others name it within six seconds, go on to use their GPU, and end with an error."""
    *others, last = run_ranks(size, tmp_path / "meeting", "dies", phase)
    assert last[0] == -9
    for code, said, errors in others:
        assert code == LOST_EXIT, errors
        assert f"rank {size - 1} is lost, in layers.3.attn.reduce" in said
        assert float(said.split(" s:")[0]) < MOST_SECONDS


def test_torchs_exchanges_give_the_sums(size: int, tmp_path: Path) -> None:
    found = run_ranks(size, tmp_path / "meeting", "baselines")
    assert [code for code, *_ in found] == [0] * size, found
