"""The kernels stage: runs every planned kernel of a layer alone, on its real weights, through serving's own runners.

A layer is loaded as the whole model would load it, checked, and freed before the next. Results are compared with
float64 (``conformance/exact.py``) within what the kernel's arithmetic allows (``conformance/bounds.py``).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ownpath.finding import Finding, Verdict
from ownpath.oracle.weights import StoredWeights
from ownpath.verify.kernels.attention import check_attention
from ownpath.verify.kernels.boundary import check_boundaries
from ownpath.verify.kernels.chunks import check_chunks
from ownpath.verify.kernels.clamp import check_clamp
from ownpath.verify.kernels.decode import check_decode
from ownpath.verify.kernels.experts import check_experts
from ownpath.verify.kernels.memory import check_contracts, check_memory
from ownpath.verify.kernels.norms import check_norms
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.products import check_products
from ownpath.verify.kernels.quantizers import check_quantizers
from ownpath.verify.kernels.rotation import check_rotation
from ownpath.verify.kernels.router import check_router
from ownpath.verify.kernels.tally import error_of
from ownpath.verify.layer import load_ends, load_layer, parts_of
from ownpath.verify.progress import StageProgress
from ownpath.verify.resume import FinishedParts
from ownpath.verify.subject import Subject

LayerCheck = Callable[[Probe], Iterator[Finding]]

CHECKS: tuple[tuple[str, LayerCheck], ...] = (
    ("K01", check_products),
    ("K01", check_experts),
    ("K01", check_norms),
    ("K02", check_memory),
    ("K03", check_quantizers),
    ("K05", check_router),
    ("K06", check_clamp),
    ("K07", check_rotation),
    ("K08", check_boundaries),
    ("K09", check_attention),
    ("K10", check_contracts),
    ("K11", check_decode),
    ("K12", check_chunks),
)
"""K04 comes with K01, and K06 of routed experts too."""
LOAD_REMEDY = "the file and load stages say more of this layer"


def kernel_stage(
    subject: Subject, progress: StageProgress | None = None, work: Path | None = None
) -> Iterator[Finding]:
    """Runs K01 to K12 on each chosen layer, and on the slots outside all layers if every layer is chosen.

    work: a folder where findings are saved layer by layer, so that an interrupted run continues from there.
    """
    stored, finished = StoredWeights(subject.index, subject.device), FinishedParts.of(work, "kernels", subject)
    parts = parts_of(subject)
    for done, (name, layer_idx) in enumerate(parts.items()):
        if progress is not None:
            progress(done, len(parts), name)
        yield from finished.part(name, partial(_part, subject, stored, layer_idx, name))


def _part(subject: Subject, stored: StoredWeights, layer_idx: int | None, name: str) -> Iterator[Finding]:
    """Loads one layer and runs its checks."""
    try:
        with torch.inference_mode():
            probe = _load(subject, stored, layer_idx, name)
    except Exception as error:  # whatever a checkpoint can get wrong becomes a finding
        yield Finding("K01", name, Verdict.FAIL, f"cannot be loaded: {error_of(error)}", remedy=LOAD_REMEDY)
        return
    for check_id, check in CHECKS:
        yield from _run_check(check_id, check, probe)


def _load(subject: Subject, stored: StoredWeights, layer_idx: int | None, name: str) -> Probe:
    if layer_idx is None:
        return Probe(subject, load_ends(subject), stored, name)
    layer = load_layer(subject, layer_idx)
    return Probe(subject, layer, stored, name, layer)


def _run_check(check_id: str, check: LayerCheck, probe: Probe) -> list[Finding]:
    """Collects one check's findings in inference mode, which must not leak to the caller."""
    found: list[Finding] = []
    with torch.inference_mode():
        try:
            found.extend(check(probe))
        except Exception as error:  # whatever a kernel can raise becomes a finding
            found.append(Finding(check_id, probe.name, Verdict.FAIL, error_of(error)))
    return found
