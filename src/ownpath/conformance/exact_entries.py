"""Exact keys and entries of a decode step's writes, with the errors that roundings may cause.

Legend: T rows, E rows that end a window, L raw rows of an entry, H head dim, P compressor width, F rotary pairs.
"""

import torch
from torch import Tensor

from ownpath.conformance.bounds import EXP_STEPS, FLOAT32_ROUND, Exact, rounding, sum_rounding
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import CompressorWeights, RowPlaces
from ownpath.oracle import formulas


def exact_pool(
    raw_EP2: Tensor,
    ending: RowPlaces,
    state: Tensor,
    weights: CompressorWeights,
    dtype: torch.dtype = torch.bfloat16,
    spare: int = 0,
) -> Exact:
    """Averages each entry's rows, one entry after the other, and bounds the error after a rounding to ``dtype``.

    state: holds all rows but the newest; spare: its rows of a slot beyond those of an entry.
    A score's error d changes its gate by a factor of exp(d), the sum of gates by no more.
    """
    values, bounds = [], []
    for number in range(len(raw_EP2)):
        kv_LH, score_LH = _entry_inputs(raw_EP2[number], number, ending, state, weights, spare)
        gate_LH = score_LH.softmax(dim=0)
        value = (gate_LH * kv_LH).sum(0)
        error = (EXP_STEPS + 4 * score_LH.abs().amax(0)) * FLOAT32_ROUND + 2 * sum_rounding(len(kv_LH))
        bounds.append((gate_LH * kv_LH.abs()).sum(0) * error + rounding(dtype) * value.abs())
        values.append(value)
    return Exact(torch.stack(values), torch.stack(bounds))


def _entry_inputs(
    raw_P2: Tensor, number: int, ending: RowPlaces, state: Tensor, weights: CompressorWeights, spare: int
) -> tuple[Tensor, Tensor]:
    """Reads the (kv, score) rows of one entry in float64, position by position: [L, H] each."""
    end, slot = int(ending.positions_T[number]), int(ending.slots_T[number])
    width, head_dim, ring = weights.ape_LP.shape[1], weights.head_dim, weights.num_rows + spare
    found = []
    for position in range(max(0, end + 1 - weights.num_rows), end + 1):
        row = raw_P2 if position == end else state[slot * ring + position % ring]
        is_own_window = position > end - weights.ratio
        start = head_dim if is_own_window and weights.num_windows > 1 else 0
        score = row[width:].double() + weights.ape_LP[position % weights.ratio].double()
        found.append((row[start : start + head_dim].double(), score[start : start + head_dim]))
    return torch.stack([kv for kv, _ in found]), torch.stack([score for _, score in found])


def exact_key(
    x_TH: Exact, norm: NormWeights, angles: tuple[Tensor, Tensor], dtype: torch.dtype = torch.bfloat16
) -> Exact:
    """Norms and rotates, each rounded once to ``dtype``; the last rounding is not in the bound."""
    assert norm.weight_D is not None
    root_T1 = x_TH.value.square().mean(-1, keepdim=True).add(norm.eps).sqrt()
    gain_TH = norm.weight_D.double() / root_T1
    normed_TH = x_TH.value * gain_TH
    relative_T1 = x_TH.bound.square().mean(-1, keepdim=True).sqrt() / root_T1
    relative_T1 = relative_T1 + EXP_STEPS * FLOAT32_ROUND + sum_rounding(normed_TH.shape[1]) / 2
    error_TH = x_TH.bound * gain_TH.abs() + normed_TH.abs() * relative_T1
    error_TH = error_TH + rounding(dtype) * normed_TH.abs()
    cos_TF, sin_TF = (one.double() for one in angles)
    turned = formulas.rotate(normed_TH, cos_TF, sin_TF)
    # Turning a pair moves a channel's error by no more than the length of the pair's errors; three float32 operations.
    num_rotary = 2 * cos_TF.shape[1]
    pair_TF = error_TH[:, -num_rotary:].unflatten(-1, (-1, 2)).norm(dim=-1)
    error_TH = torch.cat((error_TH[:, :-num_rotary], pair_TF.repeat_interleave(2, -1)), -1)
    return Exact(turned, error_TH + 4 * FLOAT32_ROUND * normed_TH.abs().amax(-1, keepdim=True))
