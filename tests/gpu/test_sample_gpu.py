"""The sampler on the device: the twin's tokens, repetition, graphs, rows that share programs, no allocation."""

import math
from typing import TypeVar

import pytest
import torch
from support.sampling import filters, mixed_rows, next_step, plain_rows

from ownpath.engine.request import SamplingParams
from ownpath.engine.sampler import SampleRow, choose_tokens
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.sample.launch import SampleShape, TritonSample
from ownpath.kernels.sample.ref import SAMPLE as SAMPLE_TWIN
from ownpath.kernels.sample.ref import gumbel, sample, weights
from ownpath.kernels.sample.types import Sampled, SampleRows

pytestmark = pytest.mark.gpu

VOCAB = 129280
SAMPLE: TritonSample = KERNELS["triton.sample"]
Moved = TypeVar("Moved")


def moved(value: Moved, device: torch.device) -> Moved:
    """Rows or their parts on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return value if value is None else type(value)(*(moved(part, device) for part in value))  # type: ignore[attr-defined]


def outputs(num_rows: int, device: torch.device) -> Sampled:
    token, fault = torch.full((2, num_rows), -7, device=device)
    return Sampled(token, fault, torch.full((num_rows,), math.nan, device=device))


def assert_equal(found: Sampled, logits: torch.Tensor, rows: SampleRows) -> None:
    """Tokens and faults are the CPU's; log-probabilities within rounding of sums of V terms, of values below 64."""
    wanted = outputs(len(logits), torch.device("cpu"))
    sample(logits.cpu(), rows, wanted)
    assert torch.equal(found.token_T.cpu(), wanted.token_T)
    assert torch.equal(found.fault_T.cpu(), wanted.fault_T)
    assert found.logprob_T is not None
    assert wanted.logprob_T is not None
    sound = wanted.fault_T == 0
    assert torch.allclose(found.logprob_T.cpu()[sound], wanted.logprob_T[sound], rtol=0, atol=64 * 2**-20)


CASES = [(1, 1), (3, 37), (33, 2560), (1, VOCAB), (8, VOCAB), (64, VOCAB), (150, 5000), (600, 1100)]


@pytest.mark.parametrize(("num_rows", "num_vocab"), CASES)
@pytest.mark.parametrize("with_all", [False, True])
def test_choices_are_the_cpus(num_rows: int, num_vocab: int, with_all: bool, cuda: torch.device) -> None:
    """Every parameter, with ties planted; the same again in a second and third call."""
    g = torch.Generator().manual_seed(num_rows)
    logits = (torch.randn(num_rows, num_vocab, generator=g) * 24).round() / 8
    rows = mixed_rows(num_rows, num_vocab, g, with_all)
    on_device, operand = moved(rows, cuda), SAMPLE.prepare()
    for _ in range(3):
        found = outputs(num_rows, cuda)
        SAMPLE.run(logits.to(cuda), on_device, operand, out=found)
        assert_equal(found, logits, rows)


@pytest.mark.parametrize("places", [[5, 0, 9], [3], [*range(12)]])
def test_rows_with_places_leave_the_others_as_they_are(places: list[int], cuda: torch.device) -> None:
    """As grammars and penalties have it: some rows of a step are drawn again, over the step's own results."""
    g = torch.Generator().manual_seed(len(places))
    logits, rows = torch.randn(12, VOCAB, generator=g) * 2, mixed_rows(len(places), VOCAB, g)
    placed = moved(rows._replace(place_T=torch.tensor(places, dtype=torch.int32)), cuda)
    found, operand = outputs(12, cuda), SAMPLE.prepare()
    SAMPLE.run(logits.to(cuda), placed, operand, out=found)
    others = [row for row in range(12) if row not in places]
    assert found.token_T[others].tolist() == found.fault_T[others].tolist() == [-7] * len(others)
    assert found.logprob_T is not None
    own = Sampled(found.token_T[places], found.fault_T[places], found.logprob_T[places])
    assert_equal(own, logits[places], rows)


@pytest.mark.parametrize("shape", [SampleShape(1, 256, 4), SampleShape(7, 256, 4), SampleShape(4, 1024, 16)])
@pytest.mark.parametrize(("top_k", "top_p"), [(20, 1.0), (0, 0.3), (1, 1.0)])
def test_rounds_on_flat_rows(shape: SampleShape, top_k: int, top_p: float, cuda: torch.device) -> None:
    """However the row is shared: the first winner is out nearly always."""
    logits, kernel = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(top_k)), TritonSample(shape)
    rows = plain_rows(16)._replace(filters=filters(16, top_k, top_p))
    found = outputs(16, cuda)
    kernel.run(logits.to(cuda), moved(rows, cuda), kernel.prepare(), out=found)
    assert_equal(found, logits, rows)


def test_faults_and_padding(cuda: torch.device) -> None:
    """Rows lie further apart than the vocabulary; what is behind it is not read."""
    wide = torch.full((9, 1300), math.nan)
    wide[:, :1200] = torch.randn(9, 1200, generator=torch.Generator().manual_seed(0))
    for row, bad in ((1, math.nan), (3, math.inf), (5, -math.inf)):
        wide[row, 1199 - row] = bad
    rows = plain_rows(9)._replace(filters=filters(9, 5, 0.9))
    found = outputs(9, cuda)
    SAMPLE.run(wide.to(cuda)[:, :1200], moved(rows, cuda), SAMPLE.prepare(), out=found)
    assert_equal(found, wide[:, :1200], rows)


