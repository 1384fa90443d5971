"""Describes this machine as data, and lists combinations of hardware and software that are known to compute wrong."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ownpath.bench.record import device_name
from ownpath.versions import versions

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Machine:
    """sm: compute capability times ten, ``None`` off CUDA. driver: NVIDIA's version, "" where unknown.

    versions: of Python, CUDA (as torch was built with it; "" without) and the packages that are installed.
    """

    device: str
    sm: int | None
    driver: str
    versions: Mapping[str, str]

    def version(self, name: str) -> tuple[int, ...]:
        """Returns the leading numbers of a version, () where it is not installed. ``driver`` is a name too."""
        text = self.driver if name == "driver" else self.versions.get(name, "")
        match = re.match(r"\d+(\.\d+)*", text)
        return tuple(int(part) for part in match[0].split(".")) if match else ()


@dataclass(frozen=True)
class KnownBad:
    """A combination that computes wrong or crashes. source: where that is reported."""

    what: str
    remedy: str
    source: str
    applies: Callable[[Machine], bool]


KNOWN_BAD = (
    KnownBad(
        "CUDA 13 with a driver older than 580: kernels cannot be loaded",
        "install a driver of branch 580 or later, or a torch built for CUDA 12",
        "CUDA 13.0 release notes, table of minimum driver versions",
        lambda m: m.version("cuda") >= (13,) and () < m.version("driver") < (580,),
    ),
    KnownBad(
        "driver 570 on sm_100: block-scaled FP4 experts gave NaN now and then",
        "install a driver of branch 580 or later",
        "https://github.com/flashinfer-ai/flashinfer/issues/2569",
        lambda m: _is_sm(m, 100, 104) and m.version("driver")[:1] == (570,),
    ),
    KnownBad(
        "Triton 3.6 to 3.8 on sm_103: two dots through one accumulator are compiled wrong",
        "run on sm_100, or with a Triton that carries the fix",
        "https://github.com/triton-lang/triton/issues/10821",
        lambda m: m.sm == 103 and (3, 6) <= m.version("triton")[:2] <= (3, 8),
    ),
    KnownBad(
        "Triton 3.7.1 on sm_90: kernels with several dots read shared memory out of bounds",
        "pip install triton==3.6.0, which ownpath is tested with",
        "https://github.com/triton-lang/triton/issues/11366",
        lambda m: _is_sm(m, 90, 100) and m.version("triton")[:3] == (3, 7, 1),
    ),
)
"""Public reports, not our measurements."""


def _is_sm(machine: Machine, first: int, end: int) -> bool:
    return machine.sm is not None and first <= machine.sm < end


def this_machine(device: torch.device) -> Machine:
    """Describes the machine as ``device`` sees it."""
    if device.type != "cuda":
        return Machine(device_name(str(device)), None, "", versions())
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(device_name(str(device)), 10 * major + minor, driver_version(), versions())


def driver_version() -> str:
    """Returns the version of NVIDIA's kernel module, from the file that it keeps; "" where there is none."""
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return match[1] if match else ""


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory that an allocation on ``device`` may take now; ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return 1024 * int(match[1]) if match else None
