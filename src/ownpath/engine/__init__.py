"""Many requests through one model: what to run each step, which token follows, who hears of it."""
