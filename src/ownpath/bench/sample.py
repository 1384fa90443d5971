"""``ownpath bench sample``: one token for each row of logits. Ours is judged by its twin, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ownpath.bench.cases import cases_of
from ownpath.bench.floor import Work
from ownpath.bench.kernel import Bound, KernelProblem, case_of, contenders_of, run_kernels
from ownpath.bench.peers.sampling import TorchSampling
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Row
from ownpath.kernels.sample.cases import CASES, SampleCase
from ownpath.kernels.sample.ref import sample
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleKernel, SampleRows
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind
from ownpath.plan.select import Demands

MOST_SETS, JUDGED_ROWS = 16, 8


@dataclass(frozen=True)
class SampleInputs:
    """Logits float32 [T, V], and rows that differ in their seeds."""

    case: SampleCase
    logits_TV: torch.Tensor
    rows: SampleRows


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures case by case."""
    contenders = contenders_of(asked, OpKind.SAMPLE, bind, [TorchSampling()], Demands("float32"))
    for case in cases_of(asked.shapes, CASES):
        yield from run_kernels(_problems(asked, case), contenders, asked.settings, asked.settings.timer)


def bind(kernel: SampleKernel[object], spec: KernelSpec, sets: Sequence[SampleInputs]) -> Bound:
    """Binds calls that share an operand and an output, with log-probs, as a decode step asks for them."""
    operand, first = kernel.prepare(), sets[0]
    num_rows, device = len(first.logits_TV), first.logits_TV.device
    token_T, fault_T = (torch.full((num_rows,), -1, dtype=torch.int32, device=device) for _ in range(2))
    logprob_T = torch.full((num_rows,), torch.nan, device=device)
    out = Sampled(token_T, fault_T, logprob_T)
    calls = [partial(kernel.run, one.logits_TV, one.rows, operand, out=out) for one in sets]

    def judge() -> None:
        wanted = sample(first.logits_TV[:JUDGED_ROWS].cpu(), _first_on_cpu(first.rows))
        wrong = (token_T[:JUDGED_ROWS].cpu() != wanted.token_T).nonzero().flatten().tolist()
        assert not wrong, f"another token in rows {wrong[:8]}"
        assert not fault_T.any(), "a fault"
        exact_TV = first.logits_TV[:JUDGED_ROWS].double().log_softmax(-1)
        exact_T = exact_TV.gather(1, token_T[:JUDGED_ROWS].long().unsqueeze(-1)).squeeze(-1)
        # Below 16, where float32 has steps of 2**-20: 64 of them for a sum over the vocabulary.
        assert (logprob_T[:JUDGED_ROWS] - exact_T).abs().max() < 64 * 2**-20, "another log-prob"

    return Bound(calls, judge)


def sample_rows(case: SampleCase, num_rows: int, device: torch.device) -> SampleRows:
    """Returns rows with the case's parameters and different seeds."""

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    filters = FilterRows(column(case.top_k, torch.int32), column(case.top_p), column(case.min_p))
    seeds, drawn = torch.arange(num_rows, device=device), column(0, torch.int32)
    return SampleRows(column(case.temperature), seeds, drawn, filters if case.has_filters else None)


def _first_on_cpu(rows: SampleRows) -> SampleRows:
    """Returns the first rows; none depends on the others."""
    filters = None if rows.filters is None else FilterRows(*(part[:JUDGED_ROWS].cpu() for part in rows.filters))
    temperature_T, seed_T, index_T = (part[:JUDGED_ROWS].cpu() for part in rows[:3])
    return SampleRows(temperature_T, seed_T, index_T, filters)


def _problems(asked: BenchRequest, case: SampleCase) -> Iterator[KernelProblem[SampleInputs]]:
    g = asked.settings.generator()
    for num_rows in asked.tokens or case.tokens:
        work = Work(4 * num_rows * case.vocab, 0)
        rows = sample_rows(case, num_rows, g.device)
        sets = [
            SampleInputs(case, torch.randn(num_rows, case.vocab, generator=g, device=g.device) * case.spread, rows)
            for _ in range(min(num_calls(work.num_bytes, 2), MOST_SETS))
        ]
        yield KernelProblem(case_of(asked.settings, "sample", case.label, num_rows, work), sets)
