"""Tiles of dense NVFP4 products, by tokens, on V4-Flash's five matrices.

A candidate names the fields of a kernel's configuration that differ from its defaults, ``size`` for the tokens of a
tile and ``stages`` of shared memory at most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from ownpath.bench.check import nvfp4_reference, rel_l2
from ownpath.bench.measure import Settings
from ownpath.bench.operands import Nvfp4Operands, random_activations, random_nvfp4
from ownpath.bench.rotation import num_calls
from ownpath.bench.shapes import HALF_SHAPES, LINEAR_SHAPES, LinearShape
from ownpath.bench.timing import CudaGraph
from ownpath.bench.tune import Candidate, CandidateFailed
from ownpath.conformance.bounds import MAX_REL_L2
from ownpath.formats import NVFP4
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.dsl.cache import CompileError
from ownpath.kernels.dsl.driver import CudaError
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.choose import TUNED, LinearChoice, linear_choice, linear_config
from ownpath.kernels.nvfp4.config import BLOCK_K
from ownpath.kernels.nvfp4.linear import LinearOperand, Nvfp4LinearKernel
from ownpath.qtensor import QuantTensor

TOKENS = (8, 16, 64, 256, 2048)
"""Token counts up to which an entry holds, and with which it is measured; longer prompts use the last."""


def _config(num_m64: int, warpgroups_m: int, warpgroups_k: int, size: int, stages: int, **more: int) -> dict[str, int]:
    named = {"num_m64": num_m64, "warpgroups_m": warpgroups_m, "warpgroups_k": warpgroups_k}
    return named | {"size": size, "stages": stages} | more


def _few(size: int) -> tuple[dict[str, int], ...]:
    split = [
        _config(1, 1, warpgroups, size, stages, cluster_k=cluster, group=group, depth=2, per_sm=per_sm)
        for warpgroups, stages, per_sm, group in ((2, 6, 1, 2), (2, 4, 2, 2), (2, 3, 2, 4), (4, 6, 1, 2))
        for cluster in (1, 2, 4)
    ]
    whole = [_config(r, m, 1, size, 8, group=2, depth=2) for r, m in ((1, 4), (2, 4), (2, 2), (1, 2))]
    shared = [_config(r, m, 1, size, 6, group=2, depth=2, per_sm=2) for r, m in ((1, 2), (1, 1))]
    return (*split, _config(1, 1, 2, size, 6, cluster_k=8), *whole, *shared)


WIDE = (
    *(_config(1, 1, 2, 64, 4, cluster_k=cluster, group=4, depth=2) for cluster in (1, 2, 4)),
    *(_config(1, 1, 2, 64, 4, cluster_k=cluster, group=1, depth=2) for cluster in (1, 2, 4)),
    *(_config(1, 1, 2, 64, 2, cluster_k=cluster, group=1, depth=2, per_sm=2) for cluster in (1, 2, 4)),
    *(_config(2, 1, 2, 64, 3, cluster_k=cluster, depth=2) for cluster in (2, 4)),
    *(_config(1, 1, 2, 32, 6, cluster_k=cluster, group=4, depth=2) for cluster in (1, 2)),
    *(_config(1, 1, 4, 32, 4, cluster_k=cluster, group=4, depth=2) for cluster in (1, 2)),
    _config(1, 2, 1, 64, 8),
    _config(1, 2, 1, 64, 4, group=2, depth=2, per_sm=2),
    _config(2, 2, 1, 64, 6, depth=2),
)
MIDDLE = (
    _config(1, 2, 1, 64, 6),
    _config(1, 2, 1, 64, 8, cluster_m=2, group=2, depth=2, box=32),
    _config(1, 2, 1, 128, 8, stage_k=64, group=2, depth=2),
    _config(2, 2, 1, 128, 4, depth=2),
    _config(1, 1, 2, 64, 4, group=4, depth=2),
    _config(1, 1, 2, 64, 4, cluster_k=2, group=4, depth=2),
    _config(1, 1, 2, 128, 2, cluster_k=2, depth=2),
    _config(1, 1, 2, 128, 2, depth=2),
)
LONG = (
    _config(1, 2, 1, 256, 6, stage_k=64, group=2, depth=2),
    _config(1, 2, 1, 256, 6, stage_k=64, depth=3),
    _config(1, 2, 1, 256, 3, group=2, depth=2),
    _config(1, 2, 1, 256, 6, stage_k=64, group=2, depth=2, cluster_m=2),
    _config(1, 2, 1, 192, 6, stage_k=64, group=2, depth=2),
    _config(2, 2, 1, 128, 4, depth=2),
    _config(2, 2, 1, 96, 4, depth=2, box=48),
    _config(1, 4, 1, 128, 4, depth=2),
    _config(2, 1, 1, 128, 5, stage_k=64, depth=2, per_sm=2),
    _config(2, 1, 1, 128, 5, stage_k=64, depth=2, per_sm=2, cluster_m=2),
    _config(1, 1, 1, 192, 4, stage_k=64, group=2, depth=2, per_sm=2),
)
LISTS = {8: _few(8), 16: _few(16), 64: WIDE, 256: MIDDLE, 2048: LONG}


class LinearFamily:
    """The family of ``--tune linear``."""

    candidates: Mapping[str, Sequence[Candidate]]
    table: Path = TUNED / "linear.json"

    def __init__(self, device: str) -> None:
        shapes = [*(shape for shape in LINEAR_SHAPES if shape.name != "tiny"), *HALF_SHAPES]
        self.candidates = {
            f"tokens={tokens},rows={shape.out_features},cols={shape.in_features}": [
                config for config in LISTS[tokens] if fits(config, shape)
            ]
            for shape in shapes
            for tokens in TOKENS
        }
        self._shapes = {(shape.out_features, shape.in_features): shape for shape in shapes}
        self._settings = Settings.of(device)
        self._operands = lru_cache(maxsize=1)(self._make_operands)

    def _make_operands(self, shape: LinearShape) -> tuple[Nvfp4Operands, list[LinearOperand]]:
        """Makes one stored operand for the reference, and packed ones in rotation so that L2 is cold."""
        kernel, packed = Nvfp4LinearKernel(is_batch_invariant=False), []
        first = random_nvfp4(shape, self._settings.generator())
        for idx in range(num_calls(shape.num_params * 0.5625, least=2)):
            own = first.clone() if idx == 0 else random_nvfp4(shape, self._settings.generator(idx))
            shard = QuantTensor(own.weight, own.weight_scale, own.weight_scale_2, NVFP4)
            packed.append(kernel.prepare(StoredLinear((shard,))))
        return first, packed

    def run(self, case: str, config: Candidate) -> float:
        """Returns the median microseconds of a call, after a comparison with the torch reference."""
        tokens, rows, cols = (int(part.split("=")[1]) for part in case.split(","))
        stored, packed = self._operands(self._shapes[rows, cols])
        kernel = Nvfp4LinearKernel(is_batch_invariant=False, choose=partial(_chosen, config))
        x = random_activations(tokens, cols, self._settings.generator(tokens))
        try:
            operands = [replace(operand, launches=LaunchCache()) for operand in packed]
            y = kernel.run(x, operands[0])
        except (CompileError, CudaError, ValueError) as failure:
            raise CandidateFailed(str(failure).splitlines()[0]) from failure
        error = rel_l2(y, nvfp4_reference(x, stored))
        if not error <= MAX_REL_L2:
            raise CandidateFailed(f"wrong: relative L2 {error:.1e}")
        out = torch.empty_like(y)
        return (
            CudaGraph(0.05, warm_up_s=0.1).time([partial(kernel.run, x, operand, out=out) for operand in operands]).us
        )


def fits(config: Candidate, shape: LinearShape) -> bool:
    """Returns True if a candidate's tile divides the matrix and at least two of its stages fit."""
    gemm = linear_config(config)
    tiles, rest = divmod(shape.out_features, 64 * gemm.m64_per_tile)
    columns = gemm.stage_k * gemm.warpgroups_k * gemm.cluster_k
    wide_enough = math.gcd(shape.in_features, columns * BLOCK_K // gemm.stage_k) == columns * BLOCK_K // gemm.stage_k
    return rest == 0 and tiles % gemm.cluster_m == 0 and wide_enough and gemm.num_stages >= 2


def _chosen(config: Candidate, num_tokens: int, num_rows: int, num_cols: int, invariant: bool) -> LinearChoice:
    return linear_choice(linear_config(config), num_tokens, num_rows)


def family(device: str) -> LinearFamily:
    """Returns the dense products' tuner. Errors: ValueError off CUDA."""
    if not device.startswith("cuda"):
        raise ValueError(f"--tune linear measures on a CUDA device, not on {device}")
    return LinearFamily(device)
