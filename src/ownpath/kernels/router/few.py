"""Device code of gate and router in one launch; ``route`` explains and launches it.

A group is the tokens of one program, or some of them; its logits come from several programs, and the last of them
to finish chooses for all of its tokens. D hidden, n expert, t token; parts: logits float32 [splits, T, E], to be added.
"""

import triton
import triton.language as tl

from ownpath.kernels.router.choice import experts_of, table_experts, write_best, write_named


@triton.jit
def _arrive(counter_ptr):
    """Publishes what this program has stored; returns how many of its group had arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _tokens(token_ids_ptr, t, in_t, HAS_TOKENS: tl.constexpr):
    """Loads token ids as int64; 0 where none are given."""
    token = tl.zeros_like(t)
    if HAS_TOKENS:
        token = tl.load(token_ids_ptr + t, mask=in_t, other=0).to(tl.int64)
    return token


@triton.jit
def _bias(bias_ptr, in_t, num_experts, E_PAD: tl.constexpr):
    """Loads the bias for each token of a group [T, H, E / H], as its logits will lie."""
    expert = experts_of(E_PAD)
    return tl.load(bias_ptr + expert, mask=in_t[:, None, None] & (expert < num_experts), other=0.0)


@triton.jit
def _choose(
    parts_ptr, bias, named, token, ids_ptr, weights_ptr, factor, t, in_t, num_tokens, num_experts,
    SPLITS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_TOKENS: tl.constexpr,
):  # fmt: skip
    """Adds a group's parts and chooses. Other processors wrote them: a first-level cache may hold older ones."""
    if BY_TOKEN:
        inside = in_t[:, None] & (tl.arange(0, K_PAD) < K)[None, :] & (named >= 0) & (named < num_experts)
        logits = tl.zeros(named.shape, dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * num_tokens + t)[:, None] * num_experts + named
            logits += tl.load(parts_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        write_named(ids_ptr, weights_ptr, named, logits, inside, token, t, in_t, factor, K, K_PAD, HAS_TOKENS)
    else:
        expert = tl.broadcast_to(experts_of(E_PAD), bias.shape)
        token, t, in_t = token[:, None, None], t[:, None, None], in_t[:, None, None]
        inside = in_t & (expert < num_experts)
        logits = tl.zeros(bias.shape, dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * num_tokens + t) * num_experts + expert
            logits += tl.load(parts_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        write_best(
            ids_ptr, weights_ptr, logits, bias, expert, token, t, in_t, num_experts, factor, K, HAS_TOKENS
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def route_few(
    x_ptr, w_ptr, bias_ptr, token_ids_ptr, table_ptr, ids_ptr, weights_ptr, parts_ptr, counters_ptr,
    factor, num_tokens, num_experts, D, vocab_size,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes the logits of EXPERTS experts for GROUP tokens by plain sums; WIDTH columns are a split's.

    The weights are in registers before the input is there.
    """
    split, group = tl.program_id(0) % SPLITS, tl.program_id(1)
    n = tl.program_id(0) // SPLITS * EXPERTS + tl.arange(0, EXPERTS)
    d = split * WIDTH + tl.arange(0, WIDTH)
    in_n, in_d = n < num_experts, d < D
    w = tl.load(w_ptr + n[:, None].to(tl.int64) * D + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
    first = group.to(tl.int64) * GROUP
    t = first + tl.arange(0, GROUP)
    in_t = t < num_tokens
    token = _tokens(token_ids_ptr, t, in_t, HAS_TOKENS)
    bias, named = 0.0, 0
    if BY_TOKEN:
        named = table_experts(table_ptr, token, in_t, vocab_size, K, K_PAD)
    else:
        bias = _bias(bias_ptr, in_t, num_experts, E_PAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    wide = w.to(tl.float32)
    for i in tl.static_range(GROUP):
        row = first + i
        x = tl.load(x_ptr + row * D + d, mask=in_d & (row < num_tokens), other=0.0).to(tl.float32)
        sums = tl.sum(wide * x[None, :], axis=1)
        tl.store(parts_ptr + (split * num_tokens + row) * num_experts + n, sums, mask=in_n & (row < num_tokens))
    if _arrive(counters_ptr + group) == tl.num_programs(0) - 1:
        tl.store(counters_ptr + group, 0)
        _choose(
            parts_ptr, bias, named, token, ids_ptr, weights_ptr, factor, t, in_t, num_tokens, num_experts,
            SPLITS, K, K_PAD, E_PAD, BY_TOKEN, HAS_TOKENS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def route_some(
    x_ptr, w_ptr, bias_ptr, token_ids_ptr, table_ptr, ids_ptr, weights_ptr, parts_ptr, counters_ptr,
    factor, num_tokens, num_experts, D, vocab_size,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, SLICES: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes the same by tensor cores. A split's columns are SLICES products side by side, one or more a warp."""
    split, group = tl.program_id(0) % SPLITS, tl.program_id(1)
    n = tl.program_id(0) // SPLITS * EXPERTS + tl.arange(0, EXPERTS)
    in_n = n < num_experts
    STEP: tl.constexpr = WIDTH // SLICES
    slice_at = split * WIDTH + tl.arange(0, SLICES)[:, None, None] * STEP
    k = slice_at + tl.arange(0, STEP)[None, :, None]
    in_w = in_n[None, None, :] & (k < D)
    w = tl.load(w_ptr + n[None, None, :].to(tl.int64) * D + k, mask=in_w, other=0.0)
    t = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    in_t = t < num_tokens
    token = _tokens(token_ids_ptr, t, in_t, HAS_TOKENS)
    bias, named = 0.0, 0
    if BY_TOKEN:
        named = table_experts(table_ptr, token, in_t, vocab_size, K, K_PAD)
    else:
        bias = _bias(bias_ptr, in_t, num_experts, E_PAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    d = slice_at + tl.arange(0, STEP)[None, None, :]
    x = tl.load(x_ptr + t[None, :, None] * D + d, mask=in_t[None, :, None] & (d < D), other=0.0)
    sums = tl.sum(tl.dot(x, w, out_dtype=tl.float32), axis=0)
    at = (split * num_tokens + t)[:, None] * num_experts + n[None, :]
    tl.store(parts_ptr + at, sums, mask=in_t[:, None] & in_n[None, :])
    if _arrive(counters_ptr + group) == tl.num_programs(0) - 1:
        tl.store(counters_ptr + group, 0)
        _choose(
            parts_ptr, bias, named, token, ids_ptr, weights_ptr, factor, t, in_t, num_tokens, num_experts,
            SPLITS, K, K_PAD, E_PAD, BY_TOKEN, HAS_TOKENS,
        )  # fmt: skip
