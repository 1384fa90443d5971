"""Tiles of the routed experts, by (token, slot) pairs per expert, for V4-Flash, for half of its width and for V4-Pro.

A candidate names a tile: ``num_m64`` 64-row blocks for each of ``warpgroups_m`` warpgroups, token counts ``n0``,
``n1``, ... for which there is code, ``stages`` of shared memory, ``depth`` buffers of ``group`` k16 steps, ``gather``
for rows that are looked up instead of copied first, ``box`` token rows of one copy,
``cluster_m`` CTAs that share tokens, ``per_sm`` CTAs on an SM, ``per_block`` for products of one 64-row block at a
time, which leaves registers for more tokens. With slices, both products are one kernel, of tiles of
``slice_tokens`` tokens, ``slice_stages`` and ``slice_per_sm``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from ownpath.bench.check import moe_reference, rel_l2
from ownpath.bench.contender import SWIGLU_LIMIT
from ownpath.bench.measure import Settings
from ownpath.bench.operands import MoeOperands, random_activations, random_moe
from ownpath.bench.routing import uniform_routing
from ownpath.bench.shapes import MoeShape, moe_shape
from ownpath.bench.timing import CudaGraph
from ownpath.bench.tune import Candidate, CandidateFailed
from ownpath.conformance.bounds import MAX_REL_L2
from ownpath.formats import NVFP4
from ownpath.kernels.contract import Routing, StoredExperts
from ownpath.kernels.dsl.cache import CompileError
from ownpath.kernels.dsl.driver import CudaError
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.nvfp4.choose import TUNED, WIDE_PAIRS, MoeChoice, moe_choice
from ownpath.kernels.nvfp4.moe import MoeOperand, Nvfp4MoeKernel
from ownpath.qtensor import QuantTensor

SHAPES = ("v4-flash", "v4-flash-half", "v4-pro")

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of tokens that an entry is measured with."""


def _tile(num_m64: int, warpgroups_m: int, sizes: Sequence[int], stages: int, **more: int) -> dict[str, int]:
    knobs = {
        "num_m64": num_m64,
        "warpgroups_m": warpgroups_m,
        "stages": stages,
        "depth": 2,
        "gather": 0,
        "per_sm": 1,
    }
    return knobs | {f"n{idx}": size for idx, size in enumerate(sizes)} | more


FIRST = _tile(1, 1, (8,), 10, group=4, gather=1, per_sm=3)
SLICES = tuple(
    FIRST | {"slice_tokens": tokens, "slice_stages": stages, "slice_per_sm": per_sm}
    for tokens, stages, per_sm in ((1, 5, 4), (1, 7, 3), (2, 5, 4), (2, 6, 3), (4, 4, 4))
)
"""For calls of at most 32 pairs."""
FEW = (
    FIRST,
    _tile(1, 1, (8,), 8, group=4, gather=1, per_sm=4),
    _tile(2, 1, (8,), 5, group=2, gather=1, per_sm=3),
    _tile(2, 1, (8,), 5, group=4, gather=1, per_sm=3),
    _tile(2, 1, (8,), 5, group=2, gather=1, per_sm=4),
    _tile(2, 1, (8,), 4, group=4, gather=1, per_sm=4),
    _tile(1, 2, (8,), 8, group=4, gather=1, per_sm=2),
    _tile(2, 2, (8,), 5, group=2, gather=1, per_sm=2),
    _tile(2, 2, (8,), 5, group=2, per_sm=2),
    _tile(2, 4, (8,), 5, gather=1),
    _tile(2, 4, (8,), 5, group=2, gather=1),
    _tile(2, 4, (8,), 5, group=4, gather=1),
    _tile(2, 4, (8,), 5, group=2),
)
SOME = (
    _tile(2, 4, (8, 16, 32), 4),
    _tile(2, 4, (16, 32), 4),
    _tile(2, 4, (24, 32), 4),
    _tile(2, 4, (24, 40), 4, box=40),
    _tile(2, 4, (8, 16), 4),
    _tile(2, 4, (8, 16), 4, gather=1),
    _tile(2, 2, (8, 16), 5, per_sm=2),
    _tile(2, 2, (8, 16, 24), 4, box=24, per_sm=2),
    _tile(2, 2, (24, 32), 4, per_sm=2),
    _tile(2, 2, (16, 24, 32, 40), 6, box=40),
    _tile(2, 2, (16, 32, 48), 6, depth=4, box=16),
    _tile(2, 4, (8, 16), 5, box=8, per_block=1),
    _tile(2, 4, (8, 16, 24), 5, box=8, per_block=1),
    _tile(2, 4, (24, 32, 40), 4, box=8, per_block=1),
    _tile(2, 4, (16, 24, 32, 40), 4, box=8, per_block=1),
)
MIDDLE = (
    _tile(2, 2, (32, 48, 64), 6, depth=4),
    _tile(2, 2, (40, 48, 56, 64), 6, box=32),
    _tile(2, 2, (48, 64, 80), 5, box=40),
    _tile(1, 4, (32, 48, 64), 5, group=2),
    _tile(1, 4, (48, 64), 5),
    _tile(1, 4, (32, 48, 64, 80), 5, box=40),
    _tile(2, 4, (48, 64), 4, box=8, per_block=1),
    _tile(2, 4, (40, 48, 56), 4, box=8, per_block=1),
)
MANY = (
    _tile(2, 2, (80, 96, 112), 4, box=56),
    _tile(2, 2, (80, 96, 112), 4, box=16),
    _tile(2, 2, (64, 96, 128), 4, box=32),
    _tile(2, 2, (88, 104, 120), 4, box=40),
    _tile(2, 2, tuple(range(64, 121, 8)), 4, box=8),
    _tile(2, 2, tuple(range(64, 121, 8)), 4, box=8, per_block=1),
    _tile(1, 4, (80, 96, 112), 4, box=56, cluster_m=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 6, group=2, stage_k=64),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 3, group=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 6, group=2, stage_k=64, cluster_m=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224), 6, group=2, stage_k=64, box=56),
    _tile(1, 2, (128, 160, 176, 184, 192, 200, 208, 224, 256), 6, group=2, stage_k=64, cluster_m=2, box=32),
    _tile(2, 1, (80, 96, 112), 5, stage_k=64, per_sm=2, box=56),
    _tile(1, 1, (96, 128, 160, 176, 192), 4, group=2, stage_k=64, per_sm=2),
    _tile(1, 1, (96, 128, 160, 176, 192), 4, group=2, stage_k=64, per_sm=2, cluster_m=2),
)


