"""Tiles of the routed experts, by (token, slot) pairs per expert, on V4-Flash's shape.

A candidate names a tile: ``num_m64`` 64-row blocks for each of ``warpgroups_m`` warpgroups, token counts ``n0``,
``n1``, ... for which there is code, ``stages`` of shared memory, ``depth`` buffers of ``group`` k16 steps, ``gather``
for rows that are looked up instead of copied first, ``box`` token rows of one copy,
``cluster_m`` CTAs that share tokens, ``per_sm`` CTAs on an SM.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch

from ownpath.bench.check import moe_reference, rel_l2
from ownpath.bench.contender import SWIGLU_LIMIT
from ownpath.bench.measure import Settings
from ownpath.bench.operands import MoeOperands, random_activations, random_moe
from ownpath.bench.routing import uniform_routing
from ownpath.bench.shapes import moe_shape
from ownpath.bench.timing import CudaGraph
from ownpath.bench.tune import CandidateFailed, Config
from ownpath.kernels.cache import CompileError
from ownpath.kernels.cute.choose import TUNED, WIDE_PAIRS, MoeChoice, moe_choice
from ownpath.kernels.cute.moe import MoeOperand, Nvfp4MoeKernel
from ownpath.kernels.driver import CudaError

SHAPE = "v4-flash"
MAX_REL_L2 = 3e-3

TOKENS = {0.05: 1, 0.12: 4, 0.3: 8, 2.2: 64, 8.0: 256, 16.0: 512, 40.0: 1024, 56.0: 2048, 120.0: 4096, 1e9: 8192}
"""Pairs per expert up to which an entry holds -> the number of tokens it is measured with."""


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


FEW = (
    _tile(1, 1, (8,), 10, depth=4, gather=1, per_sm=3),
    _tile(1, 1, (8,), 10, group=4, gather=1, per_sm=3),
    _tile(1, 1, (8,), 8, group=4, gather=1, per_sm=4),
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
    _tile(2, 4, (8, 16, 24), 4, box=24),
    _tile(2, 4, (16, 24, 32), 4),
    _tile(1, 4, (8, 16, 24, 32), 7, group=2),
    _tile(1, 4, (8, 16, 24, 32, 40), 6, group=2, box=40),
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
)
MIDDLE = (
    _tile(2, 2, (32, 48, 64), 6, depth=4),
    _tile(2, 2, (40, 48, 56, 64), 6, box=32),
    _tile(2, 2, (48, 64, 80), 5, box=40),
    _tile(1, 4, (32, 48, 64), 5, group=2),
    _tile(1, 4, (48, 64), 5),
    _tile(1, 4, (32, 48, 64, 80), 5, box=40),
)
MANY = (
    _tile(2, 2, (64, 80, 96, 112, 128), 4, box=32),
    _tile(2, 2, (64, 80, 96, 112, 128), 4),
    _tile(2, 2, (80, 96, 112), 4, box=56),
    _tile(2, 2, (88, 104, 120), 4, box=40),
    _tile(2, 2, (80, 88, 96, 104, 112), 4, box=56, cluster_m=2),
    _tile(1, 4, (80, 96, 112), 4, box=56, cluster_m=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 6, group=2, stage_k=64),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 3, group=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224, 256), 6, group=2, stage_k=64, cluster_m=2),
    _tile(1, 2, (128, 160, 176, 192, 208, 224), 6, group=2, stage_k=64, box=56),
    _tile(2, 1, (64, 96, 128), 5, stage_k=64, per_sm=2),
    _tile(2, 1, (80, 96, 112), 5, stage_k=64, per_sm=2, box=56),
    _tile(1, 1, (96, 128, 160, 176, 192), 4, group=2, stage_k=64, per_sm=2),
    _tile(1, 1, (96, 128, 160, 176, 192), 4, group=2, stage_k=64, per_sm=2, cluster_m=2),
)


class MoeFamily:
    """The family that ``--tune moe`` asks for."""

    candidates: Mapping[str, Sequence[Config]]
    table: Path = TUNED / "moe.json"

    def __init__(self, device: str) -> None:
        lists = (FEW, FEW, FEW, FEW, SOME, SOME, SOME, MIDDLE, MANY, MANY)
        self.candidates = {f"pairs_per_expert<={limit}": tried for limit, tried in zip(TOKENS, lists, strict=True)}
        self._settings = Settings.of(device)
        self._shape = moe_shape(SHAPE)
        self._reference = lru_cache(maxsize=1)(self._make_reference)

    @cached_property
    def _operands(self) -> MoeOperands:
        return random_moe(self._shape, self._settings.generator())

    @cached_property
    def _packed(self) -> MoeOperand:
        own = self._operands.clone()
        w13 = own.w13_scale_2 if own.w13_scale_2.ndim == 2 else own.w13_scale_2[:, None].expand(-1, 2)
        kernel = Nvfp4MoeKernel(is_batch_invariant=False)
        return kernel.prepare((own.w13, own.w13_scale, w13), (own.w2, own.w2_scale, own.w2_scale_2))

    def run(self, case: str, config: Config) -> float:
        """Median microseconds of a call; the answer is compared with the torch reference first."""
        num_tokens = TOKENS[float(case.split("<=")[1])]
        kernel = Nvfp4MoeKernel(is_batch_invariant=False, choose=partial(_chosen, config))
        inputs = [self._input(num_tokens, idx) for idx in range(6 if num_tokens <= 64 else 2)]
        calls = [partial(kernel, *given, self._packed, SWIGLU_LIMIT) for given in inputs]
        try:
            y = calls[0]()
        except (CompileError, CudaError, ValueError) as failure:
            raise CandidateFailed(str(failure).splitlines()[0]) from failure
        error = rel_l2(y, self._reference(num_tokens))
        if not error <= MAX_REL_L2:
            raise CandidateFailed(f"wrong: relative L2 {error:.1e}")
        return CudaGraph(0.1).time(calls).us

    def _make_reference(self, num_tokens: int) -> torch.Tensor:
        routing = uniform_routing(self._shape, num_tokens, num_tokens, self._settings.device)
        return moe_reference(self._input(num_tokens, 0)[0], routing, self._operands, SWIGLU_LIMIT)

    def _input(self, num_tokens: int, idx: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = random_activations(num_tokens, self._shape.hidden, self._settings.generator(num_tokens + idx))
        routing = uniform_routing(self._shape, num_tokens, num_tokens + idx, self._settings.device)
        return x, routing.topk_ids, routing.topk_weights


def _chosen(config: Config, pairs: int, num_experts: int, hidden: int, inter: int, invariant: bool) -> MoeChoice:
    return moe_choice(config, hidden, inter, wide=invariant or pairs <= WIDE_PAIRS)


def family(device: str) -> MoeFamily:
    """The experts' tuner. Errors: ValueError off CUDA."""
    if not device.startswith("cuda"):
        raise ValueError(f"--tune moe measures on a CUDA device, not on {device}")
    return MoeFamily(device)
