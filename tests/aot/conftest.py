"""Kernels compiled for GPUs that are not here. A process that interprets cannot compile: a run of its own."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from ownpath.kernels.dsl.cache import Config, compile_missing, stem

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: tests/aot compiles")


@pytest.fixture(scope="session")
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own with the CuTe kernels of all selected tests, each compiled once. All modules' together and in
    one process, which takes longer to start than for most kernels: other tests have the other core."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWNPATH_KERNEL_CACHE", str(folder))
        patch.setattr(os, "cpu_count", lambda: 1)
        compile_missing(configs_of(request.session.items))
    return folder


@pytest.fixture
def binary(cubins: Path, request: pytest.FixtureRequest) -> Path:
    """The machine code of the test's ``config``."""
    return cubins / f"{stem(request.getfixturevalue('config')).name}.cubin"


def configs_of(items: Iterable[pytest.Item]) -> list[Config]:
    """Returns what the tests that take ``binary`` are to have compiled."""
    return [
        item.callspec.params["config"]
        for item in items
        if isinstance(item, pytest.Function) and "binary" in item.fixturenames
    ]
