"""The torch twin of decode attention against a formula written out key by key, and the judge against faults."""

import math
from dataclasses import replace

import pytest
import torch

from ownpath.cache.layout import BLOCK_TOKENS, entry_row, ring_row
from ownpath.conformance.attend import AttendInputs, judge_attend, make_attend_inputs, write_pages
from ownpath.kernels.attend.cases import AttendCase
from ownpath.kernels.attend.ref import attend, decode_pages
from ownpath.kernels.attend.types import AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.cache_formats.ref import fp8_keys

CPU = torch.device("cpu")
HEADS, DIM, PAIRS, WINDOW = 3, 512, 32, 128
LENGTHS = (1, 2, 4, 5, 64, 127, 128, 129, 255, 256, 257, 640, 700)
SELECT = 17


def rotated(vector: list[float], angles: list[float]) -> list[float]:
    """The last channels turned, pair by pair, as complex numbers."""
    turned = vector[: -2 * PAIRS]
    for pair, angle in enumerate(angles):
        first = DIM - 2 * PAIRS + 2 * pair
        number = complex(vector[first], vector[first + 1]) * complex(math.cos(angle), math.sin(angle))
        turned += [number.real, number.imag]
    return turned


def expected(q: torch.Tensor, keys: list[torch.Tensor], angles: list[float], sink: float, scale: float) -> torch.Tensor:
    """One head of one row: a dictionary of plain numbers, no tensor operation but the sums over channels."""
    mean = sum(value * value for value in q.tolist()) / DIM
    query = torch.tensor(rotated([value / math.sqrt(mean + 1e-6) for value in q.tolist()], angles)).double()
    scores = [math.fsum((query * key).tolist()) * scale for key in keys]
    total = math.exp(sink) + math.fsum(math.exp(score) for score in scores)
    summed = torch.zeros(DIM, dtype=torch.float64)
    for score, key in zip(scores, keys, strict=True):
        summed += math.exp(score) / total * key
    return torch.tensor(rotated(summed.tolist(), [-angle for angle in angles])).double()


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_twin_is_the_formula(ratio: int) -> None:
    """Keys are kept by position and entry number; ``cache.layout`` says where they lie."""
    torch.set_default_dtype(torch.float64)
    try:
        check_formula(ratio)
    finally:
        torch.set_default_dtype(torch.float32)


