"""Exact results of a decode step's kernels, row by row, from places that are computed on the host.

Angles come from the model's frequencies in float64. A kernel gets them in float32, and the bounds say what that may
change. No kernel, and no twin of one, takes part.

Legend: T rows, N heads, H head dim, I index heads, E rows that end a window, C entries, F rotary pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY, entry_row, ring_row
from ownpath.config import ModelConfig
from ownpath.conformance.attend import exact_row
from ownpath.conformance.bounds import (
    ANGLE_STEPS,
    EXP_STEPS,
    FLOAT32_ROUND,
    SPREAD,
    Exact,
    rounding,
    sum_rounding,
)
from ownpath.conformance.cached import fp4_of
from ownpath.conformance.exact_entries import exact_key
from ownpath.kernels.contract import NormWeights
from ownpath.oracle import formulas


@dataclass(frozen=True)
class RowPlace:
    """A row's token position, its slot, and its blocks in the order of its tokens. A padded row has nobody's slot."""

    position: int
    slot: int
    blocks: tuple[int, ...]

    @property
    def is_padding(self) -> bool:
        return self.slot == NOBODY

    def ring_rows(self, num_rows: int, *, first: int, last: int) -> list[int]:
        """Returns the rows of a ring that hold the positions from ``first`` to ``last``, those before 0 left out."""
        return [ring_row(self.slot, position, num_rows) for position in range(max(0, first), last + 1)]

    def entry_rows(self, ratio: int, count: int) -> list[int]:
        """Returns the rows of the first ``count`` entries."""
        return [entry_row(self.blocks, number, BLOCK_TOKENS // ratio) for number in range(count)]

    def num_visible(self, ratio: int) -> int:
        """Returns the number of entries that the row sees."""
        return (self.position + 1) // ratio

    def ends_window(self, ratio: int) -> bool:
        """True if an entry is finished by this row."""
        return (self.position + 1) % ratio == 0


@dataclass(frozen=True)
class ExactAngles:
    """cos and sin float64 [T, F] of positions, and how far a right float32 angle may be off."""

    cos_TF: Tensor
    sin_TF: Tensor
    error_TF: Tensor

    @classmethod
    def of(cls, positions_T: Tensor, config: ModelConfig, ratio: int) -> "ExactAngles":
        """Computes the angles of a kind of layer, by its compress ratio."""
        freqs_F = formulas.frequencies(config, ratio, torch.float64).to(positions_T.device)
        angles_TF = positions_T[:, None].double() * freqs_F
        return cls(angles_TF.cos(), angles_TF.sin(), ANGLE_STEPS * FLOAT32_ROUND * (angles_TF.abs() + 1))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.cos_TF, self.sin_TF

    def moved(self, x: Tensor) -> Tensor:
        """Bounds how far the angles' errors move each channel of x [T, ..., H]: by no more than its pair is long."""
        num_rotary = 2 * self.cos_TF.shape[1]
        length = x[..., -num_rotary:].unflatten(-1, (-1, 2)).norm(dim=-1)
        error_TF = self.error_TF.view(len(x), *[1] * (x.ndim - 2), -1)
        found = torch.zeros_like(x)
        found[..., -num_rotary:] = (length * error_TF).repeat_interleave(2, -1)
        return found


def exact_written(x: Exact, norm: NormWeights, angles: ExactAngles, dtype: torch.dtype) -> Exact:
    """Computes keys or entries [E, H] as a pool holds them: normed, then turned."""
    exact = exact_key(x, norm, angles.pair, dtype)
    return exact.plus(angles.moved(exact.value))


