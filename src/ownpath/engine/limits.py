"""Bounds of sampling parameters, without torch: the command line and the server's fields ask for them too."""

MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS, LARGEST_BIAS = 300, 100.0
"""Tokens with a bias; its amount."""
LARGEST_PENALTY, LARGEST_REPETITION = 2.0, 2.0
TOP_K_LIMIT = 2**31
SEED_LIMIT = 2**63
"""A seed is a signed number of 64 bits."""
