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


def pytest_collection_finish(session: pytest.Session) -> None:
    """On a Hopper device, compiles what the tests may launch before the first of them runs."""
    device = torch.device(session.config.getoption("--device"))
    if session.config.option.collectonly or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return
    from support.kernel_configs import CompiledAhead

    ahead = CompiledAhead(session.config.pluginmanager.get_plugin("terminalreporter"))
    ahead.compile({item.module for item in session.items})
    session.config.pluginmanager.register(ahead)
