"""The exact result of each operation in float64, by the oracle's formulas, and the allowed error of a right kernel.

Legend: M rows, K in, N out; T tokens, S streams, D hidden, N heads, H head dim, F expert width or frequencies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.conformance.bounds import (
    ANGLE_STEPS,
    EXP_STEPS,
    FLOAT32_ROUND,
    SPREAD,
    Deviation,
    Exact,
    deviation,
    rounding,
    sum_rounding,
)
from ownpath.kernels.hyper.ref import HyperOut, Mix
from ownpath.oracle import formulas
from ownpath.oracle.formulas import Mixing

ROWS_AT_ONCE = 8192
SILU_SLOPE = 1.1
"""The largest slope of silu."""
STEPWISE_ROUNDINGS = 3
"""Roundings to the activations' dtype in front of a norm's last one, where every operation rounds: the square's, the
mean's and the sum's move the root by half a unit each, the root is rounded itself, and half a unit is to spare."""


def widen(x: Tensor) -> Tensor:
    """Returns x in float64: W4A16 and W8A16 multiply their inputs unrounded."""
    return x.double()


def product(x_MK: Tensor, weight_NK: Tensor, slack: float = 0.0) -> Exact:
    """Multiplies x Wᵀ in float64, and bounds the error of the float32 sums."""
    # In parts: the head of a large model is 4 GB in float64, and one copy of it is enough.
    magnitude = torch.cat([x_MK.abs() @ part.abs().T for part in weight_NK.split(ROWS_AT_ONCE)], -1)
    return Exact(x_MK @ weight_NK.T, magnitude * (sum_rounding(x_MK.shape[-1]) + slack))


def independent_error(errors_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Bounds the error of a product whose inputs have independent errors: [M, N]."""
    return SPREAD * (errors_MK.square() @ weight_NK.square().T).sqrt()


def grouped_product(
    u_TNH: Tensor, error_TNH: Tensor, num_groups: int, weight_NK: Tensor, lost_NK: Tensor | None = None
) -> Exact:
    """Multiplies each group of heads, side by side [T, N]. error: the bound of each channel's own error.

    lost: the bound of the weights' errors.
    """
    u_TGK, error_TGK = (part.flatten(1).unflatten(1, (num_groups, -1)) for part in (u_TNH, error_TNH))
    lost = (None,) * num_groups if lost_NK is None else lost_NK.chunk(num_groups)
    found = []
    for group, (weight_RK, lost_RK) in enumerate(zip(weight_NK.chunk(num_groups), lost, strict=True)):
        exact = product(u_TGK[:, group], weight_RK).plus(independent_error(error_TGK[:, group], weight_RK))
        found.append(exact if lost_RK is None else exact.plus(independent_error(u_TGK[:, group], lost_RK)))
    return join_columns(found)


