"""Answers of the toolkit's disassemblers about compiled kernels. Each is asked once."""

import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia.compiler as nvidia  # for the tools it carries


class Usage(NamedTuple):
    """Registers of a thread, bytes of its stack, and bytes of shared memory."""

    registers: int
    stack: int
    shared: int


@lru_cache(maxsize=512)
def told(tool: str, *options: str) -> str:
    """Returns the output of a tool."""
    command = [str(Path(nvidia.__file__).parent / "bin" / tool), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(binary: Path) -> Usage:
    text = told("cuobjdump", "-res-usage", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert found, text
    return Usage(*map(int, found.groups()))


def sass(binary: Path) -> str:
    return told("cuobjdump", "-sass", str(binary))


def code(binary: Path) -> str:
    """The instructions with names for jumps' targets."""
    return told("nvdisasm", "-c", str(binary))
