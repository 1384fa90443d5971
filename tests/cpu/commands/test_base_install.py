"""The commands without the packages that only extras or the tests bring, as ``make demo`` and most people have them."""

import pytest
from support.fresh_interpreter import Told, run_steps

ABSENT = (
    "triton",
    "cutlass",
    "transformers",
    "modelopt",
    "compressed_tensors",
    "torchao",
    "matplotlib",
    "scipy",
    "pytest",
)
WITHOUT = f"""
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = classmethod(lambda cls, name, *rest: None if name.split(".")[0] in {ABSENT!r} else find(name, *rest))
"""
IS_HIDDEN = "import importlib.util\nprint(importlib.util.find_spec('triton') is None)"
STEPS: dict[str, str | tuple[str, ...]] = {
    "hidden": IS_HIDDEN,
    "plan": ("plan", "--device", "sm_90"),
    "verify": ("verify", "--stages", "environment"),
    "generate": ("generate", "2 + 2 =", "--max-tokens", "2"),
    "serve": "import ownpath.commands.session, ownpath.commands.serve, ownpath.server.app",
}


@pytest.fixture(scope="module")
def told() -> dict[str, Told]:
    return dict(zip(STEPS, run_steps(WITHOUT, list(STEPS.values())), strict=True))


def test_a_package_is_hidden(told: dict[str, Told]) -> None:
    assert told["hidden"].out == "True\n"


@pytest.mark.parametrize("name", ["plan", "verify", "generate", "serve"])
def test_a_command_runs(name: str, told: dict[str, Told]) -> None:
    assert told[name].code == 0