def check_formula(ratio: int) -> None:
    torch.manual_seed(ratio)
    num_rows, per_block = len(LENGTHS), BLOCK_TOKENS // ratio if ratio else 0
    slots = (1 + torch.randperm(num_rows)).tolist()
    tables = (1 + torch.randperm(3 * num_rows)).view(num_rows, 3).tolist()
    window = torch.full(((num_rows + 1) * WINDOW, DIM), torch.nan)
    entries = torch.full(((3 * num_rows + 1) * per_block, DIM), torch.nan) if ratio else None
    selected = torch.full((num_rows, SELECT), 2**30, dtype=torch.int32)
    counts = torch.zeros(num_rows, dtype=torch.int32)
    seen: list[list[torch.Tensor]] = []
    for t, length in enumerate(LENGTHS):
        keys = {position: torch.randn(DIM) for position in range(max(0, length - WINDOW), length)}
        for position, key in keys.items():
            window[ring_row(slots[t], position, WINDOW)] = key
        chosen = list(range(length // ratio)) if ratio else []
        if ratio == 4:
            chosen = sorted(torch.randperm(len(chosen))[:SELECT].tolist())
        compressed = [torch.randn(DIM) for _ in chosen]
        for entry, key in zip(chosen, compressed, strict=True):
            assert entries is not None
            entries[entry_row(tables[t], entry, per_block)] = key
        if ratio == 4:
            places = sorted(entry_row(tables[t], entry, per_block) for entry in chosen)
            selected[t, : len(places)] = torch.tensor(places)
            counts[t] = len(places)
        seen.append([*keys.values(), *compressed])
    angles = torch.rand(num_rows, PAIRS) * 7
    q, sink = torch.randn(num_rows, HEADS, DIM) * 3, torch.randn(HEADS)
    places_T = (torch.tensor(values, dtype=torch.int32) for values in ([n - 1 for n in LENGTHS], slots, tables))
    selection = (selected, counts) if ratio == 4 else ()
    keys_of_layer = DecodeKeys(window, entries, per_block, ratio)
    rows = DecodeRows(*places_T, *selection)
    found = attend(q, angles.cos(), angles.sin(), keys_of_layer, rows, AttendWeights(sink, 0.05, 1e-6))
    for t, keys_of_row in enumerate(seen):
        for n in range(HEADS):
            wanted = expected(q[t, n], keys_of_row, angles[t].tolist(), float(sink[n]), 0.05)
            torch.testing.assert_close(found[t, n], wanted, rtol=0, atol=1e-12)


def test_pages_hold_the_published_format() -> None:
    """Writing and reading pages is the rounding of ``cache_formats``; what was not written stays NaN."""
    torch.manual_seed(0)
    keys = torch.randn(40, DIM).bfloat16() * 10.0 ** torch.randint(-3, 4, (40, 1))
    keys = keys.bfloat16()
    for num_keys in (2, 64, 128):
        num_pages = -(-200 // num_keys)
        pages = torch.full((num_pages, num_keys * 584), 255, dtype=torch.uint8)
        rows = torch.randperm(num_pages * num_keys)[:40]
        write_pages(pages, rows, keys)
        read = decode_pages(pages, torch.bfloat16)
        assert torch.equal(read[rows], fp8_keys(keys, 64))
        others = torch.ones(len(read), dtype=torch.bool)
        others[rows] = False
        assert read[others].isnan().all()


def shorter_window(inputs: AttendInputs) -> AttendInputs:
    rows = inputs.rows._replace(positions_T=inputs.rows.positions_T.clamp(min=1) - 1)
    return replace(inputs, rows=rows)


def other_slots(inputs: AttendInputs) -> AttendInputs:
    return replace(inputs, rows=inputs.rows._replace(slots_T=inputs.rows.slots_T.roll(1)))


def one_selected_less(inputs: AttendInputs) -> AttendInputs:
    assert inputs.rows.num_selected_T is not None
    return replace(inputs, rows=inputs.rows._replace(num_selected_T=(inputs.rows.num_selected_T - 1).clamp(min=0)))


FAULTS = {
    "no sink": lambda i: replace(i, weights=replace(i.weights, sink_N=i.weights.sink_N - 50)),
    "sink of another head": lambda i: replace(i, weights=replace(i.weights, sink_N=i.weights.sink_N.roll(1))),
    "scale": lambda i: replace(i, weights=replace(i.weights, softmax_scale=i.weights.softmax_scale * 1.02)),
    "rotated the wrong way": lambda i: replace(i, sin_TF=-i.sin_TF),
    "position of the row before": shorter_window,
    "another slot": other_slots,
    "one entry less": one_selected_less,
}
CASE = AttendCase("faults", 4, 4, 700, 128)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_judge_sees_faults(fault: object) -> None:
    inputs = make_attend_inputs(CASE, 8, CPU)
    judge_attend(attend(*inputs.arguments), inputs)
    assert callable(fault)
    wrong = attend(*fault(inputs).arguments)
    with pytest.raises(AssertionError):
        judge_attend(wrong, inputs)


def test_judge_sees_a_missing_last_rotation() -> None:
    inputs = make_attend_inputs(CASE, 8, CPU)
    right = attend(*inputs.arguments)
    left_turned = right.clone()
    left_turned[..., -64:] = right[..., -64:].roll(2, dims=-1)
    with pytest.raises(AssertionError):
        judge_attend(left_turned, inputs)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_twin_reads_only_what_a_row_owns(ratio: int) -> None:
    for fp8 in (False, True):
        inputs = make_attend_inputs(AttendCase("poison", 4, ratio, 3000, 64 if ratio == 4 else 0, fp8=fp8), 15, CPU)
        assert attend(*inputs.arguments).isfinite().all()
