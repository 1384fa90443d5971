"""K08: checks the hyper-connections' boundaries: Sinkhorn's sums, the streams' sums, inputs, and stored streams.

Legend: T tokens, S streams, D hidden, M mixing weights.
"""

from collections.abc import Iterator

from torch import Tensor

from ownpath.conformance.bounds import Deviation, Exact, deviation
from ownpath.conformance.exact import ExactBoundary, written_streams
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
    """Yields (part, deviation) for each part of one boundary's results."""
    sizes = ArgumentSizes(probe.config.hidden_size, num_streams=probe.config.hc_mult)
    x_TSD, y_TD, mix = probe.draw.streams(slot, num_rows, sizes)
    out = probe.slots[slot](x_TSD, y_TD, mix)
    yield "streams", deviation(out.x_TSD, written_streams(x_TSD, y_TD, mix.post_TS, mix.comb_TSS))
    if not bool(out.x_TSD.isfinite().all()):
        return
    # The reference reads the boundary's own written streams, so that one error is not counted twice.
    scope = OracleRun.of(probe.stored, probe.part.plan, Arithmetic(narrow=probe.dtype))
    exact = ExactBoundary(out.x_TSD.double(), scope.mixing(slot))
    if out.mix is not None:
        post_TS, comb_TSS = out.mix.post_TS, out.mix.comb_TSS
        yield f"post in {post_TS.dtype}", _wide(post_TS, exact.post())
        yield f"comb in {comb_TSS.dtype}", _wide(comb_TSS, exact.comb())
        yield "comb's sums over the streams read", deviation(comb_TSS.double().sum(1), exact.comb_sums())
    yield "normed input", deviation(out.h_TD, exact.normed(probe.stored.param(_norm_key(slot)), probe.dtype))


def _norm_key(slot: str) -> str:
    name = slot.removesuffix("hc_head") + "norm" if slot.endswith("hc_head") else slot.replace(".hc_", ".") + "_norm"
    return f"{name}.weight"


def _wide(found: Tensor, exact: Exact) -> Deviation:
    """Compares weights that mix streams, which stay at least float32."""
    if found.dtype.itemsize < 4:
        return Deviation(float("inf"), (), 0.0, 0.0)
    return deviation(found, exact)
