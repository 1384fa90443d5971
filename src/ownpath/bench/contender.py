"""Who takes part: something that prepares operands once and then computes, called the same way by everyone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.bench.row import Status

MoeCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x bfloat16 [T, D], topk_ids int32 [T, K], topk_weights float32 [T, K]) -> y bfloat16 [T, D]."""

LinearCall = Callable[[torch.Tensor], torch.Tensor]
"""x bfloat16 [M, K] -> y bfloat16 [M, N]."""

SWIGLU_LIMIT = 10.0
"""DeepSeek-V4's clamp."""


@dataclass(frozen=True)
class Missing:
    """Why a contender does not take part; a row that says so stands in its place."""

    status: Status
    reason: str


W4A16_MAX_REL_L2 = 1e-2
"""Beyond this a contender that keeps bfloat16 activations computes something else: bfloat16 rounding of the output and
of what passes between an MoE's two products gives 2e-3 to 3e-3, and a peer that rounds scales stays below 6e-3."""

W8A8_MAX_REL_L2 = 5e-2
"""Activations in E4M3: an error of at most 2^-4, 2.6e-2 in the quadratic mean of random ones, with half as much again
for the rounding of weights that a peer may do."""

W4A4_MAX_REL_L2 = 2e-1
"""Activations in E2M1: an error of at most a quarter of a value, 0.1 in the quadratic mean of random ones, in front of
each of an MoE's two products."""


class Contender(Protocol):
    """Imports nothing of its system until it is asked to prepare. max_rel_l2: a larger error marks a row as wrong."""

    name: str
    is_peer: bool
    max_rel_l2: float

    def missing(self, device: str) -> Missing | None:
        """Why it cannot run here, or None if it can."""


class MoeContender(Contender, Protocol):
    """Takes part in ``bench moe``."""

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        """Repacks (a copy of) the operands and compiles for these token counts. None of it is timed."""


class Nvfp4Contender(Contender, Protocol):
    """Takes part in ``bench linear``."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        """Repacks (a copy of) the operands and compiles for these row counts. None of it is timed."""


class Fp8Contender(Contender, Protocol):
    """Takes part in ``bench fp8``."""

    def prepare(self, operands: Fp8Operands, num_rows: Sequence[int]) -> LinearCall:
        """Repacks (a copy of) the operands and compiles for these row counts. None of it is timed."""
