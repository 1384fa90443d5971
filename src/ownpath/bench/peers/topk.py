"""The k largest of each row: torch's, and the one that vLLM's indexer launches. Neither is exact at ties, nor turns
entries into rows of the pool, nor puts them in order."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ownpath.bench.contender import Missing
from ownpath.bench.kernel import Bound, NotApplicable
from ownpath.bench.peers import missing_library

if TYPE_CHECKING:
    from ownpath.bench.select import SelectInputs

FILE = "_C.abi3.so"
WORKSPACE_BYTES = 1 << 20
TAKES = (512, 1024, 2048)


class TorchTopk:
    """``torch.topk``."""

    name, is_peer, max_rel_l2 = "torch.topk", True, 0.0

    def missing(self, device: str) -> Missing | None:
        """Runs everywhere."""
        return None

    def bind(self, sets: "Sequence[SelectInputs]") -> Bound:
        calls = [partial(torch.topk, one.scores_TC, one.topk, sorted=False) for one in sets]
        return Bound(calls, lambda: _judge(calls[0]().indices, sets[0]))


class PersistentTopk:
    """``persistent_topk`` of vLLM's library ``_C``."""

    name, is_peer, max_rel_l2 = "vllm persistent_topk", True, 0.0

    def __init__(self, library: Path | None) -> None:
        self._library = library

    def missing(self, device: str) -> Missing | None:
        """Requires CUDA and the library."""
        return missing_library("vllm", FILE, self._library, device)

    def bind(self, sets: "Sequence[SelectInputs]") -> Bound:
        first = sets[0]
        if first.topk not in TAKES:
            raise NotApplicable(f"takes {', '.join(map(str, TAKES))} entries")
        torch.ops.load_library(str(self._library))
        device, (num_rows, num_scores) = first.scores_TC.device, first.scores_TC.shape
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        lengths = torch.full((num_rows,), num_scores, dtype=torch.int32, device=device)
        outs = [torch.full((num_rows, one.topk), -1, dtype=torch.int32, device=device) for one in sets]
        operation = torch.ops._C.persistent_topk
        calls = [
            partial(operation, one.scores_TC, lengths, out, workspace, one.topk, num_scores)
            for one, out in zip(sets, outs, strict=True)
        ]
        return Bound(calls, lambda: _judge(outs[0], first))


def _judge(indices_TK: torch.Tensor, inputs: "SelectInputs") -> None:
    """Judges that the best scores were chosen, in any order. Errors: AssertionError."""
    assert bool((indices_TK >= 0).all()), "places without an entry"
    found = inputs.scores_TC.gather(1, indices_TK.long()).sort(dim=1).values
    wanted = inputs.scores_TC.topk(inputs.topk).values.sort(dim=1).values
    assert torch.equal(found, wanted), "other scores than the best"
    assert all(len(row.unique()) == inputs.topk for row in indices_TK), "an entry twice"