def rotate_back(o_TNH: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotates heads back in float64 by (cos, sin) [T, F] as a kernel gets them, and bounds the effect of rounding
    those."""
    u_TNH = formulas.rotate(o_TNH.double(), angles[0].double(), -angles[1].double())
    rounded = rounding(o_TNH.dtype) if angles[0].shape[1] else 0.0  # without angles nothing is rotated
    return u_TNH, u_TNH.abs() * rounded


def join_columns(parts: list[Exact]) -> Exact:
    """Joins the columns of several results side by side."""
    return Exact(torch.cat([part.value for part in parts], 1), torch.cat([part.bound for part in parts], 1))


def rotation(x: Tensor, angles_TF: Tensor) -> Exact:
    """Rotates x by angles in float64; bounds the effect of the angles' error: that times the length of the pair."""
    wide, num_rotary = x.double(), 2 * angles_TF.shape[1]
    value = formulas.rotate(wide, angles_TF.cos(), angles_TF.sin())
    pair = wide[..., -num_rotary:].unflatten(-1, (-1, 2)).norm(dim=-1)
    error_TF = ANGLE_STEPS * FLOAT32_ROUND * (angles_TF.abs() + 1)
    moved = (pair * error_TF[:, None]).repeat_interleave(2, -1)
    bound = torch.zeros_like(value)
    bound[..., -num_rotary:] = moved + rounding(x.dtype) * pair.repeat_interleave(2, -1)
    return Exact(value, bound)


def norm(x: Tensor, eps: float, weight: Tensor | None = None, *, is_stepwise: bool = False) -> Exact:
    """Computes an RMS norm. The root of a float32 mean of squares has half the relative error of their sum."""
    value = formulas.rms(x.double(), eps)
    relative = sum_rounding(x.shape[-1]) / 2 + EXP_STEPS * FLOAT32_ROUND
    relative += STEPWISE_ROUNDINGS * rounding(x.dtype) if is_stepwise else 0.0
    value = value if weight is None else value * weight
    return Exact(value, relative * value.abs())


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Exact:
    """Computes the clamped activation of exact gate and up. exp of a gate is off by |gate| steps, from its argument."""
    value = formulas.swiglu(gate.double(), up.double(), limit)
    return Exact(value, (EXP_STEPS + 2 * gate.double().abs()) * FLOAT32_ROUND * value.abs())


@dataclass(frozen=True)
class ExpertMatrices:
    """w1 (gate) and w3 (up) [F, D], w2 (down) [D, F], float64."""

    w1: Tensor
    w3: Tensor
    w2: Tensor


@dataclass(frozen=True)
class ExpertSteps:
    """The roundings inside an expert. inputs, hidden: quantisers in front of the two products.

    rounds_products: gate and up are rounded to ``dtype`` before the activation. slack: added error of the sums, of
    their absolute terms.
    """

    limit: float
    dtype: torch.dtype
    inputs: Callable[[Tensor], Tensor] = widen
    hidden: Callable[[Tensor], Tensor] = widen
    rounds_products: bool = False
    slack: float = 0.0


def expert(x_MD: Tensor, matrices: ExpertMatrices, steps: ExpertSteps) -> Exact:
    """Computes w2 swiglu(w1 x, w3 x), not rounded. x: activations in the engine's dtype."""
    rows = steps.inputs(x_MD)
    gate, up = (product(rows, matrix, steps.slack) for matrix in (matrices.w1, matrices.w3))
    if steps.rounds_products:
        gate, up = _round(gate, steps.dtype), _round(up, steps.dtype)
    middle, error = _quantize_hidden(_activate(gate, up, steps.limit), steps)
    down = product(middle, matrices.w2, steps.slack)
    return down.plus(independent_error(error, matrices.w2))


def _round(exact: Exact, dtype: torch.dtype) -> Exact:
    """Rounds to ``dtype``, and adds what an earlier error may change about it."""
    value = exact.value.to(dtype).double()
    ends = ((exact.value + sign * exact.bound).to(dtype).double() for sign in (1, -1))
    low, high = ((end - value).abs() for end in ends)
    return Exact(value, torch.maximum(low, high))


def _activate(gate: Exact, up: Exact, limit: float) -> Exact:
    """Applies the activation; errors vanish where a clamp cuts them off."""
    value = formulas.swiglu(gate.value, up.value, limit)
    gate_error = torch.where(gate.value - gate.bound > limit, 0.0, gate.bound)
    up_error = torch.where(up.value.abs() - up.bound > limit, 0.0, up.bound)
    silu = formulas.swiglu(gate.value, torch.ones_like(value), limit).abs()
    spread = SILU_SLOPE * gate_error * (up.value.abs().clamp(max=limit) + up_error) + silu * up_error
    return Exact(value, spread + EXP_STEPS * FLOAT32_ROUND * value.abs())


def _quantize_hidden(hidden: Exact, steps: ExpertSteps) -> tuple[Tensor, Tensor]:
    """Quantises hidden values for the second product, and bounds how far a right kernel's may be from those."""
    sign, size = hidden.value.sign(), hidden.value.abs()

    def read(magnitude: Tensor) -> Tensor:
        return steps.hidden((sign * magnitude).to(steps.dtype)).abs()

    middle = read(size)
    low, high = read((size - hidden.bound).clamp(min=0)), read(size + hidden.bound)
    # A hidden value so small that its error may flip its sign may be off by both.
    crossing = torch.where(hidden.bound > size, middle + high, 0.0)
    return sign * middle, torch.maximum((high - middle).abs(), (middle - low).abs()) + crossing


def attention(q_TNH: Tensor, keys_KH: Tensor, visible_TK: Tensor, sink_N: Tensor, scale: float) -> Exact:
    """Computes softmax over the visible keys and a sink, times the keys.

    A score is a sum of H products, rounded to the activations' dtype. An error d of a score moves the output by its
    weight times d times how far its key is from the output; weights are rounded once more.
    """
    q, keys, round_ = q_TNH.double(), keys_KH.double(), rounding(q_TNH.dtype)
    scores_TNK = (q @ keys.T) * scale
    error_TNK = sum_rounding(q.shape[-1]) * (q.abs() @ keys.abs().T) * scale
    # Relative to the largest of the row too: exp of a difference.
    error_TNK = error_TNK + round_ * scores_TNK.abs() + EXP_STEPS * FLOAT32_ROUND * (1 + scores_TNK.abs())
    weights_TNK = formulas.attention_weights(scores_TNK, visible_TK, sink_N)
    out_TNH = weights_TNK @ keys
    off_TNK = weights_TNK * (error_TNK.masked_fill(~visible_TK[:, None], 0.0) + round_)
    spread_TNH = (off_TNK.square() @ keys.square()).sqrt()
    spread_TNH = spread_TNH + off_TNK.square().sum(-1, keepdim=True).sqrt() * out_TNH.abs()
    sums_TNH = sum_rounding(len(keys)) * (weights_TNK @ keys.abs())
    return Exact(out_TNH, SPREAD * spread_TNH + sums_TNH)


def write_streams(x_TSD: Tensor, y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Exact:
    """Computes the new streams: a sum of S + 1 products."""
    parts = tuple(part.double() for part in (x_TSD, y_TD, post_TS, comb_TSS))
    terms = formulas.write_streams(*(part.abs() for part in parts))
    return Exact(formulas.write_streams(*parts), sum_rounding(x_TSD.shape[1] + 1) * terms)


@dataclass(frozen=True)
class ExactBoundary:
    """One boundary on the streams [T, S, D] that it reads, in float64."""

    x_TSD: Tensor
    mixing: Mixing

    @property
    def num_streams(self) -> int:
        return self.x_TSD.shape[1]

    def _logits(self) -> Tensor:
        return self.mixing.logits(self.x_TSD)

    def logits_error(self) -> Tensor:
        """Bounds the error of the scaled mixing logits: the largest of each token, [T, 1]."""
        x, fn = self.x_TSD.flatten(1), self.mixing.fn
        root = x.square().mean(-1, keepdim=True).add(self.mixing.norm_eps).sqrt()
        sums = (x.abs() @ fn.abs().T) / root * sum_rounding(x.shape[1])
        values = (x @ fn.T).abs() / root
        return ((sums + 8 * FLOAT32_ROUND * values) * self.mixing.scale.abs().amax()).amax(-1, keepdim=True)

    def post(self) -> Exact:
        """A logit's error d changes a sigmoid by at most d / 4."""
        value = self.mixing.post(self._logits(), self.num_streams)
        return Exact(value, self.logits_error() / 2 + EXP_STEPS * FLOAT32_ROUND * value)

    def comb(self) -> Exact:
        """A logit's error d changes an entry by a factor of exp(4 d) at most.

        Softmax changes by exp(2 d), and each of Sinkhorn's sums by no more than twice the entries' error. Each of its
        steps adds a sum of S and a quotient.
        """
        value = self.mixing.comb(self._logits(), self.num_streams)
        steps = EXP_STEPS + 2 * self.mixing.num_iters * (self.num_streams + 1)
        relative_T11 = (torch.expm1(4 * self.logits_error()) + steps * FLOAT32_ROUND)[..., None]
        return Exact(value, relative_T11 * value)

    def comb_sums(self) -> Exact:
        """Sinkhorn ends with columns: they sum to 1 but for eps in the divisor."""
        ones = self.x_TSD.new_ones(len(self.x_TSD), self.num_streams)
        return Exact(ones, 2 * self.num_streams * (self.mixing.hc_eps + FLOAT32_ROUND) * ones)

    def normed_input(self, weight_D: Tensor, dtype: torch.dtype) -> Exact:
        """The collapsed streams, rounded once, then their norm, whose divisor has no larger error than they have."""
        h_TD = formulas.collapse(self.x_TSD, self.mixing.pre(self._logits(), self.num_streams))
        weights_T1 = self.logits_error() / 4 + (EXP_STEPS + self.num_streams) * FLOAT32_ROUND
        error_TD = self.x_TSD.abs().sum(1) * weights_T1 + rounding(dtype) * h_TD.abs()
        root_T1 = h_TD.square().mean(-1, keepdim=True).add(self.mixing.norm_eps).sqrt()
        divisor_T1 = error_TD.square().mean(-1, keepdim=True).sqrt() / root_T1 + EXP_STEPS * FLOAT32_ROUND
        gain_TD = weight_D / root_T1
        return Exact(h_TD * gain_TD, (error_TD + h_TD.abs() * divisor_T1) * gain_TD.abs())


BoundaryGiven = tuple[Tensor, Tensor, Mix] | tuple[Tensor, Tensor, Mix, Tensor]
"""Streams, output and mix; of an output in two parts the second. Their sum is rounded once, to their dtype."""


def boundary_deviations(
    out: HyperOut, given: "BoundaryGiven | None", mixing: Mixing, norm_weight_D: Tensor
) -> Iterator[tuple[str, Deviation]]:
    """Yields (part, deviation) for each part of one boundary's results.

    given: what the streams are written from; ``None`` in front of the first sublayer.
    """
    if given is not None:
        x_TSD, y_TD, mix, *others = given
        y_TD = sum(others, y_TD)
        yield "streams", deviation(out.x_TSD, write_streams(x_TSD, y_TD, mix.post_TS, mix.comb_TSS))
    if not bool(out.x_TSD.isfinite().all()):
        return
    # The reference reads the boundary's own written streams, so that one error is not counted twice.
    exact = ExactBoundary(out.x_TSD.double(), mixing)
    if out.mix is not None:
        post_TS, comb_TSS = out.mix.post_TS, out.mix.comb_TSS
        yield f"post in {post_TS.dtype}", _wide_deviation(post_TS, exact.post())
        yield f"comb in {comb_TSS.dtype}", _wide_deviation(comb_TSS, exact.comb())
        yield "comb's sums over the streams read", deviation(comb_TSS.double().sum(1), exact.comb_sums())
    yield "normed input", deviation(out.h_TD, exact.normed_input(norm_weight_D, out.h_TD.dtype))


def _wide_deviation(found: Tensor, exact: Exact) -> Deviation:
    """Compares weights that mix streams, which stay at least float32."""
    if found.dtype.itemsize < 4:
        return Deviation(float("inf"), (), 0.0, 0.0)
    return deviation(found, exact)
