"""The sampler's device code: numbers and passes over one row's share of tokens. Its twin is ``ref.sample``.

Every operation on a score or a weight is rounded by itself: launches forbid the compiler to fuse them.
"""

import triton
import triton.language as tl

from ownpath.kernels.sample import numbers as n

CHUNK, LANES = tl.constexpr(n.CHUNK), tl.constexpr(n.LANES)
SQRT_HALF_BITS, LN2 = tl.constexpr(n.SQRT_HALF_BITS), tl.constexpr(n.LN2)
LOG2_E, LN2_HIGH, LN2_LOW = tl.constexpr(n.LOG2_E), tl.constexpr(n.LN2_HIGH), tl.constexpr(n.LN2_LOW)
L1, L2, L3, L4 = (tl.constexpr(term) for term in n.LN_TERMS[1:5])
L5, L6, L7, L8 = (tl.constexpr(term) for term in n.LN_TERMS[5:])
E2, E3, E4, E5, E6 = (tl.constexpr(term) for term in n.EXP_TERMS[2:])
LEAST_EXPONENT, LARGEST = tl.constexpr(n.LEAST_EXPONENT), tl.constexpr(n.LARGEST)
SHIFT = tl.constexpr(n.WEIGHT_BITS - 23)
NO_TOKEN = tl.constexpr(2**31 - 1)
BEST_NOISE = tl.constexpr(22.9)
"""Above the largest value of ``gumbel``."""
COUNT_BITS = tl.constexpr((1 << 30) - 1)
assert n.LN_TERMS[0] == n.EXP_TERMS[0] == n.EXP_TERMS[1] == 1.0


@triton.jit
def _split(y):
    """Returns exponent and mantissa - 1 of positive normal y, with a mantissa around 1."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _ln(exponent, f):
    total = (((f * L8 + L7) * f + L6) * f + L5) * f + L4
    total = (((total * f + L3) * f + L2) * f + L1) * f + 1.0
    return f * total + exponent.to(tl.float32) * LN2


@triton.jit
def least_exponent_of(share):
    """Computes the natural logarithm of a share of the best token's probability."""
    exponent, f = _split(share)
    return _ln(exponent, f)


