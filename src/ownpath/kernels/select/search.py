"""The search for the k-th best score, on the device, in the registers of one program.

Scores become integers of the same order. Two pivots a pass cut the range between the least and the best to a third: 7
to 9 passes for distinct scores of one magnitude, up to 16 with outliers, up to 25 where the k-th score is tied.
"""

import triton
import triton.language as tl

ABSENT = tl.constexpr(-(2**31))
"""The key of what is not there, below all others."""
LARGEST = tl.constexpr(2**31 - 1)
BEST_INFINITE, LEAST_INFINITE = tl.constexpr(0x7F800000), tl.constexpr(-(0x7F800000) - 1)
"""The keys of infinity and of minus infinity."""

VALUE_PASSES = tl.constexpr(4)
"""Passes that cut the range of values: three fewer in all where scores have one magnitude, four more at outliers."""


@triton.jit
def _key(value):
    """Converts a float32 to an integer of the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ LARGEST, bits)


@triton.jit
def _value(key):
    """Undoes ``_key``."""
    return tl.where(key < 0, key ^ LARGEST, key).to(tl.float32, bitcast=True)


@triton.jit
def ordered_keys(scores, is_there):
    """Converts scores to integers of the same order. -0 becomes +0, NaN minus infinity."""
    keys = _key(tl.where(scores == 0.0, 0.0, scores))
    keys = tl.where(scores != scores, LEAST_INFINITE, keys)
    return tl.where(is_there, keys, ABSENT)


@triton.jit
def _pivots(low, high, passes):
    """Returns two keys, low < first <= second <= high, at about a third and two thirds of the range.

    First of the range of values, which scores of one magnitude fill evenly; then of that of keys, which ends in any
    case: magnitudes apart are not far apart there. Infinite ends give any keys, which are then put into their place.
    """
    third = _value(high) * 0.34 - _value(low) * 0.34
    step = (high - low).to(tl.uint32, bitcast=True)  # the difference of two int32 may need 32 bits
    step = tl.maximum((step >> 2) + (step >> 4) + (step >> 5), 1).to(tl.int32, bitcast=True)
    is_early = passes < VALUE_PASSES
    first = tl.where(is_early, _key(_value(low) + third), low + step)
    second = tl.where(is_early, _key(_value(high) - third), high - step)
    first = tl.minimum(tl.maximum(first, low + 1), high)
    return first, tl.minimum(tl.maximum(second, first), high)


@triton.jit
def _threshold(keys, least, best, num, K: tl.constexpr):
    """Searches the K-th best of ``num`` keys between the least and the best.

    Returns the threshold and how many keys equal to it are selected, at most. The latter may exceed their number. All
    keys are above the threshold where there are no more than K.
    """
    low, high = tl.where(num > K, least, ABSENT), tl.where(num > K, best, ABSENT)
    above, passes = tl.where(num > K, 0, K), 0  # keys above ``high``
    while low < high:
        first, second = _pivots(low, high, passes)
        counts = tl.sum((keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16), axis=0)
        of_first, of_second = counts & 0xFFFF, counts >> 16
        # From here on, ``low`` has at least K keys at or above it, and ``high`` fewer than K above it.
        between = (of_first >= K) & (of_second < K)
        below = of_first < K
        found = (of_first == K) | (of_second == K)
        low = tl.where(of_second >= K, second, tl.where(between, first, low))
        high = tl.where(found, low, tl.where(below, first - 1, tl.where(between, second - 1, high)))
        above = tl.where(found, above, tl.where(below, of_first, tl.where(between, of_second, above)))
        passes += 1
    return low, K - above


@triton.jit
def _places(keys, threshold, room):
    """Returns which keys are selected, and the place of each among them: all above the threshold, the first equals."""
    is_above, is_equal = keys > threshold, keys == threshold
    ones = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    before = tl.cumsum(ones, axis=0) - ones
    equals_before = before >> 16
    chosen = is_above | (is_equal & (equals_before < room))
    return chosen, (before & 0xFFFF) + tl.minimum(equals_before, room)


@triton.jit
def select_keys(keys, rows, num, rows_ptr, keys_ptr, K: tl.constexpr, SIZE: tl.constexpr, KEEPS: tl.constexpr):
    """Selects the K best of the first ``num`` keys and stores their rows, in order; with KEEPS, the keys as well.

    Returns 1 if a key is that of a number that is not finite, else 0.
    """
    is_there = tl.arange(0, SIZE) < num
    least, best = tl.min(tl.where(is_there, keys, LARGEST), axis=0), tl.max(keys, axis=0)
    threshold, room = _threshold(keys, least, best, num, K)
    chosen, places = _places(keys, threshold, room)
    tl.store(rows_ptr + places, rows, mask=chosen)
    if KEEPS:
        tl.store(keys_ptr + places, keys, mask=chosen)
    return ((num > 0) & ((least <= LEAST_INFINITE) | (best >= BEST_INFINITE))).to(tl.int32)


@triton.jit
def select_kept(keys_ptr, rows_ptr, num, goal_rows_ptr, goal_keys_ptr, K: tl.constexpr, SIZE: tl.constexpr):
    """Selects the K best of what other programs have kept, ``num`` keys and rows in the order of the entries."""
    i = tl.arange(0, SIZE)
    keys = tl.load(keys_ptr + i, mask=i < num, other=ABSENT, cache_modifier=".cg")
    rows = tl.load(rows_ptr + i, mask=i < num, other=0, cache_modifier=".cg")
    select_keys(keys, rows, num, goal_rows_ptr, goal_keys_ptr, K, SIZE, True)
