"""F13: compares experts of this export with another export's of the same model, decoded in float64.

Neither is the truth: both are roundings of weights that nobody has here. An element is at most half a step of its
format away from the value that was rounded, so that two exports' elements are at most both half steps apart, and whole
matrices at most as far apart as the norm of those. Wrong scales, orders and signs are far beyond that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ownpath.checkpoint.drafts import carried_draft
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import Encoding
from ownpath.config import ModelConfig
from ownpath.finding import Finding, Verdict
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.census import StoredModule, take_census
from ownpath.verify.file_tensors import FileTensors
from ownpath.verify.progress import StageProgress
from ownpath.verify.readback import block_scales, multiplier
from ownpath.verify.subject import Selection, sample_experts

SAMPLED_EXPERTS = 4
"""Of each chosen layer, unless --experts says how many."""
_REMEDY = "compare both exports with a third: one of them lost, moved or scaled this expert"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_STEPS = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0)
"""E2M1's widest step beside each of its values but 6."""
_TOP_STEP = {NVFP4.name: 2.0, MXFP4.name: 4.0}
"""At 6, twice as far as a block's largest value may exceed it: NVFP4 rounds a block's scale to three bits of mantissa
(6.4 at most), MXFP4 rounds it down to a power of two (8)."""


@dataclass(frozen=True)
class ExpertSource:
    """A checkpoint's experts, by the names of their modules."""

    index: CheckpointIndex
    config: ModelConfig
    modules: dict[str, StoredModule]
    device: torch.device

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> "ExpertSource":
        """Opens a checkpoint. Errors: ConfigError, CheckpointError."""
        index, config = CheckpointIndex.open(folder), ModelConfig.from_file(folder / "config.json")
        census = take_census(config, index, carried_draft(index))
        return cls(index, config, {stored.spec.name: stored for stored in census.modules}, device)

    def decode(self, name: str) -> tuple[Tensor, Tensor]:
        """Decodes a matrix, and bounds the distance of each element from the value it was rounded from: float64 [N, K]
        both."""
        encoding = self.modules[name].encoding
        matrix = StoredWeights(self.index, self.device).matrix(name, encoding)
        return matrix, self._half_steps(name, matrix, encoding)

    def _half_steps(self, name: str, matrix: Tensor, encoding: Encoding) -> Tensor:
        fmt, size = encoding.format, matrix.abs()
        if fmt in (BF16, FP32):
            return size * (2.0**-9 if fmt is BF16 else 2.0**-25)
        scales = self._scales(name, matrix.shape, encoding)
        if fmt in (FP8_BLOCK, MXFP8):  # three bits of mantissa, and steps of 2^-9 below 2^-6
            return torch.maximum(size * 2.0**-4, scales * 2.0**-10)
        assert fmt in (NVFP4, MXFP4), fmt
        units = torch.where(scales > 0, size / scales, 0.0)
        values = torch.tensor(_VALUES, dtype=torch.float64, device=matrix.device)
        steps = torch.tensor((*_STEPS, _TOP_STEP[fmt.name]), dtype=torch.float64, device=matrix.device)
        # Float32's reciprocals move a quotient off its code's value: a slightly smaller one finds the code.
        return steps[torch.bucketize(units * (1 - 2.0**-20), values)] / 2 * scales

    def _scales(self, name: str, shape: torch.Size, encoding: Encoding) -> Tensor:
        """Returns every element's scale, times the global scale."""
        with FileTensors(self.index, self.device) as raw:
            grid = block_scales(raw(encoding.key(name, "scale")), encoding)
            if encoding.format is NVFP4:
                grid = grid * multiplier(encoding, name, "global_scale", raw)
        assert encoding.format.block is not None, encoding
        rows, cols = (
            torch.arange(n, device=grid.device) // b for n, b in zip(shape, encoding.format.block, strict=True)
        )
        return grid[rows][:, cols]


def source_findings(
    ours: ExpertSource, theirs: ExpertSource, selection: Selection, progress: StageProgress
) -> Iterator[Finding]:
    """Runs F13 on a sample of the chosen layers' experts."""
    own = ours.config
    layer_ids = [idx for idx in range(own.num_hidden_layers) if idx in (selection.layer_ids or range(10**6))]
    sample = replace(selection, num_experts=min(selection.num_experts or SAMPLED_EXPERTS, own.n_routed_experts))
    for done, layer_idx in enumerate(layer_ids):
        progress(done, len(layer_ids), f"source, layer {layer_idx}")
        experts = sample_experts(sample, layer_idx, own.n_routed_experts)
        names = [
            f"layers.{layer_idx}.ffn.experts.{e}.{projection}" for e in experts for projection in ("w1", "w3", "w2")
        ]
        worst, failures = 0.0, 0
        for name in names:
            finding = _compare(ours, theirs, name)
            if finding.verdict is Verdict.FAIL:
                failures += 1
                yield finding
            worst = max(worst, finding.number or 0.0)
        if not failures:
            message = f"{len(names)} matrices of experts {', '.join(map(str, experts))} (seed {selection.seed})"
            yield Finding("F13", f"layers.{layer_idx}", Verdict.PASS, message, worst, "both formats' half steps")


def _compare(ours: ExpertSource, theirs: ExpertSource, name: str) -> Finding:
    """Compares one matrix, PASS or FAIL; number: the relative L2 distance."""
    for export in (ours, theirs):
        if name not in export.modules:
            message = f"{export.index.folder} does not hold it whole"
            return Finding("F13", name, Verdict.FAIL, message, remedy=_REMEDY)
    (a, step_a), (b, step_b) = ours.decode(name), theirs.decode(name)
    if a.shape != b.shape:
        message = f"it is {list(a.shape)} here and {list(b.shape)} there"
        return Finding("F13", name, Verdict.FAIL, message, remedy=_REMEDY)
    norm = b.norm().clamp(min=torch.finfo(torch.float64).tiny)
    distance, limit = float((a - b).norm() / norm), float((step_a + step_b).norm() / norm)
    cosine = float((a * b).sum() / (a.norm() * norm).clamp(min=torch.finfo(torch.float64).tiny))
    message = f"relative L2 {distance:.3g}, cosine {cosine:.5f}"
    verdict = Verdict.PASS if distance <= limit else Verdict.FAIL
    return Finding("F13", name, verdict, message, distance, f"<= {limit:.3g}, both formats' half steps", _REMEDY)
