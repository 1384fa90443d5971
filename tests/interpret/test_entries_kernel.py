"""The kernel of a decode step's cache writes, interpreted, against float64; its twin by the same judge."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ownpath.conformance.entries import WritingStep, draw_step, judge_rounded, judge_step, with_pages
from ownpath.formats import KeyFormat
from ownpath.kernels.angles.launch import STEP_ANGLES
from ownpath.kernels.angles.ref import step_angles
from ownpath.kernels.angles.types import Frequencies, views_of
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.entries.cases import CASES
from ownpath.kernels.entries.launch import ENTRIES, num_parts, num_slices
from ownpath.kernels.entries.types import KeyRounding
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import INDEX_FORMS

CPU = torch.device("cpu")


def label(case: KernelCase) -> str:
    return case.label


TINY = [(case, num_rows) for case in CASES if case.tiny for num_rows in case.tokens]
NAMES = ("triton.entries", "ref.entries")
CSA = next(case for case in CASES if case.label == "csa narrow")
HCA = next(case for case in CASES if case.label == "hca narrow")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "num_rows"), TINY, ids=lambda value: getattr(value, "label", str(value)))
def test_what_a_step_writes(name: str, case: KernelCase, num_rows: int) -> None:
    """Every element, nothing else, and nothing read that is not the row's own: that is NaN."""
    step = draw_step(case, num_rows, CPU)
    written = step.copy()
    KERNELS[name](*written.arguments)
    judge_step(step, written)


@pytest.mark.parametrize("residue", [0, 1, 2, 3, 63, 126, 127])
def test_every_residue(residue: int) -> None:
    """First, second and later windows; in the last row a block's last entry."""
    for case in (CSA, HCA):
        step = draw_step(case, 4, CPU, seed=residue, positions=[residue + 128 * number for number in (0, 1, 3, 5)])
        written = step.copy()
        ENTRIES(*written.arguments)
        judge_step(step, written)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [2, 4, 9])
def test_several_rows_of_a_request(name: str, group: int) -> None:
    """First, second and later windows end at each row of a step; rings are NaN where the step writes. Where the first
    request's rows end, the second's begin: its windows reach back over them."""
    for case in (CSA, HCA):
        for first in (0, 3, 126, 251):
            step = draw_step(case, 2 * group, CPU, first, [first] * group + [first + group] * group, group)
            written = step.copy()
            KERNELS[name](*written.arguments)
            judge_step(step, written)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [CSA, HCA], ids=label)
def test_how_rows_are_grouped_changes_no_bit(name: str, case: KernelCase) -> None:
    """Rows of two requests, in steps of any number of them."""
    step = draw_step(case, 12, CPU, positions=[121] * 6 + [252] * 6, group=6)
    whole = step.copy()
    KERNELS[name](*whole.arguments)
    for sizes in ([1] * 12, [6, 6], [2, 4, 1, 3, 2], [3, 5, 4]):
        cut, start = step.copy(), 0
        for size in sizes:
            KERNELS[name](*cut.part(slice(start, start + size)).arguments)
            start += size
        for found, wanted in zip(cut.pools, whole.pools, strict=True):
            assert found is None or wanted is None or torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [CSA, HCA], ids=label)
def test_rows_that_are_taken_back_leave_nothing(name: str, case: KernelCase) -> None:
    """Drafts at up to 9 positions, some ending windows, are written over: the rows of rings and the entries that a run
    without them has written have its bits."""
    for kept in (0, 1, 5):
        drafted = draw_step(case, 9, CPU, positions=[121] * 9, group=9)
        right = draw_step(case, 9, CPU, positions=[121 + kept] * 9, group=9, seed=1)
        right = replace(right, weights=drafted.weights, rows=right.rows._replace(slots_T=drafted.rows.slots_T))
        right = replace(right, rows=right.rows._replace(blocks_TB=drafted.rows.blocks_TB), pools=drafted.pools)
        without, beside = right.copy(), right.copy()
        if kept:
            KERNELS[name](*replace(drafted, pools=without.pools).part(slice(kept)).arguments)
        KERNELS[name](*without.arguments)
        KERNELS[name](*replace(drafted, pools=beside.pools).arguments)
        KERNELS[name](*beside.arguments)
        for found, wanted in zip(beside.pools, without.pools, strict=True):
            if found is not None and wanted is not None:
                of_both = ~wanted.isnan().any(1)
                assert of_both.any()
                assert torch.equal(bits(found)[of_both], bits(wanted)[of_both])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_pages_of_longer_rings(name: str, kind: str) -> None:
    case = next(case for case in CASES if case.tiny and case.label == kind)
    step = draw_step(case, 8, CPU, positions=[126] * 4 + [254] * 4, group=4)
    paged = with_pages(step.copy())
    KERNELS[name](*step.arguments)
    KERNELS[name](*paged.arguments)
    judge_rounded(step, paged)


