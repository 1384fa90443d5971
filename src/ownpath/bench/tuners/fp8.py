"""Shapes of the FP8 products, by tokens, on V4-Flash's five matrices: W8A16 for few tokens, W8A8 for many.

A candidate of W8A16 names rows (``num_m64`` blocks of 64) and tokens (``num_n``) of a CTA, ``cluster_k`` CTAs that
split K, ``consumers`` warpgroups and ``per_sm`` CTAs that share an SM, and ``wgmma`` or ``mma``. One of W8A8 names
``warpgroups`` of ``num_m64`` 64-token blocks each, ``cluster_n`` CTAs that share activations, ``cluster_k`` that split
K, and stages.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ownpath.bench.check import fp8_reference, rel_l2
from ownpath.bench.measure import Settings
from ownpath.bench.operands import Fp8Operands, random_activations, random_fp8
from ownpath.bench.rotation import num_calls
from ownpath.bench.shapes import HALF_SHAPES, LINEAR_SHAPES, LinearShape
from ownpath.bench.timing import CudaGraph
from ownpath.bench.tune import Candidate, CandidateFailed
from ownpath.conformance.bounds import MAX_REL_L2
from ownpath.kernels.dsl.cache import CompileError
from ownpath.kernels.dsl.driver import CudaError
from ownpath.kernels.fp8.choose import CLUSTERS, TABLE, WGMMA_FROM, knobs_config, quantize_config, w8a16_shape
from ownpath.kernels.fp8.config import W8A8Config, W8A16Config, w8a8_stages
from ownpath.kernels.fp8.launch import quantize_launch, w8a8_launch, w8a16_launch, weight_key, workspace_bytes
from ownpath.kernels.fp8.layout import PackedFp8, pack_fp8
from ownpath.kernels.fp8.ref import quantize_rows

FEW = (8, 16, 32, 64, 128)
"""Token counts of W8A16: an entry holds down to the one before."""
MANY = (256, 512, 1024, 2048)
"""Token counts of W8A8."""
SMS = 132
FITTING = CLUSTERS | {6: 20}
"""Cluster size -> clusters that run at once with one CTA per SM. 15 of 8 and 30 of 4 on 132 SMs mean seven GPCs of 16
or 18 SMs and one of 8 or 10, which hold 20 of 6 (but only 15 of 7)."""

CandidateTile = tuple[int, int, int, bool]
"""num_m64, consumers, per_sm, wgmma."""

SMALL: tuple[CandidateTile, ...] = ((2, 2, 2, False), (2, 1, 3, False), (1, 1, 4, False), (2, 1, 2, False))
TILES: dict[int, tuple[CandidateTile, ...]] = {
    8: (*SMALL, (1, 1, 3, False), (4, 4, 1, False)),
    16: (*SMALL, (2, 2, 2, True), (4, 4, 1, False)),
    32: ((2, 2, 2, True), (2, 1, 2, True), (1, 1, 4, True), (2, 2, 2, False), (1, 1, 3, False), (4, 4, 1, True)),
    64: ((2, 2, 2, True), (2, 1, 2, True), (1, 1, 2, True), (1, 1, 3, True), (4, 2, 1, True), (4, 4, 1, True)),
    128: ((2, 2, 1, True), (1, 1, 2, True), (2, 1, 2, True), (4, 2, 1, True), (4, 4, 1, True)),
}
"""Tokens -> tiles to try, beside the rule's choice. Four CTAs per SM spill registers at 32 tokens with ``mma``."""
TILES_OF_MANY = ((2, 2), (3, 1), (2, 1))
"""Warpgroups and 64-token blocks of each to try for W8A8."""
SPLITS, SPLIT_UP_TO = (2, 4, 8), 512
"""CTAs that split K to try for W8A8, and the most tokens to try them for: more have tiles enough."""
UNEVEN = (6,)
"""Cluster sizes to try for the largest tiles only, where 4 leave half of the SMs idle and 8 do not fit."""


