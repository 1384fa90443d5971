"""``ownpath bench linear`` and ``bench fp8``: dense products on several weights in rotation, so that L2 is cold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from ownpath.bench.check import fp8_reference, nvfp4_reference
from ownpath.bench.contender import Contender, Fp8Contender, LinearCall, Nvfp4Contender, chosen
from ownpath.bench.floor import Work, fp8_linear_work, nvfp4_linear_work
from ownpath.bench.measure import Round, Settings, describe, measure, without_time
from ownpath.bench.operands import Fp8Operands, Nvfp4Operands, random_activations, random_fp8, random_nvfp4
from ownpath.bench.ours import OwnFp8Linear, OwnNvfp4Linear, own_kernels
from ownpath.bench.peers.cublas import CublasFp8, CublasNvfp4
from ownpath.bench.peers.humming import HummingNvfp4
from ownpath.bench.peers.quack import QuackNvfp4
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.row import Case, Row
from ownpath.bench.shapes import LINEAR_SHAPES, LINEAR_TOKENS, LinearShape, linear_shape
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.ops import OpKind

FormatOperands = TypeVar("FormatOperands")
_FormatOperands_contra = TypeVar("_FormatOperands_contra", contravariant=True)


class _LinearContender(Contender, Protocol[_FormatOperands_contra]):
    def prepare(self, operands: _FormatOperands_contra, num_rows: Sequence[int]) -> LinearCall: ...


@dataclass(frozen=True)
class LinearBench(Generic[FormatOperands]):
    """A weight format's benchmark: functions that make operands, compute the reference and count the work."""

    name: str
    make: Callable[[LinearShape, torch.Generator], FormatOperands]
    reference: Callable[[torch.Tensor, FormatOperands], torch.Tensor]
    work: Callable[[LinearShape, int], Work]


NVFP4_BENCH: LinearBench[Nvfp4Operands] = LinearBench("linear", random_nvfp4, nvfp4_reference, nvfp4_linear_work)
FP8_BENCH: LinearBench[Fp8Operands] = LinearBench("fp8", random_fp8, fp8_reference, fp8_linear_work)


def measured_nvfp4(asked: BenchRequest) -> Iterator[Row]:
    """Measures NVFP4 linears shape by shape."""
    everyone: list[Nvfp4Contender] = [OwnNvfp4Linear(), HummingNvfp4(), QuackNvfp4(), CublasNvfp4()]
    kernels = own_kernels(OpKind.LINEAR, NVFP4, asked.settings.device)
    named: list[Nvfp4Contender] = [OwnNvfp4Linear(kernel) for kernel in kernels]
    yield from _measured(NVFP4_BENCH, asked, chosen(everyone, named, asked.contenders))


def measured_fp8(asked: BenchRequest) -> Iterator[Row]:
    """Measures FP8 linears shape by shape."""
    everyone: list[Fp8Contender] = [OwnFp8Linear(), CublasFp8()]
    kernels = own_kernels(OpKind.LINEAR, FP8_BLOCK, asked.settings.device)
    named: list[Fp8Contender] = [OwnFp8Linear(kernel) for kernel in kernels]
    yield from _measured(FP8_BENCH, asked, chosen(everyone, named, asked.contenders))


def _measured(
    bench: LinearBench[FormatOperands], asked: BenchRequest, contenders: Sequence[_LinearContender[FormatOperands]]
) -> Iterator[Row]:
    for shape in [linear_shape(name) for name in asked.shapes] or LINEAR_SHAPES[:5]:
        yield from run_linear(bench, asked.settings, shape, asked.tokens or LINEAR_TOKENS, contenders)


def run_linear(
    bench: LinearBench[FormatOperands],
    settings: Settings,
    shape: LinearShape,
    row_counts: Sequence[int],
    contenders: Sequence[_LinearContender[FormatOperands]],
) -> Iterator[Row]:
    """Yields a row for each row count and contender, contender by contender."""
    sets = num_calls(bench.work(shape, 0).num_bytes)
    operands = [bench.make(shape, settings.generator(idx)) for idx in range(sets)]
    cases = [_case(bench, settings, shape, num_rows) for num_rows in row_counts]
    inputs = [
        [random_activations(case.num_tokens, shape.in_features, settings.generator(idx)) for idx in range(sets)]
        for case in cases
    ]
    references = [bench.reference(xs[0], operands[0]) for xs in inputs]
    problems = list(zip(cases, inputs, references, strict=True))
    for contender in contenders:
        yield from _rows(settings, operands, problems, contender)


def _case(bench: LinearBench[FormatOperands], settings: Settings, shape: LinearShape, num_rows: int) -> Case:
    work = bench.work(shape, num_rows)
    floor_us = None if settings.ceilings is None else work.floor_us(settings.ceilings)
    dims = {"out_features": shape.out_features, "in_features": shape.in_features}
    return Case(bench.name, shape.name, dims, num_rows, work.num_bytes, work.num_flop, floor_us)


def _rows(
    settings: Settings,
    operands: Sequence[FormatOperands],
    problems: Sequence[tuple[Case, Sequence[torch.Tensor], torch.Tensor]],
    contender: _LinearContender[FormatOperands],
) -> Iterator[Row]:
    cases = [case for case, _, _ in problems]
    if missing := contender.missing(settings.device):
        yield from (without_time(case, contender, missing.status, missing.reason) for case in cases)
        return
    try:
        linears = [contender.prepare(weights, [case.num_tokens for case in cases]) for weights in operands]
    except Exception as failure:  # a contender's failure is a result, shown in the table
        reason = describe(failure)
        yield from (without_time(case, contender, "failed", reason) for case in cases)
        return
    for case, xs, reference in problems:
        yield measure(case, contender, partial(_round, linears, xs, reference), settings.timer)


def _round(linears: Sequence[LinearCall], xs: Sequence[torch.Tensor], reference: torch.Tensor) -> Round:
    calls = [partial(linear, x) for linear, x in zip(linears, xs, strict=True)]
    return Round(calls, reference)
