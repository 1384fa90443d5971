"""Commands and code, one after the other, in one fresh interpreter: starting each in its own takes two seconds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

PROGRAM = """
import contextlib, io, json, sys
from ownpath.cli import main

told = []
for step in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = exec(step, {}) if isinstance(step, str) else main(step)
    told.append((code or 0, out.getvalue()))
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Told:
    """code: the exit code of a command, 0 of code that ran to its end. out: what it wrote to standard output."""

    code: int
    out: str


def run_steps(prelude: str, steps: Sequence[str | Sequence[str]]) -> list[Told]:
    """Runs ``prelude``, and then each step: the arguments of ``ownpath``, or code."""
    done = subprocess.run(
        [sys.executable, "-c", prelude + PROGRAM], input=json.dumps(steps), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Told(code, out) for code, out in json.loads(done.stdout)]
