"""These tests need a CUDA device; elsewhere they are skipped, and say so."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda(device: torch.device) -> torch.device:
    """The CUDA device under test."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: run with --device cuda")
    return device
