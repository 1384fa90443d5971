"""Arranges a verification as a map: a row for each layer, a column for each sub-block, each cell's error over budget.

A cell has the values that were measured in it and the failures of every stage that name a tensor or slot of it.
"""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from types import MappingProxyType

from ownpath.finding import Finding, failed
from ownpath.verify.fold import unfold_layers
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.run import Verification

Column = tuple[str, str]
"""A part of a layer and a sub-block in it."""
COLUMNS: MappingProxyType[Column, tuple[str, ...]] = MappingProxyType(
    {
        ("attention", "hc"): ("hc_attn", "attn_norm"),
        ("attention", "q"): ("attn.wq", "attn.q"),
        ("attention", "kv"): ("attn.wkv", "attn.kv", "attn.key_quantizer"),
        ("attention", "compr."): ("attn.compressor", "attn.x_products", "attn.entries"),
        ("attention", "index"): ("attn.indexer",),
        ("attention", "core"): ("attn",),
        ("attention", "out"): ("attn.wo",),
        ("ffn", "hc"): ("hc_ffn", "ffn_norm"),
        ("ffn", "router"): ("ffn.gate", "ffn.router"),
        ("ffn", "experts"): ("ffn",),
        ("ffn", "shared"): ("ffn.shared_experts",),
        ("layer", "out"): ("",),
    }
)
"""Column -> how its slots and tensors begin, within a layer; the longest beginning decides."""
ENDS = MappingProxyType({"embed": "embed", "head": "head", "hc_head": "head", "norm": "head", "logits": "head"})
"""Slot or tensor of no layer -> its row, which is one cell wide."""
LEVELS = (0.1, 0.25, 0.5, 1.0, 3.0, 10.0)
"""Upper ends of the colours, in budgets; the last colour is what lies beyond."""
_LAYER = re.compile(r"((?:layers|mtp)\.[0-9]{1,3})(?:\.(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One sub-block of one layer. values: what was measured, by name; failures: of any stage."""

    values: list[Measurement] = field(default_factory=list)
    failures: list[Finding] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        """The largest error over its budget; infinite for what is not finite, ``None`` where nothing was measured."""
        errors = (math.inf if math.isnan(m.excess) else m.excess for m in self.values)
        return max(errors, default=None)

    @property
    def is_bad(self) -> bool:
        return bool(self.failures) or any(not m.is_within for m in self.values)

    @property
    def is_of_runs(self) -> bool:
        """True where a value was measured in several steps."""
        return any(measured.run for measured in self.values)

    @property
    def level(self) -> int:
        """The colour, from 0; a failure is never coloured as if it were within its budget."""
        least = LEVELS.index(3.0) + 1 if self.is_bad and (self.worst or 0) <= 1 else 0
        return max(least, bisect_left(LEVELS, self.worst or 0.0))

    @property
    def text(self) -> str:
        """The error in at most five characters, or the check that failed where no error lies beyond its budget."""
        if self.worst is None or (self.failures and self.worst <= 1):
            return self.failures[0].id
        return short_number(self.worst)


HeatRows = dict[str, dict[Column, Cell]]
"""Row (``layers.3``, ``embed``) -> column -> cell. The ends' cells are in the last column."""


def heat_map(result: Verification) -> HeatRows:
    """Returns the rows in the order of the forward: embedding, layers, drafts, head."""
    rows: HeatRows = {}
    for measured in result.measurements:
        cell = _cell_at(rows, measured_name(measured))
        if cell is not None:
            cell.values.append(measured)
    for finding in failed(result.findings):
        for where in unfold_layers(finding.where):
            cell = _cell_at(rows, where)
            if cell is not None:
                cell.failures.append(finding)
    return dict(sorted(rows.items(), key=lambda row: _depth(row[0])))


def measured_name(measured: Measurement) -> str:
    """Returns a measured value's name, with its layer."""
    if measured.module:
        return f"{measured.module}.{measured.slot}"
    return measured.slot if measured.slot in ENDS else f"layers.{measured.layer_idx}.{measured.slot}"


def shown_name(measured: Measurement) -> str:
    """Returns a measured value's name, with the step that it is of."""
    return f"{measured_name(measured)}, {measured.run}" if measured.run else measured_name(measured)


def short_number(number: float) -> str:
    """Formats an error over its budget: 0.43, 3.2, 120, 5e4."""
    if not math.isfinite(number):
        return "inf"
    if number < 9.95:
        return f"{number:.2f}" if number < 1 else f"{math.ceil(number * 10) / 10:.1f}"
    return f"{number:.0f}" if number < 999.5 else f"{number:.0e}".replace("e+0", "e").replace("e+", "e")


def _cell_at(rows: HeatRows, name: str) -> Cell | None:
    """Returns the cell that a slot or tensor belongs to; ``None`` for what is of no layer."""
    match = _LAYER.fullmatch(name)
    row = match[1] if match else ENDS.get(name.partition(".")[0], "")
    if not row:
        return None
    column = _column_of(match[2] or "") if match else list(COLUMNS)[-1]
    return rows.setdefault(row, {}).setdefault(column, Cell())


def _column_of(name: str) -> Column:
    starts = ((start, column) for column, starts in COLUMNS.items() for start in starts if name.startswith(start))
    return max(starts, key=lambda found: len(found[0]))[1]


def _depth(row: str) -> tuple[int, int]:
    stack, _, number = row.partition(".")
    return ("embed", "layers", "mtp", "head").index(stack), int(number or 0)