def test_a_graph_follows_its_rows(cuda: torch.device) -> None:
    """Replays read the parameters that lie in the arrays then, and allocate nothing."""
    g = torch.Generator().manual_seed(1)
    logits, fresh = torch.randn(8, VOCAB, generator=g), torch.randn(8, VOCAB, generator=g) * 2
    rows, new_rows = (mixed_rows(8, VOCAB, g) for _ in range(2))
    on_device, given, found, operand = moved(rows, cuda), logits.to(cuda), outputs(8, cuda), SAMPLE.prepare()
    SAMPLE.run(given, on_device, operand, out=found)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    SAMPLE.run(given, on_device, operand, out=found)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        SAMPLE.run(given, on_device, operand, out=found)
    given.copy_(fresh)
    for old, new in zip(leaves(on_device), leaves(new_rows), strict=True):
        old.copy_(new)
    for _ in range(20):
        found.token_T.fill_(-7)
        graph.replay()
        assert_equal(found, fresh, new_rows)


@pytest.mark.parametrize("count", [1, 8, 200])
def test_rows_go_on_as_the_twins_do(count: int, cuda: torch.device) -> None:
    """Replays of a graph write what the next step and the host read, the host's to its own memory, in turn; a second
    draw of some rows goes over the last of them."""
    g, width = torch.Generator().manual_seed(count), 256
    logits, rows = torch.randn(count, VOCAB, generator=g) * 2, mixed_rows(count, VOCAB, g, with_all=False)
    on_device, given, operand = moved(rows, cuda), logits.to(cuda), SAMPLE.prepare()
    (found, ours), (wanted, twins) = next_step(count, 46, cuda, width), next_step(count, 46, None, width)
    SAMPLE.run(given, on_device, operand, out=found, following=ours)
    SAMPLE_TWIN.run(logits, rows, None, out=wanted, following=twins)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        SAMPLE.run(given, on_device, operand, out=found, following=ours)
    for is_placed in (False, False, True):
        if is_placed:
            places = torch.arange(count - 1, -1, -2, dtype=torch.int32)
            some = mixed_rows(len(places), VOCAB, g)._replace(place_T=places)
            SAMPLE.run(given, moved(some, cuda), operand, out=found, following=ours)
            SAMPLE_TWIN.run(logits, some, None, out=wanted, following=twins)
        else:
            graph.replay()
            SAMPLE_TWIN.run(logits, rows, None, out=wanted, following=twins)
        torch.cuda.synchronize()
        for name, own, other in zip(ours._fields, ours, twins, strict=True):
            own = own.cpu().clone()
            if name in ("results_NW", "shared_2NW"):
                logprobs = [part[..., 2, :count].view(torch.float32) for part in (own, other)]
                sound = other[..., 1, :count] == 0
                assert torch.allclose(*(part[sound] for part in logprobs), rtol=0, atol=64 * 2**-20)
                own[..., 2, :] = other[..., 2, :]
            assert torch.equal(own, other), name


def leaves(value: object) -> list[torch.Tensor]:
    """The tensors of rows."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else []


def test_a_row_does_not_depend_on_its_neighbours(cuda: torch.device) -> None:
    g = torch.Generator().manual_seed(2)
    logits, rows = torch.randn(40, 9000, generator=g).to(cuda), moved(mixed_rows(40, 9000, g, with_all=False), cuda)
    together = SAMPLE.run(logits, rows, SAMPLE.prepare()).token_T
    assert rows.filters is not None
    for n in (0, 7, 39):
        own = SampleRows(*(part[n : n + 1].clone() for part in rows[:3]))
        own = own._replace(filters=type(rows.filters)(*(part[n : n + 1].clone() for part in rows.filters)))
        assert SAMPLE.run(logits[n : n + 1].clone(), own, SAMPLE.prepare()).token_T[0] == together[n]


def test_the_engine_draws_alike_on_both(cuda: torch.device) -> None:
    logits = torch.randn(6, 2560, generator=torch.Generator().manual_seed(3))
    logits[4, 9] = math.nan
    rows = [SampleRow(SamplingParams(1, t, p), n, 3 * n) for n, (t, p) in enumerate([(0, 1), (1, 0.9), (2, 1)] * 2)]
    assert choose_tokens(logits.to(cuda), rows).token_ids == choose_tokens(logits, rows).token_ids


def test_a_seed_draws_the_cpus_tokens_alone_and_among_sixteen(cuda: torch.device) -> None:
    """Successive draws of one request, beside 15 others with seeds and counts of their own, from equal logits."""
    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(6)) * 4
    kinds = (SamplingParams(1), SamplingParams(1, 1.7, top_k=40), SamplingParams(1, top_p=0.9, min_p=0.001))
    seeds = (0, -1, 2**63 - 1, -(2**63), *range(5, 17))
    for num_drawn in range(5):
        rows = [SampleRow(kinds[n % 3], seed, num_drawn + n * (n % 2)) for n, seed in enumerate(seeds)]
        drawn = choose_tokens(logits, rows).token_ids
        assert choose_tokens(logits.to(cuda), rows).token_ids == drawn
        for n in (0, 3, 15):
            assert choose_tokens(logits[n : n + 1].to(cuda), rows[n : n + 1]).token_ids == drawn[n : n + 1]


def test_the_twin_gives_the_same_bits_on_the_device(cuda: torch.device) -> None:
    """Its numbers are single float32 operations and integers, which every device rounds alike."""
    words = torch.randint(2**32, (1 << 20,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(gumbel(words.to(cuda)).cpu(), gumbel(words))
    z = -torch.rand(1 << 20, generator=torch.Generator().manual_seed(5)) * 30
    assert torch.equal(weights(z.to(cuda)).cpu(), weights(z))
