"""Options and fixtures that every test shares."""

import pytest
import torch

# Torch's threads spin while they wait; on a machine with two busy cores one thread is the faster choice.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device for the tests that take `device` (default: cpu)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: the same suite runs with ``--device cuda``."""
    return torch.device(request.config.getoption("--device"))
