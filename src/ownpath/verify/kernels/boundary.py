"""K08: checks the hyper-connections' boundaries: Sinkhorn's sums, the streams' sums, inputs, and stored streams."""

from collections.abc import Iterator

from ownpath.conformance.bounds import Deviation
from ownpath.conformance.exact import BoundaryGiven, boundary_deviations
from ownpath.conformance.params import ArgumentSizes
from ownpath.finding import Finding
from ownpath.ops import OpKind
from ownpath.oracle.arithmetic import Arithmetic, OracleRun
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

ROWS, MANY_ROWS = (1, 2, 16, 17, 33), (1, 2, 16, 17, 33, 256, 257, 1024)
REMEDY = "comb[from, to]: rows are the streams that are read, columns those that are written; sums in float32"


def check_boundaries(probe: Probe) -> Iterator[Finding]:
    """K08: checks every boundary."""
    for slot in probe.slots_of(OpKind.HYPER):
        tally = Tally("K08", slot, "streams, mixing weights and normed input in float64", REMEDY)
        kernel = probe.kernels[slot]
        for num_rows in MANY_ROWS if probe.is_cuda else ROWS:
            with tally.catch_errors(slot, kernel, f"{num_rows} tokens: "):
                for what, found in _compare(probe, slot, num_rows):
                    tally.add(slot, kernel, found, f"{num_rows} tokens, {what}: {found}")
        yield from tally.findings()


def _compare(probe: Probe, slot: str, num_rows: int) -> Iterator[tuple[str, Deviation]]:
    """Runs one boundary and compares each part of its results. Experts give it an output in two parts."""
    sizes = ArgumentSizes(probe.config.hidden_size, num_streams=probe.config.hc_mult)
    given: BoundaryGiven = probe.draw.streams(slot, num_rows, sizes)
    if not slot.endswith(".hc_ffn"):
        given = *given, probe.draw.rows(f"{slot} other", num_rows, sizes.width)
    mixing = OracleRun.of(probe.stored, probe.part.plan, Arithmetic(narrow=probe.dtype)).mixing(slot)
    return boundary_deviations(probe.slots[slot](*given), given, mixing, probe.stored.param(_norm_key(slot)))


def _norm_key(slot: str) -> str:
    name = slot.removesuffix("hc_head") + "norm" if slot.endswith("hc_head") else slot.replace(".hc_", ".") + "_norm"
    return f"{name}.weight"
