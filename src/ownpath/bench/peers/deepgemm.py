"""DeepGEMM's scores over paged FP8 keys. Queries are rotated and rounded to E4M3 outside of the timed call; its plan,
which a step's layers share, is made there too."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ownpath.bench.contender import W8A8_MAX_REL_L2, Missing
from ownpath.bench.kernel import Bound, NotApplicable
from ownpath.bench.peers import missing_package
from ownpath.conformance.bounds import relative_l2
from ownpath.conformance.indexer import exact_scores
from ownpath.kernels.scores.types import CSA_PAGES, FP8_KEY_BYTES
from ownpath.numerics import E4M3_MAX, encode_e4m3, rotate_pairs

if TYPE_CHECKING:
    from ownpath.bench.scores import ScoresInputs

JUDGED_ROWS = 2


class DeepGemm:
    """``fp8_paged_mqa_logits``, on FP8 pages only."""

    name, is_peer, max_rel_l2 = "deepgemm", True, W8A8_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Requires deep_gemm."""
        return missing_package("deep_gemm", "deep_gemm", device)

    def bind(self, sets: "Sequence[ScoresInputs]") -> Bound:
        if sets[0].keys.shape[-1] != CSA_PAGES.per_block * FP8_KEY_BYTES:
            raise NotApplicable("takes FP8 keys only; the case of FP8 keys has its time")
        import deep_gemm

        calls = [_call(deep_gemm, one) for one in sets]
        found = calls[0]()

        def judge() -> None:
            first = sets[0].first(JUDGED_ROWS)
            exact = exact_scores(first.query, first.keys, first.rows, CSA_PAGES, False)
            distance = relative_l2(found[:JUDGED_ROWS, : first.num_entries], exact.value)
            assert distance <= self.max_rel_l2, f"relative L2 {distance:.2e}"

        return Bound(calls, judge)


def _call(deep_gemm: Any, inputs: "ScoresInputs") -> Any:
    query, rows = inputs.query, inputs.rows
    q_TIH = rotate_pairs(query.q_TIH, query.cos_TF, query.sin_TF).float()
    num_heads, dim = q_TIH.shape[1:]
    scale_TI1 = q_TIH.abs().amax(-1, keepdim=True).clamp(min=1e-4) / E4M3_MAX
    codes = encode_e4m3(q_TIH / scale_TI1).unsqueeze(1)
    weights_TI = query.weights_TI.float() * scale_TI1.squeeze(-1) * (dim**-0.5 * num_heads**-0.5)
    lengths = torch.full_like(rows.positions_T, inputs.num_entries)
    pages = inputs.keys.view(-1, CSA_PAGES.per_block, 1, FP8_KEY_BYTES)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, CSA_PAGES.per_block, deep_gemm.get_num_sms())
    fixed = (lengths, rows.blocks_TB, plan, inputs.num_entries)
    return lambda: deep_gemm.fp8_paged_mqa_logits(codes, pages, weights_TI, *fixed, clean_logits=False)
