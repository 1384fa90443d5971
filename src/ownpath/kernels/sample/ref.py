"""Torch definition of the sampler: every number in it is the kernel's, bit for bit, on every device.

Drawing is an exponential race in its Gumbel form: the token with the largest ``x / temperature + g`` wins, where ``g``
is Gumbel noise from Philox, keyed by the row's seed, its output index and the token id.

Legend: T rows, V tokens; D rows that draw; N Philox blocks.
"""

from typing import NamedTuple

import torch

from ownpath.kernels.reference import Reference
from ownpath.kernels.sample.numbers import (
    CHUNK,
    EXP_TERMS,
    LANES,
    LARGEST,
    LEAST_EXPONENT,
    LEAST_SHARE,
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LN_TERMS,
    LOG2_E,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    SQRT_HALF_BITS,
    WEIGHT_BITS,
)
from ownpath.kernels.sample.types import (
    FAULT_NON_FINITE,
    FAULT_NOTHING_ALLOWED,
    IN_PROMPT,
    LEAST_TEMPERATURE,
    BiasRows,
    FilterRows,
    NextStep,
    PenaltyRows,
    Sampled,
    SampleRows,
)

MASK32 = 0xFFFFFFFF


def philox_words(seed_T: torch.Tensor, index_T: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Returns words [4, T, num_blocks] in [0, 2^32) of the counters (block, output index, 0, 0), keyed by the seed."""
    device = seed_T.device
    multipliers = torch.tensor(PHILOX_MULTIPLIERS, device=device).view(2, 1, 1)
    steps = torch.arange(PHILOX_ROUNDS, device=device).view(-1, 1, 1, 1)
    weyl = torch.tensor(PHILOX_WEYL, device=device).view(2, 1, 1)
    keys = torch.stack((seed_T, seed_T >> 32)).unsqueeze(-1) + steps * weyl
    blocks = torch.arange(num_blocks, device=device).expand(len(seed_T), -1)
    even = torch.stack((blocks, torch.zeros_like(blocks)))
    odd = torch.stack((index_T.long(), torch.zeros_like(seed_T))).unsqueeze(-1)
    for key in keys:
        # A product is below 2^64: in int64 it may wrap, but its bits are right. Above 32 bits, odd and key are noise.
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK32)
        odd = product
    odd = odd & MASK32
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def _horner(terms: tuple[float, ...], f: torch.Tensor) -> torch.Tensor:
    total = f * terms[-1]
    for term in terms[-2:0:-1]:
        total = total.add_(term).mul_(f)
    return total.add_(terms[0])


def _split(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns exponent (int32) and mantissa - 1 of positive normal y, with a mantissa around 1."""
    bits = y.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return exponent, (bits - (exponent << 23)).view(torch.float32) - 1.0


def _ln(exponent: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return f * _horner(LN_TERMS, f) + exponent.float() * LN2


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Returns float32 -ln(-ln(1 - v)) for v = (word + 1/2) / 2^32: the smallest words give the largest values."""
    exponent, f = _split(((words ^ MASK32).float() + 0.5) * 2.0**-32)
    # 1 - v has lost the low bits of a small v, which decide between winners.
    f = torch.where(exponent == 0, (words.float() + 0.5) * -(2.0**-32), f)
    return -_ln(*_split(-_ln(exponent, f)))


def quick_gumbel(words: torch.Tensor) -> torch.Tensor:
    """Returns ``gumbel`` within 1e-5, by torch's logarithms, which differ from device to device."""
    low, high = (words.float() + 0.5) * 2.0**-32, ((words ^ MASK32).float() + 0.5) * 2.0**-32
    return -torch.where(low < 0.5, torch.log1p(-low), high.log()).neg_().log_()


def words_of(seed_T: torch.Tensor, index_T: torch.Tensor, num_vocab: int) -> torch.Tensor:
    """Returns the word [T, V] of each row's tokens."""
    if num_vocab <= LANES:
        return philox_words(seed_T, index_T, num_vocab)[0]
    num_chunks = -(-num_vocab // CHUNK)
    words = philox_words(seed_T, index_T, num_chunks * LANES).unflatten(-1, (num_chunks, LANES))
    words_TV: torch.Tensor = words.permute(1, 2, 0, 3).reshape(len(seed_T), -1)[:, :num_vocab]
    return words_TV


def adjusted(logits_TV: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """Returns the logits after penalties, then bias, then mask; what the mask forbids is -infinity."""
    if rows.penalties is None and rows.bias is None and rows.mask_TW is None:
        return logits_TV
    x_TV = logits_TV
    if rows.penalties is not None and (rows.penalties.table_T >= 0).any():
        x_TV = _penalized(x_TV, rows.penalties)
    if rows.bias is not None and rows.bias.counts_T.any():
        x_TV = _biased(x_TV, rows.bias)
    x_TV = x_TV.clamp(-LARGEST, LARGEST)
    if rows.mask_TW is None:
        return x_TV
    places = torch.arange(32, dtype=torch.int32, device=x_TV.device)
    bits = torch.bitwise_right_shift(rows.mask_TW.unsqueeze(-1), places) & 1
    return x_TV.masked_fill(bits.flatten(1)[:, : x_TV.shape[1]] == 0, float("-inf"))


def _penalized(logits_TV: torch.Tensor, penalties: PenaltyRows) -> torch.Tensor:
    table_T = penalties.table_T.long()
    entries_TV = penalties.tables_RV[table_T.clamp(min=0)].masked_fill((table_T < 0).unsqueeze(-1), 0)
    count_TV = entries_TV & (IN_PROMPT - 1)
    repetition_T = penalties.repetition_T.double()
    factor_TV = torch.where(logits_TV > 0, _column(1.0 / repetition_T), _column(repetition_T))
    x_TV = torch.where(entries_TV != 0, logits_TV * factor_TV, logits_TV)
    x_TV = x_TV - _column(penalties.frequency_T) * count_TV.float()
    return torch.where(count_TV > 0, x_TV - _column(penalties.presence_T), x_TV)


def _biased(x_TV: torch.Tensor, bias: BiasRows) -> torch.Tensor:
    used_TK = torch.arange(bias.ids_TK.shape[1], device=x_TV.device) < bias.counts_T.unsqueeze(-1)
    ids_TK = bias.ids_TK.long().masked_fill(~used_TK, 0)
    return x_TV.scatter_add(1, ids_TK, bias.values_TK.masked_fill(~used_TK, 0.0))


def _column(values_T: torch.Tensor) -> torch.Tensor:
    return values_T.float().unsqueeze(-1)


def weights(z: torch.Tensor) -> torch.Tensor:
    """Returns exp(z) in units of 2^-40 as int64, for z <= 0."""
    z = z.clamp(min=LEAST_EXPONENT)
    n = (z * LOG2_E + 0.5).floor()
    mantissa = (_horner(EXP_TERMS, (z - n * LN2_HIGH) - n * LN2_LOW) * 2.0**23).to(torch.int64)
    shift = n.to(torch.int64) + (WEIGHT_BITS - 23)
    return (mantissa << shift.clamp(min=0)) >> (-shift).clamp(0, 31)


class _Draws(NamedTuple):
    """Rows that draw. scores_DV float64: x / temperature + noise, -infinity for tokens that are out."""

    x_DV: torch.Tensor
    words_DV: torch.Tensor
    rate_D: torch.Tensor
    scores_DV: torch.Tensor

    def of(self, which: torch.Tensor) -> "_Draws":
        return _Draws(*(part[which] for part in self))


def _start(x_DV: torch.Tensor, rows: SampleRows) -> _Draws:
    words_DV = words_of(rows.seed_T, rows.index_T, x_DV.shape[1])
    rate_D = 1.0 / rows.temperature_T.double()
    return _Draws(x_DV, words_DV, rate_D, x_DV.double() * rate_D.unsqueeze(-1) + quick_gumbel(words_DV))


def _winners(draws: _Draws) -> torch.Tensor:
    """Returns the tokens with the best exact scores: quick scores decide unless two are closer than they can tell."""
    scores_DV = draws.scores_DV
    best_D1 = scores_DV.amax(dim=-1, keepdim=True)
    near_DV = scores_DV >= best_D1 - (1e-4 + best_D1.abs() * 1e-14)
    if near_DV.sum() > len(scores_DV):
        d, i = near_DV.nonzero(as_tuple=True)
        exact = draws.x_DV[d, i].double() * draws.rate_D[d] + gumbel(draws.words_DV[d, i]).double()
        scores_DV = torch.full_like(scores_DV, float("-inf")).index_put_((d, i), exact)
    return scores_DV.argmax(dim=-1)


def _before(x_DV: torch.Tensor, token_D: torch.Tensor) -> torch.Tensor:
    """Returns bool [D, V]: tokens that rank before the row's given one, by logit, equal ones by id."""
    x_D1 = x_DV.gather(1, token_D.unsqueeze(-1))
    is_lower = torch.arange(x_DV.shape[1], device=x_DV.device) < token_D.unsqueeze(-1)
    return (x_DV > x_D1) | ((x_DV == x_D1) & is_lower)


def _exponents(x_DV: torch.Tensor, rate_D: torch.Tensor) -> torch.Tensor:
    return (x_DV - x_DV.amax(dim=-1, keepdim=True)) * _column(rate_D)


def _are_kept(draws: _Draws, token_D: torch.Tensor, before_DV: torch.Tensor, filters: FilterRows) -> torch.Tensor:
    """Returns bool [D]: whether the filters keep these tokens. They always keep the first in rank."""
    exponents_DV = _exponents(draws.x_DV, draws.rate_D)
    kept_D = (filters.top_k_T <= 0) | (before_DV.sum(-1) < filters.top_k_T)
    kept_D &= _in_nucleus(exponents_DV, before_DV, filters.top_p_T)
    if (filters.min_p_T > 0).any():
        least_D = _ln(*_split(filters.min_p_T.clamp(min=LEAST_SHARE)))
        kept_D &= (filters.min_p_T <= 0) | (exponents_DV.gather(1, token_D.unsqueeze(-1)).squeeze(-1) >= least_D)
    return kept_D | ~before_DV.any(-1)


def _in_nucleus(exponents_DV: torch.Tensor, before_DV: torch.Tensor, top_p_D: torch.Tensor) -> torch.Tensor:
    """Returns bool [D]: whether ``before`` weighs less than ``top_p`` of all; exact weights decide what is close."""
    quick_DV = exponents_DV.exp()
    excess_D = (quick_DV * before_DV).sum(-1) / quick_DV.sum(-1) - top_p_D
    if (excess_D.abs() < 1e-4).any():
        weights_DV = weights(exponents_DV)
        limit_D = weights_DV.sum(-1).double() * top_p_D.double()
        return (top_p_D >= 1) | ((weights_DV * before_DV).sum(-1).double() < limit_D)
    return (top_p_D >= 1) | (excess_D < 0)


def _filter_any(filters: FilterRows) -> bool:
    return bool(((filters.top_k_T > 0) | (filters.top_p_T < 1) | (filters.min_p_T > 0)).any())


def _drawn(x_DV: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """Draws among all tokens until one is kept. What ranks behind a token that is out is out too."""
    draws, filters = _start(x_DV, rows), rows.filters
    token_D = _winners(draws)
    if filters is None or not _filter_any(filters):
        return token_D
    left = torch.arange(len(token_D), device=x_DV.device)
    while True:
        before_DV = _before(draws.x_DV, token_D[left])
        out = ~_are_kept(draws, token_D[left], before_DV, filters)
        left = left[out]
        if not len(left):
            return token_D
        draws, filters = draws.of(out), FilterRows(*(part[out] for part in filters))
        draws.scores_DV.masked_fill_(~before_DV[out], float("-inf"))
        token_D[left] = _winners(draws)


def _rows_of(rows: SampleRows, which: torch.Tensor) -> SampleRows:
    filters = None if rows.filters is None else FilterRows(*(part[which] for part in rows.filters))
    return SampleRows(rows.temperature_T[which], rows.seed_T[which], rows.index_T[which], filters)


def sample(logits_TV: torch.Tensor, rows: SampleRows, out: Sampled | None = None) -> Sampled:
    """Chooses a token for each row: a drawn one, or where the temperature is 0 the likeliest, the lower id on ties."""
    if rows.place_T is not None:
        assert out is not None, "results that have places need somewhere to be"
        return _sample_placed(logits_TV, rows._replace(place_T=None), rows.place_T.long(), out)
    logits_TV = logits_TV.float()
    x_TV = adjusted(logits_TV, rows)
    token_T = x_TV.argmax(dim=-1)
    fault_T = (~logits_TV.isfinite().all(dim=-1)).long() * FAULT_NON_FINITE
    if rows.mask_TW is not None:
        barred_T = x_TV.amax(dim=-1).isneginf() & (fault_T == 0)
        fault_T = fault_T.masked_fill(barred_T, FAULT_NOTHING_ALLOWED)
    drawing = ((rows.temperature_T >= LEAST_TEMPERATURE) & (fault_T == 0)).nonzero().squeeze(-1)
    if len(drawing) == len(token_T) > 0:
        token_T = _drawn(x_TV, rows)
    elif len(drawing):
        token_T[drawing] = _drawn(x_TV[drawing], _rows_of(rows, drawing))
    token_T.masked_fill_(fault_T != 0, 0)
    if out is None:
        return Sampled(token_T, fault_T)
    out.token_T.copy_(token_T)
    out.fault_T.copy_(fault_T)
    if out.logprob_T is not None:
        out.logprob_T.copy_(logits_TV.log_softmax(-1).gather(1, token_T.unsqueeze(-1)).squeeze(-1))
    return out


def _sample_placed(logits_RV: torch.Tensor, rows: SampleRows, place_T: torch.Tensor, out: Sampled) -> Sampled:
    logprob_T = None if out.logprob_T is None else out.logprob_T[place_T]
    found = Sampled(out.token_T[place_T], out.fault_T[place_T], logprob_T)
    sample(logits_RV[place_T], rows, found)
    for whole, part in zip(out, found, strict=True):
        if whole is not None and part is not None:
            whole.index_copy_(0, place_T, part)
    return out


def go_on(found: Sampled, following: NextStep, place_T: torch.Tensor | None = None) -> None:
    """Writes where the rows of a step go on: all of them, or those with places, which have been counted."""
    assert found.logprob_T is not None, "a step's results have log-probs"
    count = len(found.token_T)
    chosen_T = torch.arange(count, device=found.token_T.device) if place_T is None else place_T.long()
    columns_NT = following.results_NW[:, chosen_T]
    own = found.token_T.int(), found.fault_T.int(), found.logprob_T.view(torch.int32)
    columns_NT[: len(own)] = torch.stack(own)[:, chosen_T]
    pad_T, turn_T = following.pad_W[chosen_T], following.turn_W[chosen_T]
    if place_T is None:
        following.turn_W[chosen_T] = 1 - turn_T
        following.counts_2W[:, chosen_T] += 1 + pad_T
    else:
        turn_T = 1 - turn_T
    following.token_W[chosen_T] = columns_NT[0] | pad_T
    shared_2NW = following.shared_2NW
    turn_T, chosen_T, columns_NT = (part.to(shared_2NW.device) for part in (turn_T, chosen_T, columns_NT))
    shared_2NW[turn_T.long(), :, chosen_T] = columns_NT.T


class SampleReference(Reference):
    """``sample`` as a kernel."""

    def prepare(self) -> None:
        """Returns nothing: calls share nothing."""

    def variant(self, logits_TV: torch.Tensor, rows: SampleRows, operand: None) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        logits_TV: torch.Tensor,
        rows: SampleRows,
        operand: None,
        *,
        out: Sampled | None = None,
        following: NextStep | None = None,
    ) -> Sampled:
        """Computes ``sample`` and ``go_on``."""
        found = sample(logits_TV, rows, out)
        if following is not None:
            go_on(found, following, rows.place_T)
        return found


SAMPLE = SampleReference()
