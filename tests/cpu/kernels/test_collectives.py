"""The exchanges as torch's groups make them: gloo, two processes. Those on GPUs are asked in tests/gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ownpath.kernels.exchange.collectives import rows_of_each

TESTS = Path(__file__).parents[2]


def test_two_processes_exchange_over_gloo(tmp_path: Path) -> None:
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "support.gloo_collectives"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=90)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def test_rows_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows cannot be shared equally by 2 ranks"):
        rows_of_each(torch.zeros(7, 8), 2)
