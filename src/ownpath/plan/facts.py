"""Facts on which all ranks of a plan must agree before they load, as short texts. Pure."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.plan.plan import Plan
from ownpath.versions import versions


def rank_facts(plan: Plan, index: CheckpointIndex) -> Mapping[str, str]:
    """Returns texts that are the same on all ranks of a model: versions, device, what is divided, numerics, the sizes,
    the checkpoint's headers, and every choice of the plan."""
    demands, parallel = plan.demands, replace(plan.parallel, rank=0)
    settings = f"{demands.activations} {sorted(demands.official)} {sorted(demands.reference)} {demands.cache_format}"
    choices = (f"{one.spec.slot} {one.choice.kernel.name}" for one in plan.decided)
    tensors = (f"{name} {info.dtype} {info.shape} {info.start}" for name, info in sorted(index.tensors.items()))
    return {
        "versions": " ".join(f"{name} {version}" for name, version in versions().items()),
        "device": plan.caps.name,
        "division": f"{parallel.size} ranks, attention by {parallel.attention}, experts by {parallel.experts}",
        "numerics": f"{settings} {demands.is_batch_invariant}",
        "config.json": _digest([repr(plan.config)]),
        "checkpoint": _digest(tensors),
        "plan": _digest(choices),
    }


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]
