"""The device's own record of a step against the plan: the only witness of a replayed graph, in which no Python runs.

Each slot of ours is called once a step, and a boundary twice a layer, so each kernel must have been launched at least
so often, by the names that its spec declares. Kernels of vLLM's for parts that we took, and kernels of ours that nobody
planned, must not be there at all.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ownpath.kernels.registry import SPECS
from ownpath.ops import OpKind

_SPECS = MappingProxyType({spec.name: spec for spec in SPECS})
_OUR_KINDS = (OpKind.LINEAR, OpKind.GROUPED, OpKind.MOE, OpKind.HYPER)
_OURS = tuple(spec for spec in SPECS if spec.kind in _OUR_KINDS and (spec.min_sm or 0) < 100)
"""Those of Blackwell's have names that others have too, and run nowhere else."""
STOCK_EXPERTS = r"marlin_moe|moe_align|count_and_sort_expert|fused_moe|moe_sum|humming"
STOCK_LINEARS = r"fp8_gemm_1d|scaled_mm|w8a8_block|\bmarlin::Marlin|per_token_group_quant"
STOCK_WO_A = r"inv_rope_fp8_quant"
STOCK_HYPER = r"mhc_|hc_prenorm|hc_head_fuse"
"""Kernels of vLLM 0.26 to 0.33 for the parts that we take, by names in their sources."""


@dataclass(frozen=True)
class PlannedStep:
    """A step's launches. kernels: of our kernels, how many calls a step has. foreign: patterns of names that it
    must not have."""

    kernels: Mapping[str, int]
    foreign: tuple[str, ...]

    @classmethod
    def of(cls, rank: Mapping[str, Any]) -> "PlannedStep":
        """Reads a worker's walk."""
        own = {found["slot"]: found["planned"][1] for found in rank["modules"].values() if found.get("planned")}
        calls = Counter(kernel for planned in own.values() for kernel in planned.split("+"))
        if rank.get("hyper"):
            calls[rank["hyper"]] = 2 * len({path.split(".")[2] for path in rank["modules"] if ".layers." in path})
        parts = {slot.partition(".")[2].partition(".")[2] for slot in own}
        foreign = [STOCK_EXPERTS] if "ffn.experts" in parts else []
        foreign += [STOCK_LINEARS] if {"attn.wo_a", "attn.wo_b", "ffn.shared_experts.w2"} <= parts else []
        foreign += [STOCK_WO_A] if "attn.wo_a" in parts else []
        foreign += [STOCK_HYPER] if rank.get("hyper") else []
        return cls(calls, tuple(foreign))

    def faults(self, launched: Mapping[str, int]) -> Iterator[str]:
        """Yields what is not as planned. launched: name -> how often the device ran it in one step."""
        planned = [_SPECS[kernel] for kernel in self.kernels if kernel in _SPECS]
        for spec in planned:
            calls = self.kernels[spec.name]
            for pattern in () if spec.leaves_to_library else spec.launches:
                count = _count(pattern, launched)
                if count < calls:
                    name = pattern.replace(r"\b", "")
                    yield f"{spec.name} has {calls} calls a step, and the device ran {count} kernels named {name}"
        for pattern in self.foreign:
            yield from (f"the device ran {name[:80]}, of a part that is ours" for name in _found(pattern, launched))
        known = {pattern for spec in planned for pattern in spec.launches}
        others = {pattern for spec in _OURS for pattern in spec.launches} - known
        for name in {name for pattern in others for name in _found(pattern, launched)}:
            if not any(re.search(pattern, name) for pattern in known):
                yield f"the device ran {name[:80]}, a kernel of ours that is not planned"


def _count(pattern: str, launched: Mapping[str, int]) -> int:
    return sum(launched[name] for name in _found(pattern, launched))


def _found(pattern: str, launched: Mapping[str, int]) -> list[str]:
    return [name for name in launched if re.search(pattern, name)]
