"""``MegaMoE`` by pushed kernels: two processes map each other's windows, as GPUs do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.mapped_windows import run_rank

TESTS = Path(__file__).parents[1]


def test_experts_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four forms, with 3 rows, then 1: the bits of exchanges through the host. The epoch wraps."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "support.mapped_windows", "1", "2", str(tmp_path)]
    second = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    try:
        run_rank(0, 2, tmp_path)
        assert second.wait(60) == 0, second.stderr and second.stderr.read()
    finally:
        second.kill()
        second.communicate()