@triton.jit
def _uniform(words):
    return (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(words):
    """Computes -ln(-ln(1 - v)), v = (word + 1/2) / 2^32."""
    exponent, f = _split(_uniform(words ^ 0xFFFFFFFF))
    f = tl.where(exponent == 0, -_uniform(words), f)
    exponent, f = _split(-_ln(exponent, f))
    return -_ln(exponent, f)


@triton.jit
def weights(z):
    """Computes exp(z) in units of 2^-40 as int64, for z <= 0."""
    z = tl.maximum(z, LEAST_EXPONENT)
    k = tl.floor(z * LOG2_E + 0.5)
    f = (z - k * LN2_HIGH) - k * LN2_LOW
    total = ((((f * E6 + E5) * f + E4) * f + E3) * f + E2) * f + 1.0
    mantissa = ((total * f + 1.0) * 8388608.0).to(tl.int64)
    shift = k.to(tl.int32) + SHIFT
    left, right = tl.maximum(shift, 0), tl.minimum(tl.maximum(-shift, 0), 31)
    return (mantissa << left.to(tl.int64)) >> right.to(tl.int64)


@triton.jit
def token_ids(block, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the tokens that take word ``WORD`` of the block's counters."""
    counter = block * BLOCK + tl.arange(0, BLOCK)
    return counter // LANES * CHUNK + WORD * LANES + counter % LANES


@triton.jit
def bias_places(block, biased, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """Returns the first and the end of a block's places in the row's ascending list of biased tokens."""
    if BIAS:
        first = tl.sum((biased < block * (4 * BLOCK)).to(tl.int32), axis=0)
        return first, tl.sum((biased < (block + 1) * (4 * BLOCK)).to(tl.int32), axis=0)
    return 0, 0


@triton.jit
def load_raw(row_ptr, block, WORD: tl.constexpr, num_vocab, BLOCK: tl.constexpr):
    """Loads the logits of the tokens with word ``WORD``; -infinity outside the vocabulary."""
    ids = token_ids(block, WORD, BLOCK)
    return tl.load(row_ptr + ids, mask=ids < num_vocab, other=float("-inf"))


@triton.jit
def adjusted(raw, ids, num_vocab, how, places, PENALTIES: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr):
    """Returns logits after penalties, then bias, then the mask; -infinity outside the vocabulary.

    how: pointer of counts, whether they are read, presence, frequency, factors for positive and other logits of seen
    tokens, pointers of biased ids, of their values, and of the mask. places: of the block's biased tokens, first and
    end.
    """
    inside = ids < num_vocab
    x = raw
    if PENALTIES:
        entry = tl.load(how[0] + ids, mask=inside & how[1], other=0)
        count = entry & COUNT_BITS
        x = tl.where(entry != 0, x * tl.where(x > 0, how[4], how[5]), x)
        x = x - how[3] * count.to(tl.float32)
        x = tl.where(count > 0, x - how[2], x)
    if BIAS:
        for place in range(places[0], places[1]):
            x = tl.where(ids == tl.load(how[6] + place), x + tl.load(how[7] + place), x)
    if PENALTIES or BIAS:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if MASK:
        word = tl.load(how[8] + ids // 32, mask=inside, other=0)
        x = tl.where((word >> (ids % 32)) & 1 != 0, x, float("-inf"))
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _may_win(x, words, rate, bound):
    """Says which tokens may score at least ``bound``. Noise is at most -ln(v); margins cover every rounding."""
    scaled = x * rate
    # v <= exp(scaled - bound), times 2^32.
    most = tl.exp(scaled + tl.abs(scaled) * 1e-6 - bound + 22.182)
    return (x > float("-inf")) & ~(words.to(tl.float32) > most)


@triton.jit
def _join(score, id, x, words, ids, found, rate):
    """Takes the better of two in every lane. Ids only grow, so that equal scores keep what was there."""
    other = x.to(tl.float64) * rate + gumbel(words).to(tl.float64)
    better = other > score
    return tl.where(better, other, score), tl.where(better, ids, id), tl.where(better, x, found)


@triton.jit
def race(x0, x1, x2, x3, block, seed, index, rate, best, best_id, best_x, BLOCK: tl.constexpr):
    """Returns score, id and logit of the best of a block's tokens and of the best so far.

    x0 to x3: logits by word, -infinity for tokens that are out. Noise is computed exactly only in blocks where a bound
    leaves a token a chance.
    """
    rate32 = rate.to(tl.float32)
    best32 = best.to(tl.float32)
    bound = best32 - tl.abs(best32) * 1e-6
    top = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
    scaled = top * rate32
    if (top > float("-inf")) & ~(scaled + tl.abs(scaled) * 1e-6 + BEST_NOISE < bound):
        counters = block * BLOCK + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = tl.philox(seed, counters, index, 0, 0)
        hope = _may_win(x0, w0, rate32, bound) | _may_win(x1, w1, rate32, bound)
        hope = hope | _may_win(x2, w2, rate32, bound) | _may_win(x3, w3, rate32, bound)
        if tl.max(hope.to(tl.int32), axis=0) > 0:
            score = tl.full((BLOCK,), float("-inf"), tl.float64)
            id = tl.full((BLOCK,), NO_TOKEN, tl.int32)
            found = tl.full((BLOCK,), float("-inf"), tl.float32)
            score, id, found = _join(score, id, x0, w0, token_ids(block, 0, BLOCK), found, rate)
            score, id, found = _join(score, id, x1, w1, token_ids(block, 1, BLOCK), found, rate)
            score, id, found = _join(score, id, x2, w2, token_ids(block, 2, BLOCK), found, rate)
            score, id, found = _join(score, id, x3, w3, token_ids(block, 3, BLOCK), found, rate)
            best, best_id, best_x = better_of(score, id, found, best, best_id, best_x)
    return best, best_id, best_x


@triton.jit
def better_of(score, id, x, best, best_id, best_x):
    """Returns score, id and logit of the best among lanes and the best so far; of equal scores the lower id."""
    top = tl.max(score, axis=0)
    top_id = tl.min(tl.where(score == top, id, NO_TOKEN), axis=0)
    top_x = tl.max(tl.where((score == top) & (id == top_id), x, float("-inf")), axis=0)
    wins = (top > best) | ((top == best) & (top_id < best_id))
    return tl.where(wins, top, best), tl.where(wins, top_id, best_id), tl.where(wins, top_x, best_x)


@triton.jit
def ranks_before(x, ids, other_x, other_id):
    """Says which tokens rank before another: by logit, equal ones by id."""
    return (x > other_x) | ((x == other_x) & (ids < other_id))


@triton.jit
def arrive(counter_ptr):
    """Publishes what this program has stored; returns how many of its row had arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def meet(counter_ptr, target):
    """Publishes what this program has stored and waits for the others of its row, which all run at once."""
    seen = arrive(counter_ptr) + 1
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acq_rel", scope="gpu")
