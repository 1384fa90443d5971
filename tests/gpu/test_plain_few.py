"""Products with few rows of x on the device: every tile, its layouts above all, against float64; graphs, neighbours."""

import pytest
import torch

from ownpath.conformance.bounds import deviation
from ownpath.conformance.exact import product
from ownpath.kernels.plain.few import PLAIN_LINEAR, launch_few
from ownpath.kernels.plain.few_choose import TILES, PlainTile
from ownpath.kernels.registry import KERNELS
from ownpath.runners import PlainLinear

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

KERNEL = "triton.plain_linear_few"
NAN = float("nan")
MOST = max(most_tokens for most_tokens, _, _ in TILES)


@pytest.mark.parametrize("size", [(256, 4096), (100, 264), (8, 256), (33, 4104), (70, 7168)], ids=str)
@pytest.mark.parametrize("tile", list(dict.fromkeys(tile for *_, tile in TILES)), ids=str)
def test_every_tile_against_float64(tile: PlainTile, size: tuple[int, int], cuda: torch.device) -> None:
    """x lies in wider rows of NaN; nothing is written behind y."""
    num_rows, width = size
    weight = torch.randn(num_rows, width, device=cuda).bfloat16()
    for num_tokens in {1, tile.tokens // 2 + 1, tile.tokens}:
        wide = torch.full((num_tokens, 3 * width), NAN, dtype=torch.bfloat16, device=cuda)
        x = wide[:, width : 2 * width]
        x.copy_(torch.randn(num_tokens, width, device=cuda))
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.full((num_tokens + 1, num_rows), NAN, dtype=dtype, device=cuda)
            launch_few(x, weight, y[:num_tokens], tile)
            found = deviation(y[:num_tokens], product(x.double(), weight.double()))
            assert found.is_allowed, (num_tokens, str(found))
            assert y[num_tokens].isnan().all()


@pytest.mark.parametrize("num_rows", [64, 256, 1024, 2624])
def test_calls_of_every_size(num_rows: int, cuda: torch.device) -> None:
    """Up to the first size that is the library's; the second call of a size takes the prepared launch."""
    weight = torch.randn(num_rows, 4096, device=cuda).bfloat16()
    runner, rows = PlainLinear(weight, kernel=KERNEL), torch.randn(MOST + 1, 4096, device=cuda).bfloat16()
    exact = product(rows.double(), weight.double())
    for num_tokens in range(1, MOST + 2):
        x = rows[:num_tokens]
        first, again = runner.run_wide(x), runner.run_wide(x)
        assert deviation(first, exact.rows(slice(num_tokens))).is_allowed, num_tokens
        assert torch.equal(first, again)
        out = torch.full((num_tokens, num_rows), NAN, dtype=torch.bfloat16, device=cuda)
        assert runner.run(x, out=out) is out
        assert torch.equal(out, runner.run(x))
    assert runner.variant(rows) == "library"


def test_neighbours_change_no_bit_of_a_tile(cuda: torch.device) -> None:
    weight = torch.randn(256, 4096, device=cuda).bfloat16()
    runner, rows = PlainLinear(weight, kernel=KERNEL), torch.randn(MOST, 4096, device=cuda).bfloat16()
    found: dict[str, torch.Tensor] = {}
    for num_tokens in range(1, MOST + 1):
        x = rows[:num_tokens].clone()
        x[1:] *= num_tokens
        y = runner.run_wide(x)[0]
        assert torch.equal(found.setdefault(str(runner.variant(x)), y), y), num_tokens


def test_a_graph_reads_what_the_kernel_in_front_wrote(cuda: torch.device) -> None:
    """A chain of overlapping launches: x comes from a kernel that lets this one start early."""
    weights = [torch.randn(1024, 1024, device=cuda).bfloat16() for _ in range(4)]
    runners = [PlainLinear(weight, kernel=KERNEL) for weight in weights]
    norm = KERNELS["triton.rms_norm"]
    given = torch.randn(4, 1024, device=cuda).bfloat16()

    def step() -> torch.Tensor:
        x = given
        for runner in runners:
            x = runner.run(norm(x, None, 1e-6))
        return x

    expected = step().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(20):
        result.fill_(NAN)
        graph.replay()
        assert torch.equal(result, expected)


def test_a_call_with_out_allocates_nothing(cuda: torch.device) -> None:
    weight = torch.randn(256, 4096, device=cuda).bfloat16()
    runner, x = PlainLinear(weight, kernel=KERNEL), torch.randn(4, 4096, device=cuda).bfloat16()
    out = torch.empty(4, 256, device=cuda)
    runner.run(x, out=out)
    before = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    runner.run(x, out=out)
    assert torch.cuda.memory_stats(cuda)["allocation.all.allocated"] == before
    assert PLAIN_LINEAR.variant(x, runner.operand) != "library"
