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
def _better(ranked, expert, scores, other_ranked, other_expert, other_scores):
    wins = (ranked > other_ranked) | ((ranked == other_ranked) & (expert < other_expert))
    best = tl.where(wins, ranked, other_ranked)
    return best, tl.where(wins, expert, other_expert), tl.where(wins, scores, other_scores)


@triton.jit
def best_experts(logits, bias, num_experts, K: tl.constexpr, K_PAD: tl.constexpr):
    """Chooses the experts with the largest scores plus bias, the lower id at a tie. Returns ids and scores [T, K_PAD].

    Shapes: logits [T, E]; bias [E]. Scores beyond the K-th are 0.
    """
    k = tl.arange(0, K_PAD)[None, :]
    scores = score(logits)
    expert = tl.broadcast_to(tl.arange(0, logits.shape[1])[None, :], logits.shape)
    left = tl.where(expert < num_experts, scores + bias[None, :], float("-inf"))
    chosen = tl.zeros((logits.shape[0], K_PAD), dtype=tl.int32)
    found = tl.zeros((logits.shape[0], K_PAD), dtype=tl.float32)
    for round_idx in tl.static_range(K):
        _, best, its_score = tl.reduce((left, expert, scores), 1, _better)
        best = tl.minimum(best, num_experts - 1)
        chosen = tl.where(k == round_idx, best[:, None], chosen)
        found = tl.where(k == round_idx, its_score[:, None], found)
        left = tl.where(expert == best[:, None], float("-inf"), left)
    return chosen, found


@triton.jit
def table_experts(table_ptr, token, in_t, vocab_size, K: tl.constexpr, K_PAD: tl.constexpr):
    """Looks the experts of each token up: ids [T, K_PAD], 0 for a token that the table does not have."""
    k = tl.arange(0, K_PAD)[None, :]
    known = in_t & (token >= 0) & (token < vocab_size)
    return tl.load(table_ptr + token[:, None] * K + k, mask=(k < K) & known[:, None], other=0).to(tl.int32)


@triton.jit
def write_choice(
    ids_ptr, weights_ptr, chosen, scores, token, t, in_t, factor,
    K: tl.constexpr, K_PAD: tl.constexpr, HAS_TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes each token's experts and weights, whose sum is ``factor``; a padded row gets expert -1 and weight 0."""
    k = tl.arange(0, K_PAD)[None, :]
    total = tl.where(in_t, tl.sum(scores, axis=1), 1.0)
    weights = scores / total[:, None] * factor
    if HAS_TOKENS:
        is_padded = (token < 0)[:, None]
        chosen = tl.where(is_padded, -1, chosen)
        weights = tl.where(is_padded, 0.0, weights)
    at, inside = t[:, None] * K + k, in_t[:, None] & (k < K)
    tl.store(ids_ptr + at, chosen.to(ids_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_ptr + at, weights, mask=inside)
