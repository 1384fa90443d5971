"""A device that is really lost: after a failed assertion or an illegal address CUDA fails every later call."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.kernel_configs import model_configs
from support.lost_device import FAULTS, LOST, command, end_of_server

from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir

pytestmark = pytest.mark.gpu


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


STOPPED = f"the engine has stopped: {LOST}"
ENGINE_FAILED = 75


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_of_a_lost_device_are_told(fault: str, cuda: torch.device, tmp_path: Path) -> None:
    """In the engine alone, and whoever asks it afterwards."""
    full = command(fault, tmp_path / "lose", "engine", str(cuda))
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"errors": [STOPPED] * 2, "failure": LOST, "is_alive": False, "refusal": STOPPED}
    assert "the device is lost: " in done.stderr, "as the log tells it"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_device_ends_the_server(fault: str, cuda: torch.device, tmp_path: Path) -> None:
    """Open answers name it, ``/health`` tells it, and the process ends so that a supervisor starts it again."""
    for package in ("starlette", "uvicorn", "h11", "pydantic", "httpx"):
        pytest.importorskip(package)
    ending = end_of_server(fault, tmp_path / "lose", ["--device", str(cuda)])
    assert ending.streams == [STOPPED] * 2
    assert ending.health == (503, LOST)
    assert ending.exit_code == ENGINE_FAILED
    assert "the device is lost: " in ending.log
