"""Finds MXFP4 matrices that a planned kernel cannot read as NVFP4: their block scales span too many powers of two.

Only the scales of blocks that hold something count, as at loading. Gate and up of one expert share a global scale, so
that they count together.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding
from ownpath.inspect.tensor_bytes import read_values
from ownpath.numerics.mxfp4 import E4M3_MAX_POWER, E4M3_MIN_POWER
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import Plan

POWERS = E4M3_MAX_POWER - E4M3_MIN_POWER + 1
"""Powers of two that the block scales of one matrix can have as NVFP4."""
_BLOCK_BYTES = 16
"""Bytes of the codes of one block of 32."""
_NAN = 255


def wide_scales(
    plan: Plan,
    exponents: Mapping[str, tuple[int, int]],
    index: CheckpointIndex,
    broken: frozenset[Path],
    max_bytes: Callable[[str], int | None],
) -> Iterator[Finding]:
    """Yields the matrices whose scales, of those that were read, span more than ``POWERS`` powers of two.

    exponents: module -> the smallest and the largest byte of the scales that were read. max_bytes: of a module's
    scales; ``None``: all.
    """
    for op in plan.ops:
        if not op.choice.kernel.converts_scales:
            continue
        for names in _sharing(op):
            found = [exponents[name] for name in names if name in exponents]
            if found and max(high for _, high in found) - min(low for low, _ in found) >= POWERS:
                yield from _judged(op, names, index, broken, max_bytes)


def _sharing(op: PlannedOp) -> Iterator[tuple[str, ...]]:
    """Yields the modules that share one global scale once they are NVFP4."""
    names = [module.name for module in op.spec.modules]
    if op.spec.kind is not OpKind.MOE:
        yield from ((name,) for name in names)
        return
    num_experts = len(names) // 3
    for expert in range(num_experts):
        yield names[expert], names[num_experts + expert]
        yield (names[2 * num_experts + expert],)


def _judged(
    op: PlannedOp,
    names: tuple[str, ...],
    index: CheckpointIndex,
    broken: frozenset[Path],
    max_bytes: Callable[[str], int | None],
) -> Iterator[Finding]:
    """Looks at the codes too: the scale of a block of zeros does not count."""
    lowest, highest = (_NAN, "", 0), 0
    for name in names:
        keys = (op.encoding.key(name, "scale"), op.encoding.key(name, "qdata"))
        limit = max_bytes(name)
        limits = (limit, None if limit is None else limit * _BLOCK_BYTES)
        parts = [
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for key, most in zip(keys, limits, strict=True)
            for _, data in read_values([index[key]], broken, [], most)
        ]
        if len(parts) < len(keys):
            return
        scale, codes = parts[0].int(), parts[1].view(-1, _BLOCK_BYTES)
        counts = ((codes & 0x77) != 0).any(dim=1) & (scale != _NAN)
        if not counts.any():
            continue
        low, at = scale.where(counts, _NAN).min(dim=0)
        lowest = min(lowest, (int(low), name, int(at)))
        highest = max(highest, int(scale.where(counts, 0).amax()))
    exponent, name, block = lowest
    if name and highest - exponent >= POWERS:
        columns = index[op.encoding.key(name, "scale")].shape[1]
        powers = f"has the scale 2^{exponent - 127}, the largest is 2^{highest - 127}"
        where = f"block {list(divmod(block, columns))} {powers}"
        ends = f"as NVFP4 one matrix has {POWERS} powers of two, and loading ends without `--reference {op.spec.slot}`"
        message = f"module {name!r}: {where}; {ends}"
        yield make_problem("wide-scales", name, message)
