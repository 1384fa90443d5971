"""The commands without the packages that only extras or the tests bring, as ``make demo`` and most people have them."""

import subprocess
import sys

import pytest

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
from ownpath.cli import main
"""
SERVE = "import ownpath.commands.session, ownpath.commands.serve, ownpath.server.app; sys.exit(0)"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)


def test_a_package_is_hidden() -> None:
    assert run("import importlib.util; sys.exit(importlib.util.find_spec('triton') is not None)").returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        'sys.exit(main(["generate", "2 + 2 =", "--max-tokens", "2"]))',
        'sys.exit(main(["plan", "--device", "sm_90"]))',
        'sys.exit(main(["verify", "--stages", "environment"]))',
        SERVE,
    ],
    ids=["generate", "plan", "verify", "serve"],
)
def test_a_command_runs(code: str) -> None:
    found = run(code)
    assert found.returncode == 0, found.stderr
