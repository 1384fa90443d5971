"""The request of a bench, as a command line makes it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ownpath.bench.measure import Settings
from ownpath.config import ONE_RANK, Parallel
from ownpath.formats import CacheFormat
from ownpath.loading import WindowOpener
from ownpath.official import PLAIN, Step
from ownpath.ranks.peers import Alone, Peers


@dataclass(frozen=True)
class StepOptions:
    """Options of ``bench step``, ``prompt`` and ``drafts``. context: tokens that a row's caches hold. layers: the first
    ones only.

    export: "nvidia" has FP8 outside the experts, "full" NVFP4; "native" FP8, and MXFP4 experts. expert_sets: sets of
    experts that the layers share; ``None``: 24, or of several ranks as many as there are layers. by_gate: experts are
    chosen by the gate of random weights, not uniformly. slots: time each kind of slot, too. chunks: most tokens of a
    prompt in a step, each of them measured. cache_format: of a prompt's keys. numerics: the official steps of a prompt.
    accepted: the share of guesses that ``bench drafts`` accepts by force; ``None``: its own.
    """

    context: int = 1024
    layers: int | None = None
    export: str = "nvidia"
    expert_sets: int | None = None
    by_gate: bool = False
    slots: bool = False
    chunks: tuple[int, ...] = (8192,)
    cache_format: CacheFormat = CacheFormat.BF16
    numerics: frozenset[Step] = PLAIN
    accepted: float | None = None


@dataclass(frozen=True)
class BenchRequest:
    """shapes, tokens, contenders: empty or ``None`` for a bench's own. libraries: other systems' files, by system.

    parallel, peers, open_window: of several ranks that measure together, what each of them is, the ranks' group, and
    what opens a rank's window on a GPU.
    ranks: of ``bench parallel``, which it starts; ``None``: a rank for each GPU. command_line: which they run.
    """

    settings: Settings
    shapes: Sequence[str] = ()
    tokens: tuple[int, ...] | None = None
    contenders: str | None = None
    libraries: Mapping[str, Path] = field(default_factory=dict)
    step: StepOptions = field(default_factory=StepOptions)
    parallel: Parallel = ONE_RANK
    peers: Peers = field(default_factory=Alone)
    open_window: WindowOpener | None = None
    ranks: int | None = None
    command_line: Sequence[str] = ()

    def library(self, system: str) -> Path | None:
        """Returns a system's library: as asked for, or by ``OWNPATH_BENCH_<SYSTEM>``; ``None`` if neither says."""
        named = os.environ.get(f"OWNPATH_BENCH_{system.upper()}")
        return self.libraries.get(system) or (Path(named) if named else None)
