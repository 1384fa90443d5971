"""This package's runners as contenders, through the public API."""

from collections.abc import Sequence

from ownpath.bench.contender import SWIGLU_LIMIT, W4A16_MAX_REL_L2, W8A8_MAX_REL_L2, LinearCall, Missing, MoeCall
from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.runners import Fp8Linear, Nvfp4Linear, Nvfp4MoE


class _OwnSystem:
    name = "ownpath"
    is_peer = False
    max_rel_l2 = W4A16_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Returns None: it runs everywhere."""
        return None


class OwnMoe(_OwnSystem):
    """``ownpath.Nvfp4MoE``."""

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        own = operands.clone()
        return Nvfp4MoE(
            own.w13, own.w13_scale, own.w13_scale_2, own.w2, own.w2_scale, own.w2_scale_2, swiglu_limit=SWIGLU_LIMIT
        )


class OwnNvfp4Linear(_OwnSystem):
    """``ownpath.Nvfp4Linear``."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        own = operands.clone()
        return Nvfp4Linear(own.weight, own.weight_scale, own.weight_scale_2)


class OwnFp8Linear(_OwnSystem):
    """``ownpath.runners.Fp8Linear``: W8A16, or W8A8 for many rows."""

    max_rel_l2 = W8A8_MAX_REL_L2

    def prepare(self, operands: Fp8Operands, num_rows: Sequence[int]) -> LinearCall:
        own = operands.clone()
        return Fp8Linear(own.weight, own.scale)
