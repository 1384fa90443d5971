"""The sampler's kernel, interpreted, against its twin: the same tokens, faults and log-probabilities."""

import math
from typing import Any

import pytest
import torch
from support.sampling import filters, mixed_rows, next_step, plain_rows

from ownpath.engine.adjust import Adjuster
from ownpath.engine.request import Request, SamplingParams
from ownpath.kernels.sample.launch import SAMPLE, SampleShape, TritonSample, choose_shape
from ownpath.kernels.sample.ref import SAMPLE as SAMPLE_TWIN
from ownpath.kernels.sample.ref import sample
from ownpath.kernels.sample.types import Sampled, SampleRows


def outputs(num_rows: int) -> Sampled:
    token, fault = torch.full((2, num_rows), -7)
    return Sampled(token, fault, torch.full((num_rows,), math.nan))


def compare(logits: torch.Tensor, rows: SampleRows, kernel: TritonSample = SAMPLE) -> Sampled:
    """Runs both; log-probabilities are sums of up to 5000 terms in float32."""
    found, wanted = outputs(len(logits)), outputs(len(logits))
    kernel.run(logits, rows, kernel.prepare(), out=found)
    sample(logits, rows, wanted)
    assert torch.equal(found.token_T, wanted.token_T)
    assert torch.equal(found.fault_T, wanted.fault_T)
    assert found.logprob_T is not None
    assert wanted.logprob_T is not None
    sound = wanted.fault_T == 0
    if rows.place_T is not None:
        sound &= torch.zeros_like(sound).index_fill_(0, rows.place_T.long(), True)
    assert torch.allclose(found.logprob_T[sound], wanted.logprob_T[sound], rtol=0, atol=32 * 2**-20)
    return found


@pytest.mark.parametrize(("num_vocab", "spread"), [(1, 1.0), (37, 2.0), (2100, 3.0)])
def test_every_parameter(num_vocab: int, spread: float) -> None:
    """Ties are planted: logits on a grid of eighths."""
    g = torch.Generator().manual_seed(num_vocab)
    num_rows = 4
    logits = (torch.randn(num_rows, num_vocab, generator=g) * spread * 8).round() / 8
    compare(logits, mixed_rows(num_rows, num_vocab, g))


def test_rows_as_the_engine_adjusts_them() -> None:
    """512 places, of which most are empty or nearly all are used; tables and none; barred tokens that are likeliest."""
    num_vocab = 1100
    logits = torch.randn(5, num_vocab, generator=torch.Generator().manual_seed(6)) * 2
    logits[:, [1, 1030]] = 30.0
    ends = frozenset(range(1024, 1024 + 70))
    fields: list[dict[str, Any]] = [
        {"min_tokens": 9, "logit_bias": tuple((n, (n % 7) - 3.0) for n in range(0, 900, 3)), "top_p": 0.9},
        {"min_tokens": 2, "logit_bias": ((1, 5.0),)},
        {"repetition_penalty": 1e-45},
        {"presence_penalty": 2.0, "frequency_penalty": -0.5, "top_k": 7},
        {"min_tokens": 9, "stop_token_ids": frozenset((1, 5000)), "repetition_penalty": 2.0},
    ]
    adjuster, requests = Adjuster(num_vocab, torch.device("cpu"), ends), []
    for n, own in enumerate(fields):
        request = Request([1, n, 7], SamplingParams(9, 0.8 * (n != 2), seed=n, **own), lambda output: None)
        request.output_ids += [1, 1, 1030, 40 + n]
        adjuster.add(request)
        requests.append(request)
    adjusted = adjuster.rows_of(requests)
    assert adjusted is not None
    assert adjusted.place_T is not None
    assert adjusted.place_T.tolist() == [0, 1, 2, 3, 4]
    found = compare(logits, adjusted).token_T.tolist()
    assert not {found[0], found[4]} & ends
    assert found[1] == 1
    assert found[4] != 1


