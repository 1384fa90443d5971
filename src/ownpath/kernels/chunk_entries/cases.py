"""Test and bench steps with chunks: the layer's sizes, as of a decode step's writes, and what each request brings."""

from dataclasses import dataclass

from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES as LAYERS


@dataclass(frozen=True)
class ChunkEntriesCase:
    """starts, counts: each request's first position, and its rows. tiny: small enough to be interpreted on a CPU."""

    label: str
    layer: KernelCase
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    tiny: bool = False
    bench: bool = False


_NARROW = {case.label.split()[0]: case for case in LAYERS if case.tiny and "narrow" in case.label}
_WIDE = {case.label: case for case in LAYERS if case.bench}
CASES = (
    ChunkEntriesCase("swa narrow", _NARROW["swa"], (0, 130), (2, 1), tiny=True),
    ChunkEntriesCase("csa narrow", _NARROW["csa"], (0, 1, 254), (5, 8, 3), tiny=True),
    ChunkEntriesCase("hca narrow", _NARROW["hca"], (0, 127), (129, 1), tiny=True),
    ChunkEntriesCase("csa", _WIDE["csa"], (3, 13), (5, 4), tiny=True),
    *(ChunkEntriesCase(f"{name} 1024", _WIDE[name], (0,), (1024,), bench=True) for name in _WIDE),
    *(ChunkEntriesCase(f"{name} mixed", _WIDE[name], (0, 3, 255, 130, 900), (129, 1, 300, 77, 12)) for name in _WIDE),
)
