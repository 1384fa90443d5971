"""These tests need a CUDA device; elsewhere they are skipped, and say so."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda(device: torch.device) -> torch.device:
    """The CUDA device under test."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: run with --device cuda")
    return device


@pytest.fixture(autouse=True)
def hopper(request: pytest.FixtureRequest, cuda: torch.device) -> None:
    """Tests marked ``sm90`` need that device; the same numbers for each test."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("sm90") and torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("needs a Hopper device")
