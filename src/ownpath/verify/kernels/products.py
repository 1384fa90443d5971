"""K01 and K04 of the dense products: each against float64, at numbers of rows where kernels change.

Legend: M rows, K in, N out; T tokens, N heads, H head dim, G groups, R rows of a group, F frequencies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ownpath.conformance.bounds import Deviation, Exact, deviation_of_repeats
from ownpath.conformance.exact import grouped_product, independent_error, join_columns, product, rotate_back
from ownpath.finding import Finding
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.verify.kernels.operands import InputReading, inputs_of, loss_at_load, weight_of
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.row_counts import placeholder, row_counts, variants_of
from ownpath.verify.kernels.tally import Tally

PERIOD = 1009
"""Number of rows drawn; a longer input repeats them. A prime, so that a tile never gets the same rows twice."""
POSITIONS = (0, 1, 5, 127, 4096)
REMEDY = "the weight arrived wrong or the kernel is: run the load stage, then a kernel that the plan can do without"


ONE_FORM = "no planned kernel here has more than one"


@dataclass(frozen=True)
class DenseSlot:
    """One slot's product with its inputs and exact results."""

    probe: Probe
    slot: str

    @property
    def ops(self) -> tuple[PlannedOp, ...]:
        return self.probe.ops[self.slot]

    @property
    def is_grouped(self) -> bool:
        return self.ops[0].spec.kind is OpKind.GROUPED

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The numbers of rows to call it with."""
        return row_counts(self.probe.is_cuda, sum(op.spec.shape[0] for op in self.ops))

    @cached_property
    def x(self) -> Tensor:
        """The inputs [M, K]; heads [T, N, H] where the slot is grouped."""
        num_rows = min(PERIOD, max(self.row_counts))
        config = self.probe.config
        if not self.is_grouped:
            return self.probe.draw.rows(self.slot, num_rows, self.ops[0].spec.shape[1])
        width = config.num_attention_heads * config.head_dim
        heads: Tensor = self.probe.draw.rows(self.slot, num_rows, width).unflatten(1, (-1, config.head_dim))
        return heads

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of each row of a grouped slot, float32 [T, F]."""
        assert self.probe.layer is not None
        positions = torch.tensor(POSITIONS, device=self.probe.device).repeat(-(-len(self.x) // len(POSITIONS)))
        cos, sin = self.probe.layer.rope.at(positions[: len(self.x)]).angles
        return cos, sin

    def call(self, num_rows: int) -> Tensor:
        """Calls the slot with so many rows: returns [M, N]."""
        ids = torch.arange(num_rows, device=self.probe.device) % len(self.x)
        run: Callable[..., Tensor] = self.probe.slots[self.slot]
        if not self.is_grouped:
            return run(self.x[ids])
        return run(self.x[ids], (self.angles[0][ids], self.angles[1][ids])).flatten(1)

    def placeholders(self, num_rows: int) -> tuple[object, ...]:
        """Makes arguments of so many rows without values."""
        x = placeholder(self.x.dtype, self.x.device, num_rows, *self.x.shape[1:])
        if not self.is_grouped:
            return (x,)
        return x, (self.angles[0][:1].expand(num_rows, -1), self.angles[1][:1].expand(num_rows, -1))

    def compare(self, num_rows: int) -> Deviation:
        """Compares the slot's result with the exact one."""
        from_rows = max(start for start in self.exact if start <= num_rows)
        return deviation_of_repeats(self.call(num_rows), self.exact[from_rows])

    @cached_property
    def exact(self) -> dict[int, Exact]:
        """The exact result for each way in which the kernels read their inputs, by the number of rows from which it
        applies."""
        parts = [tuple(_exact_parts(self, op)) for op in self.ops]
        starts = sorted({inputs.from_rows for part in parts for inputs, _ in part})
        return {start: join_columns([_latest(part, start) for part in parts]) for start in starts}

    def place(self, found: Deviation) -> tuple[str, str]:
        """Returns (where, message) of a wrong result: the module, if all wrong outputs are one module's, or one of the
        products that the slot joins."""
        modules = [(module.name, module.shape[0]) for op in self.ops for module in op.spec.modules]
        parts = [(part.slot, part.shape[0]) for op in self.ops for part in op.spec.parts]
        return _owner(modules, found) or _owner(parts, found) or (self.slot, str(found))


def _owner(sizes: list[tuple[str, int]], found: Deviation) -> tuple[str, str] | None:
    """Returns the one of those side by side, by name and number of outputs, that has all wrong outputs."""
    ends = accumulate((size for _, size in sizes), initial=0)
    hit = []
    for (name, size), (start, end) in zip(sizes, pairwise(ends), strict=True):
        rows = [column - start for column in found.columns if start <= column < end]
        if rows:
            hit.append((name, f"{len(rows)} of {size} outputs are wrong, the first is {rows[0]}: {found}"))
    return hit[0] if len(hit) == 1 else None


def _exact_parts(dense: DenseSlot, op: PlannedOp) -> Iterator[tuple[InputReading, Exact]]:
    """Yields one op's exact results, a pair for each way in which its kernel reads its inputs."""
    weight, probe = weight_of(op, dense.probe.stored), dense.probe
    lost = loss_at_load(op, weight, probe.dtype)
    if dense.is_grouped:
        yield InputReading(), grouped_product(*rotate_back(dense.x, dense.angles), probe.config.o_groups, weight, lost)
        return
    kinds = inputs_of(op, probe.stored)
    for inputs, after in zip(kinds, (*kinds[1:], None), strict=True):
        most = len(dense.x) if after is None else after.from_rows - 1
        x_MK = inputs.quantize(dense.x[:most])
        exact = product(x_MK, weight, inputs.slack)
        yield inputs, exact if lost is None else exact.plus(independent_error(x_MK, lost))


def _latest(parts: tuple[tuple[InputReading, Exact], ...], start: int) -> Exact:
    return [exact for inputs, exact in parts if inputs.from_rows <= start][-1]


def check_products(probe: Probe) -> Iterator[Finding]:
    """K01 and K04: checks every linear and grouped product."""
    each = Tally("K01", probe.name, "products against dequantise-then-matmul in float64", REMEDY)
    every = Tally("K04", probe.name, "each variant that a kernel's chooser can pick", REMEDY, ONE_FORM)
    for slot in probe.slots_of(OpKind.LINEAR, OpKind.GROUPED):
        dense = DenseSlot(probe, slot)
        with each.catch_errors(slot, probe.kernels[slot]):
            for num_rows in dense.row_counts:
                _add(each, dense, num_rows, probe.kernels[slot])
            for variant, num_rows in variants_of(probe.part.runners[slot], dense.placeholders):
                _add(every, dense, num_rows, f"{probe.kernels[slot]} {variant}")
    yield from each.findings()
    yield from every.findings()


def _add(tally: Tally, dense: DenseSlot, num_rows: int, kernel: str) -> None:
    found = dense.compare(num_rows)
    where, message = dense.place(found) if not found.is_allowed else (dense.slot, "")
    tally.add(where, kernel, found, message and f"{num_rows} rows: {message}")
