"""Options and fixtures that every test shares."""

import gc
import os
from collections.abc import Generator

import pytest
import torch
from support.failures import NamedAtOnce

from ownpath.terminal import console, progress

# Torch's threads spin while they wait; on a machine with two busy cores one thread is the faster choice, also for the
# processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine a command takes seconds and says so on stderr, which tests compare with what they expect.
progress.FIRST_LINE_S = 600.0
# The terminal that the tests are started from is not what they are about.
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)
os.environ["TERM"] = "xterm"

LONG_FILES = ("test_mutations.py", "test_diff_servers.py")
"""Begun first. A file is one process's: a long one that is last has the other process wait."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device for the tests that take `device` (default: cpu)")
    parser.addoption("--compile-only", action="store_true", help="compile what the tests launch, and run none of them")


@pytest.fixture(autouse=True)
def consoles() -> None:
    """A console keeps the width of when it was made: no test meets another's."""
    console._console.cache_clear()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: the same suite runs with ``--device cuda``."""
    return torch.device(request.config.getoption("--device"))


def pytest_configure(config: pytest.Config) -> None:
    """A test that fails is named at once. On a CUDA device, what the tests may launch is compiled before the first of
    them runs."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(NamedAtOnce(config))
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and "PYTEST_XDIST_WORKER" not in os.environ:
        from support.kernel_configs import CompiledAhead

        config.pluginmanager.register(CompiledAhead(config, torch.cuda.get_device_capability(device)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leaves what is collected out of all searches for garbage, then and later: 700,000 objects. Of what tests make,
    nearly nothing is garbage: searches after every 700 objects are a twentieth of their time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(20_000)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first. On a device, leaves out tests that do not take ``device``: they would repeat, on its host, what
    CPU tests did."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    if config.getoption("--device") == "cpu":
        return
    repeated = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if item not in set(repeated)]
