"""Device code that chooses experts by their logits. T tokens of a tile, E experts, K chosen experts of a token."""

import triton
import triton.language as tl


@triton.jit
def score(logits):
    """Computes sqrt(softplus(x)). softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|) in (0, 1].

    log1p(e) = 2 atanh(z), z = e / (2 + e) <= 1/3: an odd series whose first dropped term is below 3^-20 / 21 of z.
    """
    e = tl.exp(-tl.abs(logits))
    z = e / (2.0 + e)
    q = z * z
    series = 1.0 / 15.0 + q * (1.0 / 17.0 + q * (1.0 / 19.0))
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * series))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * series)))
    return tl.sqrt(tl.maximum(logits, 0.0) + 2.0 * z * series)


@triton.jit
def experts_of(E_PAD: tl.constexpr):
    """Returns expert ids [1, H, E / H], 128 in a row: of a tile [T, H, E / H], a warp then has whole tokens."""
    WIDTH: tl.constexpr = 128 if E_PAD > 128 else E_PAD
    return tl.arange(0, E_PAD // WIDTH)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _largest(keys):
    """Returns the largest key of each token [T, 1, 1]."""
    return tl.max(tl.max(keys, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def write_best(
    ids_ptr, weights_ptr, logits, bias, expert, token, t, in_t, num_experts, factor,
    K: tl.constexpr, HAS_TOKENS: tl.constexpr,
):  # fmt: skip
    """Chooses the experts with the largest scores plus bias, the lower id at a tie, and writes them in this order.

    Shapes: logits, bias, expert [T, H, E / H]; token ids, t and in_t [T, 1, 1]. Ranks are compared as integers of the
    same order, which a warp reduces in one instruction; nothing leaves the tile, so that warps do not wait for each
    other.
    """
    LEAST: tl.constexpr = -(2**31)
    scores = score(logits)
    bits = (scores + bias).to(tl.int32, bitcast=True)
    keys = tl.where(expert < num_experts, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)
    place = tl.full(keys.shape, -1, tl.int32)
    for round_idx in tl.static_range(K):
        top = _largest(keys)
        best = -_largest(tl.where(keys == top, -expert, LEAST))
        place = tl.where(expert == best, round_idx, place)
        keys = tl.where(expert == best, LEAST, keys)
    chosen = tl.where(place >= 0, scores, 0.0)
    weights = chosen / tl.sum(tl.sum(chosen, axis=1, keep_dims=True), axis=2, keep_dims=True) * factor
    if HAS_TOKENS:
        expert = tl.where(token < 0, -1, expert)
        weights = tl.where(token < 0, 0.0, weights)
    at, inside = t * K + place, in_t & (place >= 0)
    tl.store(ids_ptr + at, expert.to(ids_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_ptr + at, weights, mask=inside)


@triton.jit
def table_experts(table_ptr, token, in_t, vocab_size, K: tl.constexpr, K_PAD: tl.constexpr):
    """Looks the experts of each token up: ids [T, K_PAD], 0 for a token that the table does not have."""
    k = tl.arange(0, K_PAD)[None, :]
    known = in_t & (token >= 0) & (token < vocab_size)
    return tl.load(table_ptr + token[:, None] * K + k, mask=(k < K) & known[:, None], other=0).to(tl.int32)


@triton.jit
def write_named(
    ids_ptr, weights_ptr, named, logits, inside, token, t, in_t, factor,
    K: tl.constexpr, K_PAD: tl.constexpr, HAS_TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the experts that a table names, and their weights. inside: where there is an expert of this id.

    Shapes: named, logits, inside [T, K_PAD]; token ids, t and in_t [T].
    """
    k = tl.arange(0, K_PAD)[None, :]
    scores = tl.where(inside, score(logits), 0.0)
    total = tl.where(in_t, tl.sum(scores, axis=1), 1.0)
    weights = scores / total[:, None] * factor
    if HAS_TOKENS:
        is_padded = (token < 0)[:, None]
        named = tl.where(is_padded, -1, named)
        weights = tl.where(is_padded, 0.0, weights)
    at, is_chosen = t[:, None] * K + k, in_t[:, None] & (k < K)
    tl.store(ids_ptr + at, named.to(ids_ptr.dtype.element_ty), mask=is_chosen)
    tl.store(weights_ptr + at, weights, mask=is_chosen)
