"""Checks the operands of hyper-connection boundaries. Each error names the operand."""

import torch
import triton

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix

NUM_STREAMS = 4
NUM_MIX = (2 + NUM_STREAMS) * NUM_STREAMS
INTERPRETED = triton.knobs.runtime.interpret


def check_mix(name: str, mix: Mix, num_tokens: int, device: torch.device) -> None:
    """Checks a mix. Errors: ValueError naming its first tensor that does not fit."""
    s = NUM_STREAMS
    check(f"{name}.post_TS", mix.post_TS, (torch.float32,), (num_tokens, s), device)
    check(f"{name}.comb_TSS", mix.comb_TSS, (torch.float32,), (num_tokens, s, s), device)


def check_weights(weights: HyperWeights, dim: int, device: torch.device) -> None:
    """Checks a boundary's weights. Errors: ValueError naming the one that does not fit."""
    num_mix = len(weights.fn)
    if num_mix not in (NUM_STREAMS, NUM_MIX):
        raise ValueError(f"fn must have {NUM_MIX} rows, or {NUM_STREAMS} after the last sublayer, found {num_mix}")
    check("fn", weights.fn, (torch.float32,), (num_mix, NUM_STREAMS * dim), device)
    check("base", weights.base, (torch.float32,), (num_mix,), device)
    check("scale", weights.scale, (torch.float32,), (3 if num_mix == NUM_MIX else 1,), device)
    check("norm_weight", weights.norm_weight, (torch.bfloat16,), (dim,), device)


def check_inputs(
    x_TSD: torch.Tensor, y_TD: torch.Tensor | None, mix: Mix | None, other_TD: torch.Tensor | None
) -> None:
    """Checks streams, output, its second part and mix. Errors: ValueError naming the one that does not fit."""
    check_rank("x_TSD", x_TSD, 3, INTERPRETED)
    num_tokens, s, dim = x_TSD.shape
    if s != NUM_STREAMS or dim % 8 or not 0 < dim <= 16384:
        raise ValueError(f"x_TSD must be [T, 4, D] with D a multiple of 8 up to 16384, found {list(x_TSD.shape)}")
    check("x_TSD", x_TSD, (torch.bfloat16,), (num_tokens, s, dim), x_TSD.device)
    if (y_TD is None) != (mix is None):
        raise ValueError("y_TD and mix come together: both after a sublayer, neither before the first one")
    if other_TD is not None and y_TD is None:
        raise ValueError("other_TD is the second part of an output, whose first part is y_TD")
    if y_TD is not None and mix is not None:
        for name, part in (("y_TD", y_TD), ("other_TD", y_TD if other_TD is None else other_TD)):
            check(name, part, (torch.bfloat16,), (num_tokens, dim), x_TSD.device)
        check_mix("mix", mix, num_tokens, x_TSD.device)


def check_workspace(workspace: torch.Tensor, num_floats: int, device: torch.device) -> None:
    """Checks the workspace. Errors: ValueError for another dtype or device, or too few elements."""
    if workspace.numel() < num_floats:
        raise ValueError(f"workspace must hold {num_floats} float32 elements, found {workspace.numel()}")
    check("workspace", workspace, (torch.float32,), tuple(workspace.shape), device)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns True for contiguous tensors of the same size that share memory."""
    return abs(a.data_ptr() - b.data_ptr()) < a.nbytes


def check_out(out: HyperOut, x_TSD: torch.Tensor, with_mix: bool) -> None:
    """Checks given outputs. Errors: ValueError naming the one that does not fit."""
    num_tokens, s, dim = x_TSD.shape
    check("out.x_TSD", out.x_TSD, (torch.bfloat16,), (num_tokens, s, dim), x_TSD.device)
    if overlaps(out.x_TSD, x_TSD):
        raise ValueError("out.x_TSD must not overlap x_TSD, which one warp still reads when another writes")
    check("out.h_TD", out.h_TD, (torch.bfloat16,), (num_tokens, dim), x_TSD.device)
    if with_mix != (out.mix is not None):
        raise ValueError("out.mix must be given exactly when fn has 24 rows")
    if out.mix is not None:
        check_mix("out.mix", out.mix, num_tokens, x_TSD.device)
