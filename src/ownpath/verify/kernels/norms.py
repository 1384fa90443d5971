"""K01: compares the norms with float64: of low-rank queries, of keys, and of query heads.

Legend: T tokens, N heads, D width.
"""

from collections.abc import Iterator

from torch import Tensor

from ownpath.conformance.bounds import Exact, deviation
from ownpath.conformance.exact import norm
from ownpath.finding import Finding
from ownpath.official import Step
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedCompanion
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

ROWS, MANY_ROWS = (1, 2, 17, 33), (1, 2, 17, 33, 256, 257, 1024)
REMEDY = "the norm's weight, rms_norm_eps, or the kernel: the mean is over the last dimension, in float32"


def check_norms(probe: Probe) -> Iterator[Finding]:
    """K01: checks every norm that is a slot."""
    tally = Tally("K01", f"{probe.name} norms", "norms in float64", REMEDY)
    for planned in probe.part.plan.companions:
        if planned.spec.kind is not OpKind.NORM or planned.spec.slot not in probe.slots:
            continue
        slot, kernel = planned.spec.slot, probe.kernels[planned.spec.slot]
        for num_rows in MANY_ROWS if probe.is_cuda else ROWS:
            with tally.catch_errors(slot, kernel, f"{num_rows} tokens: "):
                x = _input(probe, planned, num_rows)
                tally.add(slot, kernel, deviation(probe.slots[slot](x), _exact(probe, planned, x)))
    if tally.count:
        yield from tally.findings()


def _input(probe: Probe, planned: PlannedCompanion, num_rows: int) -> Tensor:
    """Draws [T, D], or heads [T, N, D]; the last row is zeros."""
    slot, (width,) = planned.spec.slot, planned.spec.dims
    num_heads = probe.config.num_attention_heads if Step.Q_HEAD_NORM in planned.spec.steps else 1
    x = probe.draw.rows(slot, num_rows * num_heads, width)
    x[-1] = 0
    return x if num_heads == 1 else x.view(num_rows, num_heads, width)


def _exact(probe: Probe, planned: PlannedCompanion, x: Tensor) -> Exact:
    eps = probe.config.rms_norm_eps
    if Step.Q_HEAD_NORM in planned.spec.steps:
        return norm(x, eps, is_stepwise=Step.Q_HEAD_NORM in planned.choice.kernel.official)
    return norm(x, eps, probe.stored.param(f"{planned.spec.slot}.weight"))
