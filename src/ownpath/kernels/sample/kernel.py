"""The sampler's kernel: programs of one row share its tokens, publish what they found, and the last one finishes.

How it works. One pass finds whether all logits are finite, the likeliest token, and the winner of the draw. A greedy
row and a row without filters are done then. A row with filters tests its winner instead of sorting: a token is kept if
few enough tokens, with little enough weight, rank before it, which one pass tells. If it is out, everything behind it
is out too, and the draw is repeated before it; the same pass tests the middle of what is undecided, so that few rounds
are needed whatever the distribution. Weights are integers, so no sum depends on its order.
"""

import triton
import triton.language as tl

from ownpath.kernels.sample.device import (
    LARGEST,
    NO_TOKEN,
    adjusted,
    arrive,
    better_of,
    bias_places,
    least_exponent_of,
    load_raw,
    meet,
    race,
    ranks_before,
    token_ids,
    weights,
)

MAX_SPLITS, NUM_REALS, NUM_WHOLES = 128, 5, 8
MOST, NUM_R, NUM_W = tl.constexpr(MAX_SPLITS), tl.constexpr(NUM_REALS), tl.constexpr(NUM_WHOLES)
BEST, BEST_X, MAX_X, RAW_MAX, RAW_SUM = (tl.constexpr(field) for field in range(NUM_REALS))
BEST_ID, MAX_ID, BAD, COUNT, MASS, COUNT_MIDDLE, MASS_MIDDLE, TOTAL = (
    tl.constexpr(field) for field in range(NUM_WHOLES)
)


@triton.jit
def _partials(ptr, FIELD: tl.constexpr, splits, other):
    """Loads one field of all programs of the row, past the first-level cache: they wrote it during this launch."""
    split = tl.arange(0, MOST)
    return tl.load(ptr + FIELD * MOST + split, mask=split < splits, other=other, cache_modifier=".cg")


@triton.jit
def _total(ptr, FIELD: tl.constexpr, splits):
    return tl.sum(_partials(ptr, FIELD, splits, 0), axis=0)


@triton.jit
def _put(ptr, FIELD: tl.constexpr, split, value):
    tl.store(ptr + FIELD * MOST + split, value.to(ptr.dtype.element_ty))


@triton.jit
def _race_winner(reals_ptr, wholes_ptr, splits):
    """Returns the best score's id and logit among all programs of the row."""
    scores = _partials(reals_ptr, BEST, splits, float("-inf"))
    ids = _partials(wholes_ptr, BEST_ID, splits, NO_TOKEN).to(tl.int32)
    found = _partials(reals_ptr, BEST_X, splits, float("-inf")).to(tl.float32)
    least = tl.full((), float("-inf"), tl.float64)
    _best, id, x = better_of(scores, ids, found, least, NO_TOKEN, float("-inf"))
    return id, x


@triton.jit
def _likeliest(reals_ptr, wholes_ptr, splits):
    """Returns the row's largest logit and its first token, and the row's fault."""
    tops = _partials(reals_ptr, MAX_X, splits, float("-inf"))
    top = tl.max(tops, axis=0)
    id = tl.min(tl.where(tops == top, _partials(wholes_ptr, MAX_ID, splits, NO_TOKEN), NO_TOKEN), axis=0).to(tl.int32)
    bad = tl.max(_partials(wholes_ptr, BAD, splits, 0), axis=0)
    fault = tl.where(bad > 0, 1, tl.where(top == float("-inf"), 2, 0))
    return top.to(tl.float32), id, fault.to(tl.int32)


@triton.jit
def _go_on(following, place, token, fault, logprob, FIELDS: tl.constexpr, PLACED: tl.constexpr):
    """Writes what the next step and the host read of a row. Only this program writes the row's column."""
    token_ptr, pad_ptr, counts_ptr, turn_ptr, results_ptr, shared_ptr, num_fields, width = following
    pad, turn = tl.load(pad_ptr + place), tl.load(turn_ptr + place)
    position, drawn = tl.load(counts_ptr + place), tl.load(counts_ptr + width + place)
    tl.debug_barrier()  # one thread writes below what all have read above
    if PLACED:
        turn = 1 - turn
    else:
        tl.store(turn_ptr + place, 1 - turn)
        tl.store(counts_ptr + place, position + pad + 1)
        tl.store(counts_ptr + width + place, drawn + pad + 1)
    tl.store(token_ptr + place, token | pad)
    shared_ptr += turn * num_fields * width + place
    tl.store(shared_ptr, token)
    tl.store(shared_ptr + width, fault)
    tl.store(shared_ptr + 2 * width, logprob.to(tl.int32, bitcast=True))
    fields = tl.arange(0, FIELDS)
    others = (fields >= 3) & (fields < num_fields)
    found = tl.load(results_ptr + fields * width + place, mask=others)
    tl.store(shared_ptr + fields * width, found, mask=others)