def exact_index_scores(
    q_IH: Tensor,
    weights_I: Tensor,
    keys_CH: Tensor,
    angles: ExactAngles,
    dtype: torch.dtype,
    *,
    is_official: bool = False,
) -> Exact:
    """Computes one row's scores [1, C] from raw queries and head weights; angles: of this row.

    Turned channels are rounded to ``dtype``: independent errors, which the sum over heads and channels spreads.
    is_official: queries are rounded to FP4 behind a Hadamard rotation.
    """
    num_heads, width = q_IH.shape
    num_rotary = 2 * angles.cos_TF.shape[1]
    q_1IH = formulas.rotate(q_IH.double()[None], *angles.pair)
    moved_IH, q_IH = angles.moved(q_1IH)[0], q_1IH[0]
    rounded_IH = torch.zeros_like(q_IH)
    rounded_IH[:, -num_rotary:] = rounding(dtype) * q_IH[:, -num_rotary:].abs()
    if is_official:
        codes = fp4_of(Exact(q_IH, moved_IH + rounded_IH), dtype)
        q_IH, moved_IH, rounded_IH = codes.value, codes.bound, torch.zeros_like(q_IH)
    weights_I1 = weights_I.double()[:, None] * width**-0.5 * num_heads**-0.5
    value = (torch.relu(q_IH @ keys_CH.T) * weights_I1).sum(0)
    magnitude_IC = q_IH.abs() @ keys_CH.abs().T
    steps = sum_rounding(width) + sum_rounding(num_heads) + EXP_STEPS * FLOAT32_ROUND
    certain_IC = magnitude_IC * steps + moved_IH @ keys_CH.abs().T
    spread_IC = rounded_IH.square() @ keys_CH.square().T
    bound = (certain_IC * weights_I1.abs()).sum(0) + SPREAD * (spread_IC * weights_I1.square()).sum(0).sqrt()
    return Exact(value[None], bound[None])


def best_entries(scores: list[float], topk: int) -> list[int]:
    """Returns the ``topk`` entries with the best scores, ascending; the lower of equal ones, NaN below all."""

    def rank(entry: int) -> tuple[bool, float, int]:
        score = scores[entry]
        return (True, 0.0, entry) if score != score else (False, -score, entry)

    return sorted(sorted(range(len(scores)), key=rank)[:topk])


@dataclass(frozen=True)
class AttendOperands:
    """sink float64 [N]; the softmax's scale; eps of the queries' norm; dtype of the activations. is_stepwise: the
    norm rounds after every operation."""

    sink_N: Tensor
    scale: float
    eps: float
    dtype: torch.dtype
    is_stepwise: bool = False

    def normed(self, q_NH: Tensor) -> tuple[Tensor, float]:
        """Norms queries in float64, rounded where the operation rounds, and bounds the relative error that is left.

        Stepwise, a mean and a root at the edge of two numbers may be either.
        """
        relative = sum_rounding(q_NH.shape[1]) / 2 + EXP_STEPS * FLOAT32_ROUND
        if not self.is_stepwise:
            return self._round(formulas.rms(q_NH.double(), self.eps)), relative
        mean_N1 = self._round(self._round(q_NH.double().square()).mean(-1, keepdim=True))
        factor_N1 = self._round(torch.rsqrt(self._round(mean_N1 + self.eps)))
        return self._round(q_NH.double() * factor_N1), relative + 4 * rounding(self.dtype)

    def _round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).double()


def exact_decode_row(q_NH: Tensor, keys_KH: Tensor, angles: ExactAngles, operands: AttendOperands) -> Exact:
    """Computes one row's attention [N, H] from raw queries and its keys: normed, turned, attended, turned back.

    Queries are rounded where the operation rounds them, so that every kernel has the same ones but for neighbours.
    """
    dtype = operands.dtype
    normed_NH, relative = operands.normed(q_NH)
    turned_1NH = formulas.rotate(normed_NH[None], *angles.pair).to(dtype).double()
    error_NH = (angles.moved(turned_1NH) + relative * turned_1NH.abs())[0]
    value_NH, bound_NH = exact_row(
        turned_1NH[0], keys_KH, operands.sink_N, operands.scale, dtype=dtype, error_NH=error_NH
    )
    return _turned_back(value_NH, bound_NH, angles)


def _turned_back(value_NH: Tensor, bound_NH: Tensor, angles: ExactAngles) -> Exact:
    """Both channels of a pair may be off, by as much as either: |cos| + |sin| is below 1.5."""
    num_rotary = 2 * angles.cos_TF.shape[1]
    turned_1NH = formulas.rotate(value_NH[None], angles.cos_TF, -angles.sin_TF)
    pairs = bound_NH[:, -num_rotary:].unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)
    bound_NH = torch.cat((bound_NH[:, :-num_rotary], 1.5 * pairs), -1)
    slack_NH = (angles.moved(turned_1NH) + 4 * FLOAT32_ROUND * turned_1NH.abs().amax(-1, keepdim=True))[0]
    return Exact(turned_1NH[0], bound_NH + slack_NH)
