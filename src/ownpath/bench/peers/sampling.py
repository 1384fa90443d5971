"""torch's operations as a sampler: ``argmax``, or softmax, sort, cut and ``multinomial``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ownpath.bench.contender import Missing
from ownpath.bench.kernel import Bound, NotApplicable

if TYPE_CHECKING:
    from ownpath.bench.sample import SampleInputs
    from ownpath.bench.timing import TimedCall


class TorchSampling:
    """Greedy rows, and draws with top-p or without filters."""

    name, is_peer, max_rel_l2 = "torch", True, 0.0

    def missing(self, device: str) -> Missing | None:
        """Runs everywhere."""
        return None

    def bind(self, sets: "Sequence[SampleInputs]") -> Bound:
        case = sets[0].case
        if case.top_k or case.min_p:
            raise NotApplicable("written for top-p alone")
        calls = [_call(one.logits_TV, case.temperature, case.top_p) for one in sets]
        # A draw of another generator's: only a token that exists can be asked for.
        return Bound(calls, lambda: None)


def _call(logits_TV: torch.Tensor, temperature: float, top_p: float) -> "TimedCall":
    def draw() -> torch.Tensor:
        probs = torch.softmax(logits_TV / temperature, dim=-1)
        if top_p == 1:
            return torch.multinomial(probs, 1)
        ranked, ids = probs.sort(dim=-1, descending=True)
        kept = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        return ids.gather(1, torch.multinomial(kept, 1))

    return draw if temperature else lambda: logits_TV.argmax(dim=-1)
