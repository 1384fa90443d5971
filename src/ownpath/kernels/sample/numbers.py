"""Numbers that the kernel and its twin share, so that both compute the same bits.

Polynomials are minimax in relative error over their range, rounded to float32; every operation on them is a float32
multiplication or addition, rounded by itself.
"""

CHUNK, LANES, WORDS = 1024, 256, 4
"""Token ``i`` takes word ``i % CHUNK // LANES`` of the Philox block with counter ``i // CHUNK * LANES + i % LANES``."""
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
"""Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011."""

SQRT_HALF_BITS = 0x3F3504F3
"""Bits of the float32 nearest to the square root of 1/2."""
LN2 = 0.6931471824645996
LN_TERMS = (
    *(1.0, -0.49999988079071045, 0.3333418667316437, -0.25002074241638184, 0.19956833124160767),
    *(-0.16562402248382568, 0.1495228260755539, -0.14366787672042847, 0.08722243458032608),
)
"""ln(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1], within 2.7e-8; powers of f ascending."""

LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950216293335, 0.693359375, -2.12194439e-4
EXP_TERMS = (
    *(1.0, 1.0, 0.49999991059303284, 0.16666419804096222),
    *(0.041668232530355453, 0.008374898694455624, 0.0013836737489327788),
)
"""exp(f) for |f| <= ln(2) / 2, within 2e-9; powers of f ascending."""
WEIGHT_BITS = 40
"""A token's weight in a nucleus is exp((x - max) / temperature) in units of 2^-40, rounded down: sums are exact."""
LEAST_EXPONENT = -64.0
"""exp of anything lower weighs 0, as this does."""
LEAST_SHARE = 1e-30
"""A lower ``min_p`` counts as this one."""
LARGEST = 3.4028234663852886e38