def test_parts_of_several_slices() -> None:
    """Fewer programs share an entry of a step with many rows, and each has several slices of it."""
    case = next(case for case in CASES if case.tiny and case.label == "hca")
    step = draw_step(case, 17, CPU, positions=[127, 383, *range(15)])
    written = step.copy()
    ENTRIES(*written.arguments)
    assert 1 < num_parts(17, step.weights) < num_slices(step.weights)
    judge_step(step, written)


def test_a_prepared_operand_serves_every_step() -> None:
    """The counters of shared entries are clear after each step, whatever its rows."""
    for case in (CSA, HCA):
        steps = [draw_step(case, num_rows, CPU, seed=num_rows) for num_rows in (3, 1, 5)]
        operand = ENTRIES.prepare(steps[0].weights)
        for step in steps:
            of_one_layer = replace(step, weights=operand.weights)
            written = of_one_layer.copy()
            ENTRIES.run(*written.arguments[:4], operand)
            assert not operand.arrivals.any()
            judge_step(of_one_layer, written)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    for case in (CSA, HCA):
        step = draw_step(case, 6, CPU)
        whole, part = step.copy(), step.first(3)
        ENTRIES(*whole.arguments)
        ENTRIES(*part.arguments)
        for found, of_whole, before in zip(part.pools, whole.pools, step.pools, strict=True):
            if found is not None and of_whole is not None and before is not None:
                written = ~bits(found).eq(bits(before)).all(1)
                assert torch.equal(bits(found)[written], bits(of_whole)[written])