@pytest.mark.parametrize("places", [[4, 0, 2], [1], [0, 1, 2, 3, 4, 5]])
def test_rows_with_places_leave_the_others_as_they_are(places: list[int]) -> None:
    """Each has its own parameters, and the token that it has without places."""
    g, num_vocab = torch.Generator().manual_seed(len(places)), 1100
    logits, rows = torch.randn(6, num_vocab, generator=g) * 2, mixed_rows(len(places), num_vocab, g)
    placed = rows._replace(place_T=torch.tensor(places, dtype=torch.int32))
    found, alone = compare(logits, placed), compare(logits[places], rows)
    others = [row for row in range(6) if row not in places]
    assert found.logprob_T is not None
    assert found.logprob_T[others].isnan().all()
    for part, own in zip(found[:2], alone[:2], strict=True):
        assert part is not None
        assert own is not None
        assert part[places].tolist() == own.tolist()
        assert part[others].tolist() == [-7] * len(others)


def test_programs_share_a_row() -> None:
    """Without filters the last program finishes, so that rows can be shared where one runs after the other; with pads
    behind the vocabulary, and the largest logits in every program's share."""
    logits = torch.full((5, 3200), math.nan)[:, :3100]
    logits[:] = torch.randn(5, 3100, generator=torch.Generator().manual_seed(2))
    logits[0, [900, 1100, 3099]] = logits[1, 3099] = logits[2, 0] = 60.0
    rows = plain_rows(5)._replace(temperature_T=torch.tensor([0.0, 1.0, 1e-3, 1.5, 0.0]))
    found = compare(logits, rows, TritonSample(SampleShape(3, 256, 4)))
    assert found.token_T[:3].tolist() == [900, 3099, 0]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(40, 1.0, 0.0), (0, 0.03, 0.0), (0, 1.0, 0.9)])
def test_rounds_on_a_flat_row(top_k: int, top_p: float, min_p: float) -> None:
    """The first winner is out nearly always: several rounds follow."""
    logits = torch.randn(1, 1100, generator=torch.Generator().manual_seed(top_k)) * 0.3
    compare(logits, plain_rows(1)._replace(filters=filters(1, top_k, top_p, min_p)))


@pytest.mark.parametrize("with_filters", [False, True])
def test_faults(with_filters: bool) -> None:
    """Rows with a fault end, and change no neighbour."""
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    for row, bad in enumerate((math.nan, math.inf, -math.inf)):
        logits[row, 69 - row] = bad
    mask = torch.full((5, 3), -1, dtype=torch.int32)
    mask[3] = torch.tensor([0, 0, -(2**31)], dtype=torch.int32)
    rows = plain_rows(5)._replace(mask_TW=mask, filters=filters(5, 3, 0.5) if with_filters else None)
    assert compare(logits, rows).fault_T.tolist() == [1, 1, 1, 2, 0]


def test_nothing_is_left_behind() -> None:
    """Counters are zero after a call, so that a captured graph can be replayed."""
    kernel, rows = TritonSample(), plain_rows(2)._replace(filters=filters(2, 2))
    operand = kernel.prepare()
    for _ in range(2):
        kernel.run(torch.randn(2, 50), rows, operand, out=outputs(2))
        assert not operand.scratch_for(2, torch.device("cpu")).counters.any()


