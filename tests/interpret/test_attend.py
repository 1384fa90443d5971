"""Decode attention in Triton, interpreted: values, what a row's bits depend on, every FP8 code, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.cache.keys import StoredKeys
from ownpath.conformance.attend import AttendInputs, judge_attend, make_attend_inputs, map_rows
from ownpath.conformance.call import KernelCall
from ownpath.conformance.memory import memory_problem
from ownpath.kernels.attend.cases import CASES, AttendCase
from ownpath.kernels.attend.launch import ATTEND, ATTEND_INVARIANT, TritonAttend
from ownpath.kernels.attend.ref import ATTEND as TWIN
from ownpath.kernels.attend.ref import attend, decode_pages
from ownpath.kernels.attend.types import AttendWeights, DecodeKeys, DecodeRows
from ownpath.numerics import KEY_PAGES
from ownpath.ops import OpKind

CPU = torch.device("cpu")
TINY = {case.label: case for case in CASES if case.tiny}
SMALL = [case for case in TINY.values() if case.num_heads == 4]
LARGE = [case for case in TINY.values() if case.num_heads != 4]
CSA, HCA = TINY["embedded CSA bf16"], TINY["embedded HCA fp8"]


def run_poisoned(kernel: Any, inputs: AttendInputs) -> torch.Tensor:
    """A call whose output and workspace were full of NaN."""
    q, cos, sin, keys, rows, weights = inputs.arguments
    operand = kernel.prepare(weights)
    workspace = kernel.workspace(q, keys, rows, operand)
    if workspace is not None:
        workspace.fill_(torch.nan)
    out = torch.full_like(q, torch.nan)
    return kernel.run(q, cos, sin, keys, rows, operand, out=out, workspace=workspace)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
@pytest.mark.parametrize("kernel", [ATTEND, ATTEND_INVARIANT], ids=["default", "invariant"])
def test_small_heads(kernel: TritonAttend, case: AttendCase) -> None:
    inputs = make_attend_inputs(case, case.tokens[0], CPU)
    judge_attend(run_poisoned(kernel, inputs), inputs)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.label)
def test_64_and_128_heads(case: AttendCase) -> None:
    """In programs of 64 heads, two of them for 128."""
    inputs = make_attend_inputs(case, case.tokens[0], CPU)
    judge_attend(run_poisoned(ATTEND_INVARIANT, inputs), inputs)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_several_rows_of_a_request(case: AttendCase) -> None:
    """Each sees its own window and entries in a longer ring, whose other rows are NaN."""
    for group, first in ((2, 0), (4, 126)):
        inputs = make_attend_inputs(case, group + 1, CPU, first, torch.full((group + 1,), first), group)
        for kernel in (ATTEND, TWIN):
            judge_attend(run_poisoned(kernel, inputs), inputs)


@pytest.mark.parametrize("kernel", [ATTEND_INVARIANT, TWIN], ids=["invariant", "twin"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], CSA], ids=lambda case: case.label)
def test_the_length_of_a_ring_changes_no_bit(kernel: Any, case: AttendCase) -> None:
    """Nor what it holds besides."""
    for position in (100, 127, 128, 299):
        inputs = make_attend_inputs(case, 2, CPU, positions=torch.full((2,), position))
        assert torch.equal(run_poisoned(kernel, with_spare(inputs)), run_poisoned(kernel, inputs))


def with_spare(inputs: AttendInputs) -> AttendInputs:
    """The same keys in rings that are longer by 8 rows of zeros."""
    rows, is_fp8 = inputs.rows, inputs.keys.is_fp8
    window = StoredKeys(inputs.keys.window, torch.bfloat16, KEY_PAGES if is_fp8 else None)
    count, age = len(rows.slots_T) + 1, torch.arange(128)
    shape = (count, 136 * 584) if is_fp8 else (count * 136, 512)
    longer = replace(window, memory=window.memory.new_zeros(shape))
    position_TK = rows.positions_T[:, None] - age
    old, new = (rows.slots_T[:, None] * ring + position_TK % ring for ring in (128, 136))
    written = position_TK >= 0
    longer.write(new[written].long(), window.read(old[written].long()))
    weights = replace(inputs.weights, spare=8)
    return replace(inputs, keys=inputs.keys._replace(window=longer.memory), weights=weights)


def test_few_rows_of_64_heads_are_split_by_heads() -> None:
    inputs = make_attend_inputs(TINY["flash CSA bf16"], 1, CPU)
    assert ATTEND.form(inputs.q_TNH, inputs.keys, inputs.rows).heads == 16
    judge_attend(run_poisoned(ATTEND, inputs), inputs)


@pytest.mark.parametrize("label", ["embedded CSA bf16", "embedded CSA fp8"])
def test_official_norm_of_queries(label: str) -> None:
    """Every operation of the norm rounds: bit by bit what torch does on bfloat16, but for the order of a sum."""
    inputs = make_attend_inputs(TINY[label], 5, CPU)
    stepwise = replace(inputs, weights=replace(inputs.weights, is_stepwise=True))
    found = run_poisoned(ATTEND, stepwise)
    judge_attend(found, stepwise)
    apart = [(found - attend(*one.arguments)).norm() for one in (stepwise, inputs)]
    assert apart[0] < 0.7 * apart[1], "it is nearer to its own twin"


@pytest.mark.parametrize("case", [CSA, HCA], ids=lambda case: case.label)
def test_memory_does_not_matter(case: AttendCase) -> None:
    """As ``ownpath verify`` asks of every slot (K02)."""
    inputs = make_attend_inputs(case, 3, CPU)
    assert not memory_problem(KernelCall(case.label, OpKind.ATTEND, ATTEND, inputs.arguments))


def test_no_rows() -> None:
    assert ATTEND(*make_attend_inputs(CSA, 4, CPU).first(0).arguments).shape == (0, 4, 512)


@pytest.mark.parametrize("case", [CSA, HCA], ids=lambda case: case.label)
def test_a_row_does_not_depend_on_its_neighbours(case: AttendCase) -> None:
    """Nor, in the invariant kernel, on their number or the width of the tables; nor on where its memory lies."""
    inputs = make_attend_inputs(case, 5, CPU)
    whole = run_poisoned(ATTEND_INVARIANT, inputs)
    assert torch.equal(run_poisoned(ATTEND_INVARIANT, inputs.first(2)), whole[:2])
    wider = torch.cat((inputs.rows.blocks_TB, torch.full_like(inputs.rows.blocks_TB, 2**30)), dim=1)
    spread = replace(inputs, rows=inputs.rows._replace(blocks_TB=wider))
    assert torch.equal(run_poisoned(ATTEND_INVARIANT, spread), whole)
    assert torch.equal(run_poisoned(ATTEND_INVARIANT, moved(inputs)), whole)


def moved(inputs: AttendInputs) -> AttendInputs:
    """The same rows with their blocks elsewhere in the pool; lists keep their order."""
    keys, rows = inputs.keys, inputs.rows
    assert keys.entries is not None
    page_rows = 1 if keys.is_fp8 else keys.per_block
    pages = keys.entries.unflatten(0, (-1, page_rows))
    place = torch.arange(len(pages)) + 7
    entries = torch.full((len(pages) + 7, *pages.shape[1:]), 255 if keys.is_fp8 else torch.nan, dtype=pages.dtype)
    entries[place] = pages
    blocks = torch.where(rows.blocks_TB < 2**30, rows.blocks_TB + 7, rows.blocks_TB)
    rows = rows._replace(blocks_TB=blocks)
    if rows.selected_TK is not None:
        shifted = rows.selected_TK + 7 * keys.per_block
        rows = rows._replace(selected_TK=torch.where(rows.selected_TK < 2**30, shifted, rows.selected_TK))
    return replace(inputs, keys=keys._replace(entries=entries.flatten(0, 1)), rows=rows)


@pytest.mark.parametrize("kernel", [ATTEND, ATTEND_INVARIANT, TWIN], ids=["free", "invariant", "twin"])
def test_queries_may_lie_in_wider_rows(kernel: Any) -> None:
    """As in a product that has the index queries behind them."""
    inputs = make_attend_inputs(CSA, 3, CPU)
    operand = kernel.prepare(inputs.weights)
    wide, dense = (kernel.run(*of.arguments[:5], operand) for of in (inputs.sliced(), inputs))
    assert torch.equal(wide, dense)


def test_padded_rows_are_nobodys() -> None:
    """Rows of slot 0, whose memory is NaN, change nothing for the others."""
    inputs = make_attend_inputs(CSA, 4, CPU)
    alone = run_poisoned(ATTEND, inputs)
    rows = map_rows(torch.clone, inputs.rows)
    for part in rows:
        part[2] = 0
    padded = run_poisoned(ATTEND, replace(inputs, rows=rows))
    for t in (0, 1, 3):
        assert torch.equal(padded[t], alone[t])


@pytest.mark.parametrize("label", ["embedded CSA bf16", "embedded HCA bf16"])
def test_counts_beyond_lists_and_tables_stay_inside(label: str) -> None:
    """A row that ran on past its end, or a count that is not one, reads no list or table of others."""
    inputs = make_attend_inputs(TINY[label], 4, CPU)
    whole = run_poisoned(ATTEND, inputs)
    rows = map_rows(lambda part: torch.where(part == 2**30, 0, part), inputs.rows)
    if rows.num_selected_T is not None:
        rows.num_selected_T[3] = 2**20
    else:
        rows.positions_T[3] = 2**30
    assert torch.equal(run_poisoned(ATTEND, replace(inputs, rows=rows))[:3], whole[:3])


def test_every_fp8_code_is_read_exactly() -> None:
    """With one key and no sink the result is that key: all codes, subnormal ones too, under scales of all sizes."""
    num_rows, per_row = 8, 448
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scales = torch.tensor([0, 1, 60, 105, 120, 126, 127, 128, 134, 135, 140, 150], dtype=torch.uint8)
    window = torch.full((num_rows + 1, 128 * 584), 255, dtype=torch.uint8)
    for row in range(num_rows):
        window[row + 1, :per_row] = codes[(torch.arange(per_row) + 131 * row) % len(codes)]
        window[row + 1, 448:576] = torch.randn(64).bfloat16().view(torch.uint8)
        window[row + 1, 128 * 576 : 128 * 576 + 7] = scales[(torch.arange(7) + 7 * row) % len(scales)]
    wanted = decode_pages(window, torch.bfloat16).view(num_rows + 1, 128, 512)[1:, 0]
    numbers = torch.arange(num_rows, dtype=torch.int32)
    rows = DecodeRows(torch.zeros_like(numbers), numbers + 1, torch.zeros(num_rows, 1, dtype=torch.int32))
    q, still = torch.zeros(num_rows, 4, 512, dtype=torch.bfloat16), torch.zeros(num_rows, 32)
    weights = AttendWeights(torch.full((4,), -1e30), 512**-0.5, 1e-6)
    found = ATTEND(q, still + 1, still, DecodeKeys(window), rows, weights)
    assert wanted.isfinite().all()
    assert torch.equal(found, wanted[:, None].expand_as(found))


WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "q float32": (lambda i: replace(i, q_TNH=i.q_TNH.float()), "q_TNH"),
    "q narrow": (lambda i: replace(i, q_TNH=i.q_TNH[..., :256]), "q_TNH"),
    "q strided": (lambda i: replace(i, q_TNH=i.q_TNH.transpose(1, 2).contiguous().transpose(1, 2)), "q_TNH"),
    "angles": (lambda i: replace(i, cos_TF=i.cos_TF[:, :16].contiguous()), "cos_TF"),
    "angles bf16": (lambda i: replace(i, sin_TF=i.sin_TF.bfloat16()), "sin_TF"),
    "sink": (lambda i: replace(i, weights=replace(i.weights, sink_N=i.weights.sink_N[:2])), "sink_N"),
    "spare": (lambda i: replace(i, weights=replace(i.weights, spare=4)), "spare"),
    "ring": (lambda i: replace(i, weights=replace(i.weights, spare=8)), "window"),
    "rotary": (lambda i: replace(i, weights=replace(i.weights, num_rotary=32)), "num_rotary"),
    "window": (lambda i: replace(i, keys=i.keys._replace(window=i.keys.window[:-1])), "window"),
    "entries": (lambda i: replace(i, keys=i.keys._replace(entries=None)), "entries"),
    "entries fp8": (lambda i: replace(i, keys=i.keys._replace(entries=i.keys.entries.view(torch.uint8))), "entries"),
    "ratio": (lambda i: replace(i, keys=i.keys._replace(ratio=8)), "ratio"),
    "per block": (lambda i: replace(i, keys=i.keys._replace(per_block=2)), "per_block"),
    "positions": (lambda i: with_rows(i, positions_T=i.rows.positions_T.long()), "positions_T"),
    "slots": (lambda i: with_rows(i, slots_T=i.rows.slots_T[:2]), "slots_T"),
    "blocks": (lambda i: with_rows(i, blocks_TB=i.rows.blocks_TB[:, :0]), "blocks_TB"),
    "selection": (lambda i: with_rows(i, selected_TK=None), "selected_TK"),
    "counts": (lambda i: with_rows(i, num_selected_T=i.rows.num_selected_T.long()), "num_selected_T"),
}


def with_rows(inputs: AttendInputs, **parts: Any) -> AttendInputs:
    return replace(inputs, rows=inputs.rows._replace(**parts))


@pytest.mark.parametrize(("wrong", "name"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments_are_named(wrong: Any, name: str) -> None:
    inputs = make_attend_inputs(CSA, 3, CPU)
    with pytest.raises(ValueError, match=name):
        ATTEND(*wrong(inputs).arguments)


def test_wrong_out_and_workspace_are_named() -> None:
    inputs = make_attend_inputs(CSA, 3, CPU)
    operand = ATTEND.prepare(inputs.weights)
    with pytest.raises(ValueError, match="out"):
        ATTEND.run(*inputs.arguments[:5], operand, out=torch.empty(3, 4, 256, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="workspace"):
        ATTEND.run(*inputs.arguments[:5], operand, workspace=torch.empty(7))