@triton.jit
def _finish(
    outs,
    following,
    place,
    row_ptr,
    token,
    fault,
    reals_ptr,
    splits,
    LOGPROB: tl.constexpr,
    FIELDS: tl.constexpr,
    PLACED: tl.constexpr,
):
    token = tl.where(fault != 0, 0, token)
    tl.store(outs[0] + place, token.to(outs[0].dtype.element_ty))
    tl.store(outs[1] + place, fault.to(outs[1].dtype.element_ty))
    if LOGPROB:
        tops = _partials(reals_ptr, RAW_MAX, splits, float("-inf"))
        top = tl.max(tops, axis=0)
        scaled = _partials(reals_ptr, RAW_SUM, splits, 0.0) * tl.exp((tops - top).to(tl.float32)).to(tl.float64)
        total = tl.sum(scaled, axis=0).to(tl.float32)
        logprob = tl.load(row_ptr + token) - top.to(tl.float32) - tl.log(total)
        tl.store(outs[2] + place, logprob)
        if FIELDS:
            _go_on(following, place, token, fault, logprob, FIELDS, PLACED)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def sample_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    index_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tables_ptr,
    table_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    bias_counts_ptr,
    mask_ptr,
    place_ptr,
    token_ptr,
    fault_ptr,
    logprob_ptr,
    next_ptr,
    pad_ptr,
    counts_ptr,
    turn_ptr,
    results_ptr,
    shared_ptr,
    counters_ptr,
    reals_ptr,
    wholes_ptr,
    pitch,
    num_vocab,
    num_rows,
    num_places,
    splits,
    num_fields,
    width,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    FILTERS: tl.constexpr,
    PENALTIES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PLACED: tl.constexpr,
    LOGPROB: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Chooses one row's token. Program (split, row) has blocks split, split + splits, ... of 4 * BLOCK tokens.

    FIELDS: a power of two with room for a row's results, 0 where no step follows.
    """
    split, t = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = t
    if PLACED:
        place = tl.load(place_ptr + t)
    row_ptr = logits_ptr + place.to(tl.int64) * pitch
    # Logits are asked for a block ahead of their use, the first before anything else.
    next0 = load_raw(row_ptr, split, 0, num_vocab, BLOCK)
    next1 = load_raw(row_ptr, split, 1, num_vocab, BLOCK)
    next2 = load_raw(row_ptr, split, 2, num_vocab, BLOCK)
    next3 = load_raw(row_ptr, split, 3, num_vocab, BLOCK)
    arrived_ptr, left_ptr = counters_ptr + t, counters_ptr + num_rows + t
    reals_ptr += t * (NUM_R * MOST)
    wholes_ptr += t * (NUM_W * MOST)
    num_blocks = tl.cdiv(num_vocab, 4 * BLOCK)
    temperature, seed, index = tl.load(temperature_ptr + t), tl.load(seed_ptr + t), tl.load(index_ptr + t)
    draws = temperature >= 1e-30
    rate = 1.0 / tl.where(draws, temperature, 1.0).to(tl.float64)
    outs = (token_ptr, fault_ptr, logprob_ptr)
    following = (next_ptr, pad_ptr, counts_ptr, turn_ptr, results_ptr, shared_ptr, num_fields, width)

    presence, frequency, shrinks, grows, punishes = 0.0, 0.0, 1.0, 1.0, draws
    if PENALTIES:
        table = tl.load(table_ptr + t)
        punishes = table >= 0
        tables_ptr += tl.maximum(table, 0).to(tl.int64) * num_vocab
        presence, frequency = tl.load(presence_ptr + t), tl.load(frequency_ptr + t)
        grows = tl.load(repetition_ptr + t)
        shrinks = (1.0 / grows.to(tl.float64)).to(tl.float32)
    biased = index
    if BIAS:
        places = tl.arange(0, PLACES)
        bias_ids_ptr += t * num_places
        bias_values_ptr += t * num_places
        biased = tl.load(bias_ids_ptr + places, mask=places < tl.load(bias_counts_ptr + t), other=NO_TOKEN)
    if MASK:
        mask_ptr += t.to(tl.int64) * tl.cdiv(num_vocab, 32)
    seen = (tables_ptr, punishes, presence, frequency, shrinks, grows)
    how = seen + (bias_ids_ptr, bias_values_ptr, mask_ptr)  # noqa: RUF005 - Triton knows no starred tuples

    top_k, top_p, min_p, tests = 0, temperature, temperature, t < 0
    if FILTERS:
        top_k, top_p, min_p = tl.load(top_k_ptr + t), tl.load(top_p_ptr + t), tl.load(min_p_ptr + t)
        tests = draws & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))

    # The first pass.
    best = tl.full((), float("-inf"), tl.float64)
    best_id, best_x = tl.full((), NO_TOKEN, tl.int32), tl.full((), float("-inf"), tl.float32)
    is_bad = tl.zeros((BLOCK,), tl.int32)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_ids = tl.full((BLOCK,), NO_TOKEN, tl.int32)
    raw_tops = tl.full((BLOCK,), -LARGEST, tl.float32)
    raw_sums = tl.zeros((BLOCK,), tl.float32)
    for block in range(split, num_blocks, splits):
        held = bias_places(block, biased, BLOCK, BIAS)
        x0, x1, x2, x3 = next0, next1, next2, next3
        next0 = load_raw(row_ptr, block + splits, 0, num_vocab, BLOCK)
        next1 = load_raw(row_ptr, block + splits, 1, num_vocab, BLOCK)
        next2 = load_raw(row_ptr, block + splits, 2, num_vocab, BLOCK)
        next3 = load_raw(row_ptr, block + splits, 3, num_vocab, BLOCK)
        for word in tl.static_range(4):
            ids = token_ids(block, word, BLOCK)
            raw = x0
            if word == 1:
                raw = x1
            elif word == 2:
                raw = x2
            elif word == 3:
                raw = x3
            x = adjusted(raw, ids, num_vocab, how, held, PENALTIES, BIAS, MASK)
            is_bad |= ((ids < num_vocab) & ~(tl.abs(raw) <= LARGEST)).to(tl.int32)
            above = x > tops
            top_ids = tl.where(above, ids, top_ids)
            tops = tl.where(above, x, tops)
            if LOGPROB:
                # Of the two weights under the new maximum one is 1, so that one exponential gives both.
                lesser = tl.exp(-tl.abs(raw - raw_tops))
                raw_sums = tl.where(raw > raw_tops, raw_sums * lesser + 1.0, raw_sums + lesser)
                raw_tops = tl.maximum(raw_tops, raw)
            if word == 0:
                x0 = x
            elif word == 1:
                x1 = x
            elif word == 2:
                x2 = x
            else:
                x3 = x
        if draws:
            best, best_id, best_x = race(x0, x1, x2, x3, block, seed, index, rate, best, best_id, best_x, BLOCK)
    top = tl.max(tops, axis=0)
    _put(reals_ptr, MAX_X, split, top)
    _put(wholes_ptr, MAX_ID, split, tl.min(tl.where(tops == top, top_ids, NO_TOKEN), axis=0))
    _put(wholes_ptr, BAD, split, tl.max(is_bad, axis=0))
    _put(reals_ptr, BEST, split, best)
    _put(wholes_ptr, BEST_ID, split, best_id)
    _put(reals_ptr, BEST_X, split, best_x)
    if LOGPROB:
        raw_top = tl.max(raw_tops, axis=0)
        _put(reals_ptr, RAW_MAX, split, raw_top)
        _put(reals_ptr, RAW_SUM, split, tl.sum(raw_sums * tl.exp(raw_tops - raw_top), axis=0))

    if not tests:  # noqa: SIM102 - Triton's "and" evaluates both sides
        if arrive(arrived_ptr) == splits - 1:
            top_x, token, fault = _likeliest(reals_ptr, wholes_ptr, splits)
            if draws:
                token, _x = _race_winner(reals_ptr, wholes_ptr, splits)
            _finish(outs, following, place, row_ptr, token, fault, reals_ptr, splits, LOGPROB, FIELDS, PLACED)
            tl.store(arrived_ptr, 0)

    # A row with filters: test the winner, and draw again before it if it is out.
    if FILTERS:  # noqa: SIM102 - decided at compile time
        if tests:
            goal = splits
            meet(arrived_ptr, goal)
            top_x, _top_id, fault = _likeliest(reals_ptr, wholes_ptr, splits)
            token, token_x = _race_winner(reals_ptr, wholes_ptr, splits)
            rate32 = rate.to(tl.float32)
            least = tl.where(min_p > 0.0, least_exponent_of(tl.maximum(min_p, 1e-30)), float("-inf"))
            low_x = top_x
            is_open = fault == 0
            while is_open:
                middle = 0.5 * token_x + 0.5 * low_x
                count, count_middle = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
                mass, mass_middle = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
                total = tl.zeros((BLOCK,), tl.int64)
                for block in range(split, num_blocks, splits):
                    held = bias_places(block, biased, BLOCK, BIAS)
                    for word in tl.static_range(4):
                        ids = token_ids(block, word, BLOCK)
                        raw = load_raw(row_ptr, block, word, num_vocab, BLOCK)
                        x = adjusted(raw, ids, num_vocab, how, held, PENALTIES, BIAS, MASK)
                        before, above = ranks_before(x, ids, token_x, token), x > middle
                        count += before.to(tl.int32)
                        count_middle += above.to(tl.int32)
                        if top_p < 1.0:
                            weight = weights((x - top_x) * rate32)
                            total += weight
                            mass += tl.where(before, weight, 0)
                            mass_middle += tl.where(above, weight, 0)
                _put(wholes_ptr, COUNT, split, tl.sum(count, axis=0))
                _put(wholes_ptr, COUNT_MIDDLE, split, tl.sum(count_middle, axis=0))
                _put(wholes_ptr, MASS, split, tl.sum(mass, axis=0))
                _put(wholes_ptr, MASS_MIDDLE, split, tl.sum(mass_middle, axis=0))
                _put(wholes_ptr, TOTAL, split, tl.sum(total, axis=0))
                goal += splits
                meet(arrived_ptr, goal)
                limit = _total(wholes_ptr, TOTAL, splits).to(tl.float64) * top_p.to(tl.float64)
                num_before = _total(wholes_ptr, COUNT, splits)
                weight_before = _total(wholes_ptr, MASS, splits).to(tl.float64)
                keeps = (top_k <= 0) | (num_before < top_k)
                keeps = keeps & ((top_p >= 1.0) | (weight_before < limit))
                keeps = keeps & ((token_x - top_x) * rate32 >= least)
                num_above = _total(wholes_ptr, COUNT_MIDDLE, splits)
                weight_above = _total(wholes_ptr, MASS_MIDDLE, splits).to(tl.float64)
                is_low = (top_k <= 0) | (num_above < top_k)
                is_low = is_low & ((top_p >= 1.0) | (weight_above < limit))
                is_low = is_low & ((middle - top_x) * rate32 >= least)
                is_low = is_low | (num_above == 0)
                is_open = ~(keeps | (num_before == 0))
                if is_open:
                    # Open is what ranks before the token, or above the middle if no token from there down is kept.
                    end_x, end_id = tl.where(is_low, token_x, middle), tl.where(is_low, token, -1)
                    low_x = tl.where(is_low, middle, low_x)
                    best = tl.full((), float("-inf"), tl.float64)
                    best_id, best_x = tl.full((), NO_TOKEN, tl.int32), tl.full((), float("-inf"), tl.float32)
                    for block in range(split, num_blocks, splits):
                        held = bias_places(block, biased, BLOCK, BIAS)
                        x0, x1, x2, x3 = tops, tops, tops, tops
                        for word in tl.static_range(4):
                            ids = token_ids(block, word, BLOCK)
                            raw = load_raw(row_ptr, block, word, num_vocab, BLOCK)
                            x = adjusted(raw, ids, num_vocab, how, held, PENALTIES, BIAS, MASK)
                            x = tl.where(ranks_before(x, ids, end_x, end_id), x, float("-inf"))
                            if word == 0:
                                x0 = x
                            elif word == 1:
                                x1 = x
                            elif word == 2:
                                x2 = x
                            else:
                                x3 = x
                        best, best_id, best_x = race(
                            x0, x1, x2, x3, block, seed, index, rate, best, best_id, best_x, BLOCK
                        )
                    _put(reals_ptr, BEST, split, best)
                    _put(wholes_ptr, BEST_ID, split, best_id)
                    _put(reals_ptr, BEST_X, split, best_x)
                    goal += splits
                    meet(arrived_ptr, goal)
                    token, token_x = _race_winner(reals_ptr, wholes_ptr, splits)
            if split == 0:
                _finish(outs, following, place, row_ptr, token, fault, reals_ptr, splits, LOGPROB, FIELDS, PLACED)
            if arrive(left_ptr) == splits - 1:
                tl.store(arrived_ptr, 0)
                tl.store(left_ptr, 0)