def replaced(rows: SampleRows, name: str, value: torch.Tensor) -> SampleRows:
    """Rows with one tensor of their filters, penalties or bias, or their own, replaced."""
    for part in ("filters", "penalties", "bias"):
        held = getattr(rows, part)
        if name in held._fields:
            return rows._replace(**{part: held._replace(**{name: value})})
    return rows._replace(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature_T", torch.zeros(3)),
        ("temperature_T", torch.zeros(2, dtype=torch.float64)),
        ("seed_T", torch.zeros(2, dtype=torch.int32)),
        ("index_T", torch.zeros(4, dtype=torch.int32)[::2]),
        ("top_k_T", torch.zeros(2)),
        ("top_p_T", torch.zeros(1)),
        ("tables_RV", torch.zeros(2, 9, dtype=torch.int32)),
        ("presence_T", torch.zeros(2, dtype=torch.bfloat16)),
        ("ids_TK", torch.zeros(2, 9, dtype=torch.int64)),
        ("values_TK", torch.zeros(2, 8)),
        ("counts_T", torch.zeros(2)),
        ("mask_TW", torch.zeros(2, 3, dtype=torch.int32)),
        ("place_T", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_wrong_rows_are_refused_by_name(name: str, value: torch.Tensor) -> None:
    rows = replaced(mixed_rows(2, 10, torch.Generator().manual_seed(0)), name, value)
    with pytest.raises(ValueError, match=name):
        SAMPLE.run(torch.zeros(2, 10), rows, SAMPLE.prepare(), out=outputs(2))


@pytest.mark.parametrize("logits", [torch.zeros(2, 10).double(), torch.zeros(2, 20)[:, ::2], torch.zeros(10)])
def test_wrong_logits_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits_TV"):
        SAMPLE.run(logits, plain_rows(2), SAMPLE.prepare())


def test_how_rows_are_shared() -> None:
    """Never more programs than the device holds at once, beyond one a row; none without a block."""
    for num_rows in range(1, 300):
        for num_vocab in (1, 1024, 2560, 129280):
            shape = choose_shape(num_rows, num_vocab, 528)
            assert shape.splits == 1 or shape.splits * num_rows <= 528
            assert (shape.splits - 1) * 4 * shape.block < num_vocab
            assert 1 <= shape.splits <= 128


def test_no_rows() -> None:
    assert SAMPLE.run(torch.zeros(0, 5), plain_rows(0), SAMPLE.prepare()).token_T.shape == (0,)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_go_on_as_the_twins_do(splits: int) -> None:
    """Three steps whose rows count up and whose results lie in two copies in turn, and a second draw over the third's:
    token, position, number of drawn tokens and every result, of what the step has and of nothing else."""
    g, num_vocab, count = torch.Generator().manual_seed(splits), 1100, 3
    kernel = TritonSample(SampleShape(splits, 256, 4))
    operand, placed = kernel.prepare(), torch.tensor([2, 0], dtype=torch.int32)
    (found, ours), (wanted, twins) = next_step(count, 6), next_step(count, 6)
    for step, num_rows in enumerate((count, count, count, len(placed))):
        logits, rows = torch.randn(count, num_vocab, generator=g) * 2, mixed_rows(num_rows, num_vocab, g, step > 1)
        logits[1, 7] = math.nan
        rows = rows._replace(place_T=placed if num_rows < count else None)
        if splits > 1:  # the interpreter runs programs one by one, and those of a row with filters wait for each other
            rows = rows._replace(filters=None)
        before = twins.turn_W.clone()
        kernel.run(logits, rows, operand, out=found, following=ours)
        SAMPLE_TWIN.run(logits, rows, None, out=wanted, following=twins)
        for name, own, other in zip(ours._fields, ours, twins, strict=True):
            is_float = name in ("results_NW", "shared_2NW")
            own, other = (
                torch.cat((part[..., :2, :], part[..., 3:, :]), -2) if is_float else part for part in (own, other)
            )
            assert torch.equal(own, other), (step, name)
        logprobs = [part.shared_2NW[:, 2, :count].view(torch.float32) for part in (ours, twins)]
        sound = twins.shared_2NW[:, 1, :count] == 0
        assert torch.allclose(logprobs[0][sound], logprobs[1][sound], rtol=0, atol=32 * 2**-20)
        assert torch.equal(
            twins.turn_W != before, torch.arange(64) < count if num_rows == count else torch.zeros(64) > 0
        )


def test_what_a_step_leaves_is_checked() -> None:
    logits, rows, operand = torch.randn(4, 50), plain_rows(4), SAMPLE.prepare()
    found, following = next_step(4, 5)
    for wrong, message in (
        (following._replace(pad_W=following.pad_W[:8]), "pad_W must have shape"),
        (following._replace(turn_W=following.turn_W.long()), "turn_W must be torch.int32"),
        (following._replace(results_NW=following.results_NW[:2]), "results_NW must have 3 rows or more"),
        (following._replace(shared_2NW=following.shared_2NW[:1]), "shared_2NW must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            SAMPLE.run(logits, rows, operand, out=found, following=wrong)
    with pytest.raises(ValueError, match="out must have tokens of int32 and log-probs"):
        SAMPLE.run(logits, rows, operand, out=outputs(4), following=following)
