"""Device code that averages the raw rows of an entry.

t row, p its position, c channels of a slice, i raw row of an entry (the newest is last); H head dim, RATIO tokens of an
entry, WINDOWS windows that it averages, SPARE rows of a ring beyond what one row of a request needs.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    raw_ptr,
    raw_stride,
    ring_ptr,
    ape_ptr,
    positions_ptr,
    slots_ptr,
    t,
    p,
    c,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    SPARE: tl.constexpr,
    OWN: tl.constexpr,
):
    """Loads the raw rows of the entry that ends at p, in the channels c of a slice: kv and biased scores [rows, c].

    The step's own rows of the request, up to OWN behind row t, come from the step, the older ones from the slot's ring.
    A launch that writes to the ring, OWN = SPARE, replaces the rows of up to SPARE + 1 positions there, each too old to
    be among them. Rows before position 0 do not exist. slots: of each row, or what else tells requests apart.
    """
    ROWS: tl.constexpr = RATIO * WINDOWS
    P: tl.constexpr = H * WINDOWS
    i = tl.arange(0, ROWS)
    age = ROWS - 1 - i
    exists = (age <= p)[:, None]
    # Where windows overlap, the window before gives its first half of the channels, the own one its second.
    column = (i // RATIO)[:, None] * H + c[None, :]
    # One load for both places: a second one would wait for the first.
    if OWN == 0:
        row = (p - age + ROWS) % ROWS
        at = tl.where((age == 0)[:, None], raw_ptr + column, ring_ptr + row[:, None] * (2 * P) + column)
    else:
        row = p % (ROWS + SPARE) - age
        row = tl.where(row < 0, row + (ROWS + SPARE), row)
        inside = (age <= OWN) & (age <= t)
        slot = tl.load(slots_ptr + t)
        of_step = tl.load(slots_ptr + (t - age), mask=inside, other=-1) == slot
        of_step &= tl.load(positions_ptr + (t - age), mask=inside, other=-1) == p - age
        of_step &= inside
        own = raw_ptr - age[:, None] * raw_stride + column
        at = tl.where(of_step[:, None], own, ring_ptr + row[:, None] * (2 * P) + column)
    kv = tl.load(at, mask=exists, other=0.0)
    score = tl.load(at + P, mask=exists, other=float("-inf"))
    score += tl.load(ape_ptr + (i % RATIO)[:, None] * P + column)
    return kv, score


@triton.jit
def average(kv, score):
    """Averages the rows of each channel, gated by the softmax of their scores."""
    gate = tl.exp(score - tl.max(score, axis=0)[None, :])
    return tl.sum(kv * gate, axis=0) / tl.sum(gate, axis=0)