def bits(pool: torch.Tensor) -> torch.Tensor:
    return pool.view(torch.int16 if pool.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", ["csa", "hca narrow"])
def test_roundings_to_fewer_bits(name: str, label: str) -> None:
    case = next(case for case in CASES if case.tiny and case.label == label)
    step = step_of_many_sizes(case)
    rounded = step.copy()
    rounded = replace(rounded, weights=replace(step.weights, keys=KeyRounding.FP8, index_keys=KeyRounding.FP4))
    KERNELS[name](*step.arguments)
    KERNELS[name](*rounded.arguments)
    judge_rounded(step, rounded)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index_keys", [KeyRounding.NONE, KeyRounding.FP4])
@pytest.mark.parametrize("index_format", INDEX_FORMS)
def test_pages(name: str, index_keys: KeyRounding, index_format: KeyFormat) -> None:
    """Reading pages gives the rounded keys, whose FP4 is exact in them; what is not written keeps its bytes."""
    step = step_of_many_sizes(next(case for case in CASES if case.tiny and case.label == "csa"))
    paged = with_pages(step.copy(), index_format)
    paged = replace(paged, weights=replace(step.weights, index_keys=index_keys))
    KERNELS[name](*step.arguments)
    KERNELS[name](*paged.arguments)
    judge_rounded(step, paged)


def test_pages_of_shared_entries() -> None:
    step = draw_step(next(case for case in CASES if case.tiny and case.label == "hca"), 2, CPU, positions=[127, 383])
    paged = with_pages(step.copy())
    ENTRIES(*step.arguments)
    ENTRIES(*paged.arguments)
    judge_rounded(step, paged)


def step_of_many_sizes(case: KernelCase) -> WritingStep:
    """Ordinary keys, tiny and huge ones, exact zeros, and rows that are not finite."""
    step = draw_step(case, 6, CPU)
    sizes = torch.tensor([1.0, 2.0**-14, 2.0**10, 0.0, 2.0**-20, torch.inf])
    raw = step.raw._replace(kv_TH=(step.raw.kv_TH * sizes[:, None]).bfloat16())
    norm = replace(step.weights.kv_norm, eps=1e-12)
    return replace(step, raw=raw, weights=replace(step.weights, kv_norm=norm))


def test_no_rows() -> None:
    step = draw_step(CSA, 2, CPU).first(0)
    written = step.copy()
    ENTRIES(*written.arguments)
    assert all(
        a is None or b is None or torch.equal(bits(a), bits(b)) for a, b in zip(step.pools, written.pools, strict=True)
    )


def _with_raw(**changes: object) -> Callable[[WritingStep], WritingStep]:
    return lambda step: replace(step, raw=step.raw._replace(**changes))


REFUSED: tuple[tuple[str, Callable[[WritingStep], WritingStep]], ...] = (
    ("kv_TH", lambda step: replace(step, raw=step.raw._replace(kv_TH=step.raw.kv_TH.float()))),
    ("main compressor needs", _with_raw(main_TP2=None)),
    ("index_TP2", lambda step: replace(step, raw=step.raw._replace(index_TP2=step.raw.main_TP2))),
    ("positions_T", lambda step: replace(step, rows=step.rows._replace(positions_T=step.rows.positions_T.long()))),
    ("slots_T", lambda step: replace(step, rows=step.rows._replace(slots_T=step.rows.slots_T[1:]))),
    ("blocks_TB", lambda step: replace(step, rows=step.rows._replace(blocks_TB=step.rows.blocks_TB[1:]))),
    ("cos_TF", lambda step: replace(step, angles=step.angles._replace(cos_TF=step.angles.cos_TF[1:]))),
    ("first_sin_TF", lambda step: replace(step, angles=step.angles._replace(first_sin_TF=None))),
    ("window", lambda step: replace(step, pools=step.pools._replace(window=step.pools.window[1:]))),
    ("main_state", lambda step: replace(step, pools=step.pools._replace(main_state=step.pools.index_state))),
    ("index_entries", lambda step: replace(step, pools=step.pools._replace(index_entries=step.pools.window))),
    (
        "ratios differ",
        lambda step: replace(step, weights=replace(step.weights, index=draw_step(HCA, 1, CPU).weights.main)),
    ),
)


@pytest.mark.parametrize(("named", "change"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(named: str, change: Callable[[WritingStep], WritingStep]) -> None:
    step = draw_step(CSA, 3, CPU)
    before = step.copy()
    with pytest.raises(ValueError, match=named):
        ENTRIES(*change(step).arguments)
    for old, new in zip(before.pools, step.pools, strict=True):
        assert old is None or new is None or torch.equal(bits(old), bits(new))


def test_angles_of_a_step() -> None:
    """Of positions up to a million: cosine and sine of the float32 angles, which every implementation computes."""
    num_pairs = 24
    frequencies = Frequencies(*(base ** (-torch.arange(num_pairs) / num_pairs) for base in (1e4, 1.6e5)))
    positions_T = torch.tensor([0, 3, 127, 128, 4096, 1_000_000], dtype=torch.int32)
    out = torch.full((8, len(positions_T), num_pairs), torch.nan)
    operand = STEP_ANGLES.prepare(frequencies)
    shifts = {"sliding": (0,), "csa": (0, -3), "hca": (0, -127)}
    for tables in (STEP_ANGLES.run(positions_T, operand, out=out), step_angles(positions_T, frequencies)):
        found = views_of(tables)
        for name, angles in zip(found._fields, found, strict=True):
            freqs_F = frequencies.sliding_F if name == "sliding" else frequencies.compress_F
            for shift, cos_TF, sin_TF in zip(shifts[name], angles[::2], angles[1::2], strict=False):
                wide_TF = ((positions_T + shift)[:, None].float() * freqs_F).double()
                torch.testing.assert_close(cos_TF.double(), wide_TF.cos(), rtol=0, atol=2**-22)
                torch.testing.assert_close(sin_TF.double(), wide_TF.sin(), rtol=0, atol=2**-22)
