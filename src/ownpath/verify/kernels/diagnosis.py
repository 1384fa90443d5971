"""Diagnoses a wrong expert from its output: which of a few known faults would give just this output.

Legend: S rows, D hidden, F expert width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ownpath.conformance.exact import ExpertMatrices
from ownpath.oracle.formulas import swiglu
from ownpath.plan.ops import PlannedOp
from ownpath.verify.kernels.operands import matrices_of, steps_of
from ownpath.verify.kernels.probe import Probe

NEAR = 2.0**-5
"""Relative distance within which a fault explains an output: twice what W4A4 may lose, far below any other fault."""
FACTORS = 16
"""Factors of 2^-16 to 2^16 are tried, four an octave, then refined."""
MAX_EXPERTS_TRIED = 512


def explain(probe: Probe, op: PlannedOp, name: str, x: Tensor, y_SD: Tensor) -> str:
    """Describes the fault that explains the named expert's output y for x."""
    y_SD = y_SD.double()
    if not bool(y_SD.isfinite().all()):
        return f"{int((~y_SD.isfinite()).any(-1).sum())} of {len(y_SD)} rows are not finite"
    if not bool(y_SD.any()):
        return "it gives zeros: the expert is empty"
    steps = steps_of(op, probe.stored, name, probe.config.swiglu_limit, probe.dtype)
    rows = steps.inputs(x)
    matrices = matrices_of(op, probe.stored, name)
    best = min(_explanations(rows, matrices, y_SD, steps.limit), key=lambda found: found[0])
    if best[0] < NEAR:
        return best[1]
    return _other_expert(probe, op, name, rows, y_SD) or "no single fault explains it"


def _explanations(rows: Tensor, matrices: ExpertMatrices, y_SD: Tensor, limit: float) -> Iterator[tuple[float, str]]:
    """Yields (relative distance, fault) for each known fault."""
    gate, up, down = rows @ matrices.w1.T, rows @ matrices.w3.T, matrices.w2.T
    yield _distance(swiglu(up, gate, limit) @ down, y_SD), "w1 and w3 (gate and up) are swapped"
    unclamped = swiglu(gate, up, float("inf")) @ down
    yield _distance(unclamped, y_SD), "the clamp is missing"
    plain = swiglu(gate, up, limit) @ down
    yield _best_factor(lambda c: c * plain, y_SD, "w2 is scaled")
    yield _best_factor(lambda c: swiglu(c * gate, up, limit) @ down, y_SD, "w1 is scaled")
    yield _best_factor(lambda c: swiglu(gate, c * up, limit) @ down, y_SD, "w3 is scaled")


def _best_factor(make: Callable[[float], Tensor], y_SD: Tensor, what: str) -> tuple[float, str]:
    """Finds the factor that comes nearest."""
    exponents = [step / 4 for step in range(-4 * FACTORS, 4 * FACTORS + 1)]
    step = 0.25
    best = min(exponents, key=lambda e: _distance(make(2.0**e), y_SD))
    while step > 1e-4:
        step /= 2
        best = min((best - step, best, best + step), key=lambda e: _distance(make(2.0**e), y_SD))
    return _distance(make(2.0**best), y_SD), f"{what} by {2.0**best:.4g}"


def _other_expert(probe: Probe, op: PlannedOp, name: str, rows: Tensor, y_SD: Tensor) -> str:
    """Tests whether it is another expert's output."""
    stack, _, own = name.rpartition(".")
    for other in range(min(probe.config.n_routed_experts, MAX_EXPERTS_TRIED)):
        if other == int(own):
            continue
        matrices = matrices_of(op, probe.stored, f"{stack}.{other}")
        made = swiglu(rows @ matrices.w1.T, rows @ matrices.w3.T, probe.config.swiglu_limit) @ matrices.w2.T
        if _distance(made, y_SD) < NEAR:
            return f"it gives what expert {other} should"
    return ""


def _distance(made_SD: Tensor, y_SD: Tensor) -> float:
    """Returns the relative distance, averaged over rows so that large rows do not dominate."""
    per_row = (made_SD - y_SD).norm(dim=-1) / y_SD.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return float(per_row.nan_to_num(torch.inf).mean())
