"""Several ranks in ``bench step``: they begin together, the slowest counts, and times stand beside aims."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch

from ownpath.bench.request import BenchRequest
from ownpath.config import Parallel
from ownpath.ranks.peers import Peers
from ownpath.splits import AttentionSplit
from ownpath.trace.launches import DeviceLaunch

AIM_CONTEXT = 8192


class Aim(NamedTuple):
    """Milliseconds of a step: by bytes at 4.41 TB/s, at most, and hoped for; ``None`` where nothing was set."""

    floor: float
    must: float | None = None
    aim: float | None = None


_HEADS, _DATA = AttentionSplit.HEADS, AttentionSplit.DATA
AIMS: Mapping[tuple[AttentionSplit, int, int], Aim] = MappingProxyType(
    {
        (_HEADS, 2, 1): Aim(1.44, 4.8, 3.3),
        (_HEADS, 2, 8): Aim(4.11, 8.5, 7.0),
        (_HEADS, 2, 64): Aim(15.1, 22.0, 19.0),
        (_HEADS, 2, 128): Aim(18.3),
        (_HEADS, 2, 256): Aim(19.6),
        (_DATA, 2, 64): Aim(15.6, 22.0, 19.0),
        (_DATA, 2, 128): Aim(18.7, 28.0, 25.0),
        (_DATA, 2, 256): Aim(19.7),
        (_HEADS, 4, 1): Aim(0.87),
        (_HEADS, 4, 8): Aim(2.22),
        (_HEADS, 4, 64): Aim(7.8),
        (_HEADS, 4, 128): Aim(9.5),
        (_HEADS, 4, 256): Aim(10.4),
        (_DATA, 4, 64): Aim(8.5),
        (_DATA, 4, 128): Aim(10.1),
        (_DATA, 4, 256): Aim(10.6),
    }
)
"""V4-Flash with a context of ``AIM_CONTEXT``: division of attention, ranks and rows of all ranks -> aims on H200s."""

GROUPS = (
    ("exchange", (".reduce", ".gather", ".scatter", ".turn")),
    ("experts", ("ffn.experts",)),
    ("hyper", ("hc_attn", "hc_ffn", "hc_head")),
    ("router", ("ffn.router", "ffn.decode.route", "ffn.gate")),
    ("attention", (".core", ".entries", ".attend", ".scores", ".select", ".angles", "_norm", "quantizer")),
    ("dense", (".w13", ".w2", ".swiglu", "head", ".wqa_wkv", ".queries", ".wq_b", ".wo_a", ".wo_b", ".x_products")),
)
"""Groups of slots, by what a slot's name ends with; the first that fits."""


def share_of(num_rows: int, parallel: Parallel) -> int:
    """Returns how many of all ranks' rows one computes. Errors: ValueError where they do not divide."""
    if parallel.attention is AttentionSplit.HEADS or parallel.size == 1:
        return num_rows
    if num_rows % parallel.size:
        raise ValueError(f"--tokens {num_rows}: by data, rows must divide into {parallel.size} ranks")
    return num_rows // parallel.size


def agree(peers: Peers, value: bool) -> bool:
    """Waits for all ranks, and returns the first one's value."""
    if peers.size == 1:
        return value
    return bool(peers.swap("bench: together", (torch.tensor([value]),))[0][0])


def slowest(peers: Peers, own: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the slowest rank's time of each step, on the device and on the host."""
    if peers.size == 1:
        return list(own)
    found = peers.swap("bench: times", (torch.tensor(own, dtype=torch.float64),))
    ranks = torch.stack([times for (times,) in found])
    return [(gpu, host) for gpu, host in ranks.amax(0).tolist()]


def division_of(parallel: Parallel) -> str:
    """Returns what divides a model, as the end of a label; empty for one rank."""
    if parallel.size == 1:
        return ""
    return f", {parallel.size} ranks, {parallel.attention} + {parallel.experts}"


def rank_facts(asked: BenchRequest, shape: str, num_rows: int) -> dict[str, object]:
    """Returns what a row of several ranks says of itself, with its aims where there are some."""
    parallel = asked.parallel
    if parallel.size == 1:
        return {}
    facts: dict[str, object] = {"ranks": parallel.size, "attention": str(parallel.attention)}
    facts |= {"experts": str(parallel.experts)}
    aim = AIMS.get((parallel.attention, parallel.size, num_rows))
    options = asked.step
    if aim is None or (shape, options.context, options.layers) != ("flash", AIM_CONTEXT, None):
        return facts
    told = {"floor_ms": aim.floor, "must_ms": aim.must, "aim_ms": aim.aim}
    return facts | {name: value for name, value in told.items() if value is not None}


def group_of(kind: str) -> str:
    """Returns the group of a kind of slot."""
    return next((group for group, ends in GROUPS if kind.endswith(ends)), "rest")


def with_slots(replayed: Sequence[DeviceLaunch], eager: Sequence[DeviceLaunch]) -> tuple[list[DeviceLaunch], bool]:
    """Gives the kernels of a replayed step the slots of the same kernels in an eager one, which run in the same order.

    Returns the eager ones and False where they are not the same.
    """
    if [launch.kernel for launch in replayed] != [launch.kernel for launch in eager]:
        return list(eager), False
    pairs = zip(replayed, eager, strict=True)
    return [replace(launch, slot=beside.slot) for launch, beside in pairs], True
