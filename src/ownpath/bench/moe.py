"""``ownpath bench moe``: alignment, both products, SwiGLU and the weighted sum, timed as one call.

There is one copy of all experts' weights; the calls of a round differ in routing and tokens. At one token a call reads
85 MB of the 3.6 GB (V4-Flash), and two calls share few experts, so that L2 is cold without copies of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ownpath.bench.check import moe_reference
from ownpath.bench.contender import SWIGLU_LIMIT, MoeCall, MoeContender, chosen
from ownpath.bench.floor import moe_work
from ownpath.bench.measure import Round, Settings, describe, measure, without_time
from ownpath.bench.operands import MoeOperands, random_activations, random_moe
from ownpath.bench.ours import OwnMoe, own_kernels
from ownpath.bench.peers.flashinfer import FlashinferMoe
from ownpath.bench.peers.humming import HummingMoe
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.routing import TopkRouting, uniform_routing
from ownpath.bench.row import Case, Row
from ownpath.bench.shapes import MOE_TOKENS, MoeShape, moe_shape
from ownpath.formats import NVFP4
from ownpath.ops import OpKind


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures shape by shape, so that only one shape's weights are in memory."""
    shapes = [moe_shape(name) for name in asked.shapes or ("v4-flash",)]
    everyone: list[MoeContender] = [OwnMoe(), HummingMoe(), FlashinferMoe()]
    named: list[MoeContender] = [OwnMoe(kernel) for kernel in own_kernels(OpKind.MOE, NVFP4, asked.settings.device)]
    contenders = chosen(everyone, named, asked.contenders)
    for shape in shapes:
        yield from run_moe(asked.settings, shape, asked.tokens or MOE_TOKENS, contenders)


@dataclass(frozen=True)
class _Problem:
    case: Case
    inputs: Sequence[tuple[torch.Tensor, TopkRouting]]
    reference: torch.Tensor


def run_moe(
    settings: Settings, shape: MoeShape, token_counts: Sequence[int], contenders: Sequence[MoeContender]
) -> Iterator[Row]:
    """Yields a row for each token count and contender, contender by contender."""
    operands = random_moe(shape, settings.generator())
    problems = [_problem(settings, shape, operands, num_tokens) for num_tokens in token_counts]
    for contender in contenders:
        yield from _rows(settings, operands, problems, contender)


def _problem(settings: Settings, shape: MoeShape, operands: MoeOperands, num_tokens: int) -> _Problem:
    least = 8 if num_tokens <= 64 else 4
    first = moe_work(shape, num_tokens, min(shape.num_experts, num_tokens * shape.top_k))
    inputs = []
    for idx in range(num_calls(first.num_bytes, least)):
        seed = settings.seed + 1000 * num_tokens + idx
        x = random_activations(num_tokens, shape.hidden, settings.generator(1000 * num_tokens + idx))
        inputs.append((x, uniform_routing(shape, num_tokens, seed, settings.device)))
    distinct = sum(routing.distinct_experts for _, routing in inputs) / len(inputs)
    work = moe_work(shape, num_tokens, distinct)
    floor_us = None if settings.ceilings is None else work.floor_us(settings.ceilings)
    dims = {"experts": shape.num_experts, "hidden": shape.hidden, "inter": shape.inter, "top_k": shape.top_k}
    case = Case("moe", shape.name, dims, num_tokens, work.num_bytes, work.num_flop, floor_us, distinct)
    return _Problem(case, inputs, moe_reference(*inputs[0], operands, SWIGLU_LIMIT))


def _rows(
    settings: Settings, operands: MoeOperands, problems: Sequence[_Problem], contender: MoeContender
) -> Iterator[Row]:
    if missing := contender.missing(settings.device):
        yield from (without_time(problem.case, contender, missing.status, missing.reason) for problem in problems)
        return
    try:
        top_k = problems[0].case.dims["top_k"]
        moe = contender.prepare(operands, [problem.case.num_tokens for problem in problems], top_k)
    except Exception as failure:  # a contender's failure is a result, shown in the table
        reason = describe(failure)
        yield from (without_time(problem.case, contender, "failed", reason) for problem in problems)
        return
    for problem in problems:
        yield measure(problem.case, contender, partial(_round, moe, problem), settings.timer)


def _round(moe: MoeCall, problem: _Problem) -> Round:
    calls: list[Callable[[], torch.Tensor]] = [
        partial(moe, x, routing.topk_ids, routing.topk_weights) for x, routing in problem.inputs
    ]
    return Round(calls, problem.reference)
