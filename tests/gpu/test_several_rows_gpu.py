"""Decode steps with several rows of a request on the device: the kernels for longer rings, and the embedded model."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.attention.interface import DecodeStep
from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig
from ownpath.conformance.attend import AttendInputs, assert_attention, exact_attention, make_attend_inputs
from ownpath.conformance.entries import WritingStep, draw_step, judge_rounded, judge_step, with_pages
from ownpath.kernels.attend.cases import CASES as ATTEND_CASES
from ownpath.kernels.attend.cases import AttendCase
from ownpath.kernels.attend.choose_sm90 import reachable_configs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.registry import KERNELS
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

SPARE = 8
ATTEND = ("triton.attend", "triton.attend_invariant", "cute.attend", "cute.attend_invariant")
SLIDING = [case for case in ATTEND_CASES if case.tiny and case.label in ("pro SWA bf16", "embedded SWA fp8")]
MIXED = [*SLIDING, *(case for case in ATTEND_CASES if "mixed" in case.label)]
WRITES = [case for case in CASES if case.bench]
NUM_TOKENS = 280


def kernel_configs() -> Iterator[Config]:
    """Attention over rings of both lengths, and the embedded model's."""
    for is_invariant in (False, True):
        for spare in (0, SPARE):
            yield from reachable_configs(is_invariant, spare)
    yield from model_configs(default_model_dir(), is_batch_invariant=True)


def label(value: Any) -> str:
    return value.label if isinstance(value, AttendCase | KernelCase) else str(value)


def bits(step: WritingStep) -> list[torch.Tensor]:
    return [one.view(torch.int16 if one.itemsize == 2 else torch.int32) for one in step.pools if one is not None]


@pytest.mark.parametrize("case", WRITES, ids=label)
@pytest.mark.parametrize("group", [1, 2, 4, 9])
def test_writes(case: KernelCase, group: int, cuda: torch.device) -> None:
    """Right for rows of many requests, and in FP8 pages; nothing read that the step writes: that is NaN."""
    for num_rows, first in ((9, 0), (33, 126), (130, 251)):
        step = draw_step(case, num_rows, cuda, num_rows, [first + 3 * t for t in range(num_rows)], group)
        written, paged = step.copy(), with_pages(step)
        KERNELS["triton.entries"](*written.arguments)
        judge_step(step, written)
        KERNELS["triton.entries"](*paged.arguments)
        judge_rounded(written, paged)


@pytest.mark.parametrize("case", WRITES, ids=label)
def test_how_rows_are_grouped_changes_no_bit(case: KernelCase, cuda: torch.device) -> None:
    step = draw_step(case, 18, cuda, positions=[121] * 9 + [250] * 9, group=9)
    whole, kernel = step.copy(), KERNELS["triton.entries"]
    kernel(*whole.arguments)
    for sizes in ([1] * 18, [4, 5, 3, 6], [2] * 9):
        cut, start = step.copy(), 0
        for size in sizes:
            kernel(*cut.part(slice(start, start + size)).arguments)
            start += size
        for found, wanted in zip(bits(cut), bits(whole), strict=True):
            assert torch.equal(found, wanted)


def run(name: str, inputs: AttendInputs) -> torch.Tensor:
    """A call whose output and workspace were full of NaN."""
    kernel, (q, _, _, keys, rows, weights) = KERNELS[name], inputs.arguments
    operand = kernel.prepare(weights)
    workspace = kernel.workspace(q, keys, rows, operand)
    if workspace is not None:
        workspace.fill_(torch.nan)
    out = torch.full_like(q, torch.nan)
    kernel.run(*inputs.arguments[:5], operand, out=out, workspace=workspace)
    return out


@pytest.mark.parametrize("case", MIXED, ids=label)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_attention(case: AttendCase, group: int, cuda: torch.device) -> None:
    """Each row sees its own window and entries; the rest of its ring is NaN."""
    for num_rows in (4, 33):
        inputs = make_attend_inputs(case, num_rows, cuda, seed=group, group=group)
        exact = exact_attention(inputs)
        for name in ATTEND:
            assert_attention(run(name, inputs), exact, name)


@pytest.mark.parametrize("case", MIXED, ids=label)
def test_rows_of_a_request_have_the_bits_of_each_alone(case: AttendCase, cuda: torch.device) -> None:
    inputs = make_attend_inputs(case, 12, cuda, group=4)
    for name in ATTEND[1::2]:
        whole = run(name, inputs)
        for t in range(12):
            assert torch.equal(run(name, inputs.part(slice(t, t + 1)))[0], whole[t]), name


@pytest.fixture(scope="module")
def model(cuda: torch.device) -> Model:
    config = EngineConfig(str(cuda), torch.bfloat16, 512, max_num_seqs=4, is_batch_invariant=True)
    return load_model(default_model_dir(), replace(config, rows_per_request=4))


def in_pieces(model: Model, token_ids: list[int], sizes: list[int], drafts: list[int] | None = None) -> torch.Tensor:
    """All logits of a text from its first token on, in steps that are decode steps. drafts: wrong tokens behind each
    piece, taken back."""
    pool = CachePool(model.cache_spec)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(NAN_BYTE)
    cache, device, logits = pool.new_sequence(), model.cache_spec.device, []
    for size in cycle(sizes):
        start = cache.num_tokens
        rows = token_ids[start : start + size]
        batch = ForwardBatch.of([(rows + (drafts or []), cache)], device, all_logits=True)
        assert isinstance(model.blocks[0].prepare(batch.tables), DecodeStep)
        logits.append(model.forward(batch)[: len(rows)])
        cache.num_tokens = start + len(rows)
        if cache.num_tokens == len(token_ids):
            return torch.cat(logits)
    raise AssertionError("no sizes")


def test_the_model_has_the_same_bits_however_rows_are_grouped(model: Model) -> None:
    """An invariant plan: text in pieces of 1 to 4 rows, and with drafts that are taken back after each piece."""
    token_ids = torch.randint(2, 2000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    single = in_pieces(model, token_ids, [1])
    assert single.isfinite().all()
    for sizes, drafts in (([2], []), ([4], []), ([1, 3, 2], []), ([1], [7, 8, 9]), ([2, 1], [11, 12])):
        assert torch.equal(in_pieces(model, token_ids, sizes, drafts), single), f"{sizes}, {drafts}"