def few(shape: LinearShape, tokens: int) -> list[Candidate]:
    """Returns W8A16 candidates: the rule's choice, then tiles whose CTAs fill most of the device, up to twice."""
    blocks, k_blocks = shape.out_features // 64, shape.in_features // 128
    rule = w8a16_shape(tokens, (blocks, k_blocks, True, False), SMS, tokens >= WGMMA_FROM)
    found = [_tile((rule.num_m64, rule.consumers, rule.per_sm, rule.wgmma), tokens, rule.cluster_k)]
    for tile in TILES[tokens]:
        num_m64, _, per_sm, _ = tile
        for cluster_k in (1, 2, 4, 8, *(UNEVEN if num_m64 == 4 else ())):
            groups = -(-blocks // num_m64)
            # One CTA per SM leaves nothing to cover a second wave with; tiles of 128 tokens hardly fit twice.
            waves_fit = per_sm > 1 or tokens > 64 or groups <= FITTING[cluster_k]
            num_ctas_fits = 2 * SMS // 3 <= groups * cluster_k <= (2 * SMS if cluster_k > 1 else 5 * SMS)
            if waves_fit and num_ctas_fits and cluster_k <= k_blocks:
                found.append(_tile(tile, tokens, cluster_k))
    return [knobs for idx, knobs in enumerate(found) if knobs not in found[:idx]]


def _tile(tile: CandidateTile, num_n: int, cluster_k: int) -> Candidate:
    num_m64, consumers, per_sm, wgmma = tile
    named = {"num_m64": num_m64, "num_n": num_n, "cluster_k": cluster_k, "per_sm": per_sm, "consumers": consumers}
    return named | {"wgmma": wgmma}


def many(tokens: int) -> list[Candidate]:
    """Returns W8A8 candidates: every tile, for few tokens with and without K split, for more with and without pairs of
    CTAs, and with one stage fewer."""
    found: list[Candidate] = []
    for warpgroups, num_m64 in TILES_OF_MANY:
        stages = w8a8_stages(warpgroups, num_m64)
        kinds = [(1, 1, stages), (2, 1, stages), (1, 1, stages - 1)]
        if tokens <= SPLIT_UP_TO:
            kinds = [(1, cluster_k, w8a8_stages(warpgroups, num_m64, cluster_k)) for cluster_k in (1, *SPLITS)]
        for cluster_n, cluster_k, num_stages in kinds:
            named = {"warpgroups": warpgroups, "num_m64": num_m64, "cluster_n": cluster_n, "cluster_k": cluster_k}
            found.append(named | {"num_stages": num_stages})
    return found


class Fp8Family:
    """The family of ``--tune fp8``."""

    candidates: Mapping[str, Sequence[Candidate]]
    table: Path = TABLE

    def __init__(self, device: str) -> None:
        shapes = [*(shape for shape in LINEAR_SHAPES if shape.name != "tiny"), *HALF_SHAPES]
        self.candidates = {
            f"tokens={tokens},rows={shape.out_features},cols={shape.in_features}": (
                few(shape, tokens) if tokens in FEW else many(tokens)
            )
            for shape in shapes
            for tokens in (*FEW, *MANY)
        }
        self._shapes = {(shape.out_features, shape.in_features): shape for shape in shapes}
        self._settings = Settings.of(device)
        self._operands = lru_cache(maxsize=1)(self._make_operands)
        self._reference = lru_cache(maxsize=1)(self._make_reference)

    def run(self, case: str, config: Candidate) -> float:
        """Returns the median microseconds of a call, for W8A8 with its quantiser, after a comparison with float64."""
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        shape = self._shapes[rows, cols]
        _, packed = self._operands(shape)
        x = self._activations(tokens, cols)
        out = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16, device=x.device)
        num_bytes = workspace_bytes(tokens, packed[0].num_k_blocks)
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
        try:
            kernel = knobs_config(config, packed[0].num_k_blocks)
            calls = [partial(_call, kernel, x, out, workspace, weight) for weight in packed]
            calls[0]()
        except (CompileError, CudaError, ValueError) as failure:
            raise CandidateFailed(str(failure).splitlines()[0]) from failure
        error = rel_l2(out, self._reference(shape, tokens))
        if not error <= MAX_REL_L2:
            raise CandidateFailed(f"wrong: relative L2 {error:.1e}")
        return CudaGraph(0.05, warm_up_s=0.1).time(calls).us

    def _activations(self, tokens: int, cols: int) -> Tensor:
        return random_activations(tokens, cols, self._settings.generator(tokens))

    def _make_operands(self, shape: LinearShape) -> tuple[Fp8Operands, list[PackedFp8]]:
        """Makes one stored operand for the reference, and packed ones in rotation so that L2 is cold."""
        stored = [random_fp8(shape, self._settings.generator(idx)) for idx in range(num_calls(shape.num_params))]
        return stored[0], [pack_fp8([one.weight], [one.scale]) for one in stored]

    def _make_reference(self, shape: LinearShape, tokens: int) -> Tensor:
        x = self._activations(tokens, shape.in_features)
        if tokens in MANY:
            codes, scale = quantize_rows(x, power_of_two=True)
            x = (codes.double() * scale.double()[..., None]).flatten(1)
        return fp8_reference(x, self._operands(shape)[0])


def _call(kernel: W8A16Config | W8A8Config, x: Tensor, out: Tensor, workspace: Tensor, weight: PackedFp8) -> None:
    """Launches ``kernel`` as a runner does. workspace: for W8A8, one for all calls as in a model."""
    if isinstance(kernel, W8A16Config):
        w8a16_launch(kernel, x, weight, out)
    else:
        quantizer = quantize_config(kernel, len(x), weight_key(weight), SMS, weight.power_of_two)
        quantize_launch(quantizer, x, workspace, weight.num_k_blocks)
        w8a8_launch(kernel, workspace, weight, out)


def family(device: str) -> Fp8Family:
    """Returns the FP8 products' tuner. Errors: ValueError off CUDA."""
    if not device.startswith("cuda"):
        raise ValueError(f"--tune fp8 measures on a CUDA device, not on {device}")
    return Fp8Family(device)