def cases(shape: MoeShape) -> dict[str, int]:
    """Returns case -> number of tokens. An entry holds up to 17% more pairs per expert than it was measured with, so
    that few experts exceed the tile; where a tile holds all rows anyway, up to halfway to the next entry."""
    densities = [num_tokens * shape.top_k / shape.num_experts for num_tokens in TOKENS]
    limits = [
        1.17 * density if density >= 4 else math.sqrt(density * following)
        for density, following in itertools.pairwise(densities)
    ]
    named = f"hidden={shape.hidden},inter={shape.inter},pairs_per_expert<="
    return {f"{named}{limit:.3g}": tokens for limit, tokens in zip((*limits, 1e9), TOKENS, strict=True)}


def candidates(pairs_per_expert: float) -> tuple[dict[str, int], ...]:
    """Returns the candidates for this number of rows per expert."""
    lists = ((SLICES, 0, 0.1), (FEW, 0, 2.2), (SOME, 2.2, 40), (MIDDLE, 20, 80), (MANY, 60, math.inf))
    return tuple(one for tried, least, most in lists if least <= pairs_per_expert < most for one in tried)


class MoeFamily:
    """The family of ``--tune moe``."""

    candidates: Mapping[str, Sequence[Candidate]]
    table: Path = TUNED / "moe.json"

    def __init__(self, device: str) -> None:
        self._settings = Settings.of(device)
        self._problems = {
            case: (shape, num_tokens) for shape in map(moe_shape, SHAPES) for case, num_tokens in cases(shape).items()
        }
        self.candidates = {
            case: candidates(num_tokens * shape.top_k / shape.num_experts)
            for case, (shape, num_tokens) in self._problems.items()
        }
        self._operands = lru_cache(maxsize=1)(self._make_operands)
        self._reference = lru_cache(maxsize=1)(self._make_reference)

    def _make_operands(self, shape: MoeShape) -> tuple[MoeOperands, MoeOperand]:
        """Makes stored experts for the reference, and packed ones."""
        stored = random_moe(shape, self._settings.generator())
        own = stored.clone()
        gate_up_scale = own.w13_scale_2 if own.w13_scale_2.ndim == 2 else own.w13_scale_2[:, None].expand(-1, 2)
        gate_up = QuantTensor(own.w13, own.w13_scale, gate_up_scale, NVFP4)
        down = QuantTensor(own.w2, own.w2_scale, own.w2_scale_2, NVFP4)
        kernel = Nvfp4MoeKernel(is_batch_invariant=False)
        return stored, kernel.prepare(StoredExperts(gate_up, down, SWIGLU_LIMIT))

    def run(self, case: str, config: Candidate) -> float:
        """Returns the median microseconds of a call, after a comparison with the torch reference."""
        shape, num_tokens = self._problems[case]
        packed = replace(self._operands(shape)[1], launches=LaunchCache())
        kernel = Nvfp4MoeKernel(is_batch_invariant=False, choose=partial(_chosen, config))
        inputs = [self._input(shape, num_tokens, idx) for idx in range(6 if num_tokens <= 64 else 2)]
        calls = [partial(kernel.run, x, Routing(ids, weights), packed) for x, ids, weights in inputs]
        try:
            y = calls[0]()
        except (CompileError, CudaError, ValueError) as failure:
            raise CandidateFailed(str(failure).splitlines()[0]) from failure
        error = rel_l2(y, self._reference(shape, num_tokens))
        if not error <= MAX_REL_L2:
            raise CandidateFailed(f"wrong: relative L2 {error:.1e}")
        return CudaGraph(0.1, warm_up_s=0.1).time(calls).us

    def _make_reference(self, shape: MoeShape, num_tokens: int) -> torch.Tensor:
        routing = uniform_routing(shape, num_tokens, num_tokens, self._settings.device)
        x = self._input(shape, num_tokens, 0)[0]
        return moe_reference(x, routing, self._operands(shape)[0], SWIGLU_LIMIT)

    def _input(self, shape: MoeShape, num_tokens: int, idx: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = random_activations(num_tokens, shape.hidden, self._settings.generator(num_tokens + idx))
        routing = uniform_routing(shape, num_tokens, num_tokens + idx, self._settings.device)
        return x, routing.topk_ids, routing.topk_weights


def _chosen(config: Candidate, pairs: int, num_experts: int, hidden: int, inter: int, invariant: bool) -> MoeChoice:
    return moe_choice(config, hidden, inter, wide=invariant or pairs <= WIDE_PAIRS)


def family(device: str) -> MoeFamily:
    """Returns the experts' tuner. Errors: ValueError off CUDA."""
    if not device.startswith("cuda"):
        raise ValueError(f"--tune moe measures on a CUDA device, not on {device}")
    return MoeFamily(device)
