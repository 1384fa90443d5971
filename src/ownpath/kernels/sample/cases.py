"""Rows that the bench draws tokens for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleCase:
    """Rows with the same parameters. spread: standard deviation of the logits, which are normal. tiny: small enough for
    a CPU."""

    label: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    spread: float = 3.0
    vocab: int = 129280
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    tiny: bool = False
    bench: bool = True

    @property
    def has_filters(self) -> bool:
        return (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)


CASES = (
    SampleCase("greedy", temperature=0.0),
    SampleCase("draw"),
    SampleCase("draw flat", spread=1.0),
    SampleCase("top-p 0.95", top_p=0.95),
    SampleCase("top-p 0.5 flat", top_p=0.5, spread=1.0),
    SampleCase("top-k 50 top-p 0.95 min-p 0.02", top_k=50, top_p=0.95, min_p=0.02),
    SampleCase("top-k 20 flat", top_k=20, spread=1.0),
    SampleCase("greedy", temperature=0.0, vocab=500, tokens=(1, 3), tiny=True, bench=False),
    SampleCase("top-p 0.95", top_p=0.95, vocab=500, tokens=(1, 3), tiny=True, bench=False),
)
"""V4's vocabulary. Flat logits keep many tokens in the race."""
