"""Blackwell's NVFP4 x NVFP4 kernels, interpreted: bytes equal to the definition, sums within their rounding."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ownpath.kernels.contract import Routing
from ownpath.kernels.nvfp4_sm100 import launch as kernels
from ownpath.kernels.nvfp4_sm100 import ref as ref
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand, linear_operand, moe_operand, unboxed
from ownpath.kernels.nvfp4_sm100.linear import Nvfp4LinearW4A4Kernel
from ownpath.kernels.nvfp4_sm100.linear import nvfp4_linear_w4a4 as linear_kernel
from ownpath.kernels.nvfp4_sm100.linear import nvfp4_linear_w4a4_invariant as linear_invariant
from ownpath.kernels.nvfp4_sm100.moe import Nvfp4MoeW4A4Kernel
from ownpath.kernels.nvfp4_sm100.moe import nvfp4_moe_w4a4 as moe_kernel
from ownpath.kernels.nvfp4_sm100.moe import nvfp4_moe_w4a4_invariant as moe_invariant
from ownpath.kernels.nvfp4_sm100.prove import ProofError, prove_linear, prove_moe
from ownpath.kernels.nvfp4_sm100.route_sm100 import num_tiles_bound
from ownpath.numerics import decode_nvfp4_blocks, nvfp4_global_scale, quantize_nvfp4, quantize_nvfp4_activation
from ownpath.runners import Nvfp4LinearW4A4, Nvfp4MoEW4A4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning"),  # zero blocks, masked afterwards
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

BF16_HALF_ULP = 2.0**-8
"""Largest relative error of one rounding to BF16 is half of 2^-7."""
FLOAT32_EPS = 2.0**-23
LIMIT = 2.0  # low enough that random gates and ups pass it


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, or the largest integer, under this mode: a byte nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.isnan(torch.empty(8)).all())
    assert bool((torch.empty(8, dtype=torch.uint8) == 255).all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_program_quantises_a_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpretation pays for each program. The quantiser's own test keeps the tile of 8 rows that devices get."""
    if "input_scale" not in request.fixturenames:
        monkeypatch.setattr(kernels, "QUANTIZE_ROWS", kernels.ROW_TILE)


def moe(
    kernel: Nvfp4MoeW4A4Kernel, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, operand: W4A4MoeOperand
) -> torch.Tensor:
    return kernel.run(x, Routing(ids, weights), operand)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def hard_rows() -> torch.Tensor:
    """Ties, zeros of both signs, underflow, overflow, infinities and a NaN, beside random rows of many amplitudes."""
    x = torch.randn(19, 576, generator=generator(0)) * 10.0 ** torch.linspace(-4, 4, 19)[:, None]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[0, :16] = torch.cat((ties, -ties))
    x[0, 16:32] = 0.0
    x[0, 32:48] = -0.0
    x[0, 48:64] = torch.tensor([1e-30, -1e-30] * 8)
    x[1, :16] = torch.tensor([torch.inf, -torch.inf, 1.0, -1.0] * 4)
    x[1, 16:32] = 3e38
    x[1, 40] = torch.nan
    x[2, 560:] = torch.cat((-ties, ties)) * 1024
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("input_scale", [1.0, 6 / 2688, 0.03, 1e-30])
def test_quantised_activations_equal_the_definition(input_scale: float) -> None:
    x, scale = hard_rows(), torch.tensor(input_scale)
    codes, swizzled = kernels.quantize_activation(x, scale)
    expected = quantize_nvfp4_activation(x, scale)
    assert expected.scale is not None
    assert same_bytes(unboxed(swizzled, *expected.scale.shape), expected.scale)
    # Where the scale is NaN, the definition's codes come from the sign of a computed NaN, which IEEE 754 leaves open.
    number = ~torch.isnan(expected.scale.float())
    assert int((~number).sum()) == 1
    assert torch.equal(codes.view(*number.shape, 8)[number], expected.qdata.view(*number.shape, 8)[number])
    padding = unboxed(swizzled, 128, x.shape[1] // 16)[len(x) :]
    assert int(padding.view(torch.uint8).max()) == 0, "a padding row's scale is not zero"


def sum_bound(
    x: torch.Tensor, input_scale: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Largest error of a float32 sum of exact products in any order: terms * eps * sum of magnitudes."""
    qx = quantize_nvfp4_activation(x, input_scale)
    assert qx.scale is not None
    magnitude = decode_nvfp4_blocks(qx.qdata, qx.scale).abs() @ decode_nvfp4_blocks(qdata, scale).abs().T
    return x.shape[1] * FLOAT32_EPS * magnitude * alpha


@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 136, 64), (129, 264, 320), (33, 128, 512)])
def test_linear_is_the_twin_within_bf16_rounding(num_rows: int, n: int, k: int) -> None:
    """Two fused shards with global scales 1000 apart, every M tile edge, K that 256 does not divide."""
    x = torch.randn(num_rows, k, generator=generator(1)).to(torch.bfloat16)
    w = torch.randn(n, k, generator=generator(2)) * torch.where(torch.arange(n) < n // 2, 1e-2, 10.0)[:, None]
    shards = [quantize_nvfp4(part) for part in w.split(n // 2)]
    qdata, scale = (torch.cat([getattr(q, part) for q in shards]) for part in ("qdata", "scale"))
    global_scale = torch.cat([q.global_scale.expand(n // 2) for q in shards if q.global_scale is not None])
    input_scale = nvfp4_global_scale(x)
    y = linear_kernel.run(x, linear_operand(qdata, scale, global_scale, input_scale))
    exact = ref.nvfp4_linear_w4a4(x.double(), input_scale, qdata, scale, global_scale)
    bound = sum_bound(x, input_scale, qdata, scale, input_scale * global_scale) + BF16_HALF_ULP * exact.abs()
    assert bool(torch.isfinite(y).all())
    assert bool(((y.double() - exact).abs() <= bound).all())
    assert bool((y != 0).any())


@pytest.mark.parametrize("amplitude", [1e-4, 1.0, 1e4])
def test_linear_with_every_code_and_every_scale(amplitude: float) -> None:
    """Random bytes as codes; block scales over all of E4M3, zero and 448 included."""
    n, k = 128, 128
    x = (torch.randn(3, k, generator=generator(15)) * amplitude).to(torch.bfloat16)
    qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator(16))
    scale = (torch.arange(n * k // 16, dtype=torch.int64) % 127).to(torch.uint8).view(n, k // 16)
    scale = scale.view(torch.float8_e4m3fn)
    global_scale, input_scale = torch.full((n,), 1e-3), nvfp4_global_scale(x)
    y = linear_kernel.run(x, linear_operand(qdata, scale, global_scale, input_scale))
    exact = ref.nvfp4_linear_w4a4(x.double(), input_scale, qdata, scale, global_scale)
    bound = sum_bound(x, input_scale, qdata, scale, input_scale * global_scale) + BF16_HALF_ULP * exact.abs()
    assert bool(((y.double() - exact).abs() <= bound).all())


def experts(num_experts: int, dim: int, inter: int) -> tuple[ref.W4A4Weight, ref.W4A4Weight]:
    """Random experts, every global scale and input scale different; gate and up differ too."""
    gain = torch.rand(num_experts, 3, generator=generator(3)) + 0.5
    gate_up = torch.randn(num_experts, 2, inter, dim, generator=generator(4)) * dim**-0.5 * gain[:, :2, None, None]
    q13 = quantize_nvfp4(gate_up)
    q2 = quantize_nvfp4(torch.randn(num_experts, dim, inter, generator=generator(5)) * inter**-0.5 * gain[:, 2:, None])
    assert q13.scale is not None
    assert q13.global_scale is not None
    assert q2.scale is not None
    assert q2.global_scale is not None
    input_scale = (4 + gain) / 2688
    w13 = (q13.qdata.flatten(1, 2), q13.scale.flatten(1, 2), q13.global_scale, input_scale[:, 0].contiguous())
    return w13, (q2.qdata, q2.scale, q2.global_scale, input_scale[:, 1].contiguous())


ROUTINGS = {
    "random": torch.stack([torch.randperm(4, generator=generator(seed))[:2] for seed in range(9)]),
    "one token": torch.tensor([[2, 0]]),
    "all on one expert": torch.full((130, 1), 3),
    "some experts elsewhere": torch.tensor([[-1, 1], [4, -1], [2, 1]]),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_pairs_are_placed_in_tiles_of_one_expert(name: str) -> None:
    ids, num_experts = ROUTINGS[name], 4
    pair_of_row, row_of_pair, expert_of_tile = kernels.place_pairs(ids, num_experts)
    rows: list[int] = []
    tiles: list[int] = []
    for expert in range(num_experts):
        pairs = [pair for pair, chosen in enumerate(ids.flatten().tolist()) if chosen == expert]
        num_tiles = -(-len(pairs) // 128)
        rows += pairs + [-1] * (num_tiles * 128 - len(pairs))
        tiles += [expert] * num_tiles
    assert pair_of_row[: len(rows)].tolist() == rows
    assert expert_of_tile.tolist() == tiles + [-1] * (len(expert_of_tile) - len(tiles))
    for pair, row in enumerate(row_of_pair.tolist()):
        assert (row == -1) if pair not in rows else (rows[row] == pair)


def test_the_bound_on_tiles_is_reached_and_never_passed() -> None:
    for num_pairs in (1, 5, 128, 129, 1000):
        for num_experts in (1, 4, 300):
            used = min(num_pairs, num_experts)
            worst = [1] * (used - 1) + [num_pairs - used + 1]
            assert num_tiles_bound(num_pairs, num_experts) >= sum(-(-count // 128) for count in worst)
    assert num_tiles_bound(6, 256) == 6
    assert num_tiles_bound(256, 1) == 2


@pytest.mark.parametrize("name", ROUTINGS)
def test_moe_is_the_twin_within_bf16_rounding(name: str) -> None:
    """Both quantisations, the clamp and the combine; rounding at a tie may move a code, a wrong scale moves all."""
    ids, (w13, w2) = ROUTINGS[name], experts(4, 128, 256)
    x = torch.randn(len(ids), 128, generator=generator(6)).to(torch.bfloat16)
    weights = torch.rand(ids.shape, generator=generator(7)) + 0.1
    y = moe(moe_kernel, x, ids, weights, moe_operand(w13, w2, LIMIT))
    expected = ref.nvfp4_moe_w4a4(x, ids, weights, w13, w2, LIMIT)
    assert bool(torch.isfinite(y).all())
    assert bool((expected != 0).any())
    assert (y - expected).float().norm() <= BF16_HALF_ULP * expected.float().norm()
    assert bool((y[(ids < 0).logical_or(ids > 3).all(dim=1)] == 0).all())


def test_hidden_codes_are_the_definitions_except_at_ties() -> None:
    """The fused epilogue's codes and scales against the float64 twin, rounded and quantised by the definition."""
    ids, (w13, w2) = ROUTINGS["random"], experts(4, 128, 256)
    x = torch.randn(len(ids), 128, generator=generator(8)).to(torch.bfloat16)
    operand = moe_operand(w13, w2, LIMIT)
    pair_of_row, row_of_pair, expert_of_tile = kernels.place_pairs(ids, 4)
    codes, scale = kernels._expert_hidden(x, ids.shape[1], pair_of_row, expert_of_tile, operand)
    scale = unboxed(scale, len(pair_of_row), 256 // 16)
    num_ties = clamped = 0
    for pair, row in enumerate(row_of_pair.tolist()):
        expert = int(ids.flatten()[pair])
        token = x[pair // ids.shape[1], None].double()
        h = ref.expert_hidden_w4a4(token, w13, expert, LIMIT)
        clamped += int((h.abs() >= 0.99 * LIMIT).sum())
        around = [(h * factor).to(torch.bfloat16) for factor in (1 - 2.0**-18, 1 + 2.0**-18)]
        tie = (around[0] != around[1]).view(-1, 16).any(dim=1)
        expected = quantize_nvfp4_activation(h.to(torch.bfloat16), w2[3][expert])
        assert expected.scale is not None
        assert torch.equal(codes[row].view(-1, 8)[~tie], expected.qdata.view(-1, 8)[~tie])
        assert same_bytes(scale[row][~tie], expected.scale[0][~tie])
        num_ties += int(tie.sum())
    assert num_ties <= row_of_pair.numel() * 16 * 0.05
    assert clamped > 0, "no value reached the clamp"


def test_a_token_does_not_depend_on_its_batch_and_repetition_changes_no_bit() -> None:
    ids, (w13, w2) = ROUTINGS["random"], experts(4, 128, 128)
    operand = moe_operand(w13, w2, LIMIT)
    x = torch.randn(len(ids), 128, generator=generator(9)).to(torch.bfloat16)
    weights = torch.rand(ids.shape, generator=generator(10))
    y = moe(moe_kernel, x, ids, weights, operand)
    assert same_bytes(y, moe(moe_kernel, x, ids, weights, operand))
    alone = moe(moe_invariant, x[5:6].clone(), ids[5:6].clone(), weights[5:6].clone(), operand)
    assert same_bytes(y[5:6], alone)


def test_a_nan_reaches_the_output() -> None:
    (w13, w2), ids = experts(4, 128, 128), torch.tensor([[0], [0]])
    x = torch.randn(2, 128, generator=generator(11)).to(torch.bfloat16)
    x[1, 7] = torch.nan
    y = moe(moe_kernel, x, ids, torch.ones(2, 1), moe_operand(w13, w2, LIMIT))
    assert bool(torch.isnan(y[1]).all())
    assert bool(torch.isfinite(y[0]).all())


def test_wrong_operands_are_named() -> None:
    w13, w2 = experts(2, 128, 128)
    operand = moe_operand(w13, w2, LIMIT)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"x must be torch\.bfloat16"):
        moe(moe_kernel, x.float(), ids, weights, operand)
    with pytest.raises(ValueError, match="topk_weights must have shape"):
        moe(moe_kernel, x, ids, torch.ones(2, 2), operand)
    with pytest.raises(ValueError, match="x must be contiguous"):
        moe(moe_kernel, torch.zeros(128, 2, dtype=torch.bfloat16).T, ids, weights, operand)
    with pytest.raises(ValueError, match="w2_input_scale must be finite and positive"):
        moe_operand(w13, (*w2[:3], torch.tensor([1.0, 0.0])), LIMIT)
    with pytest.raises(ValueError, match="multiples of 64"):
        linear_operand(torch.zeros(8, 24, dtype=torch.uint8), torch.zeros(8, 3), torch.ones(8), torch.ones(()))


def test_wide_tiles_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 192, generator=generator(12)).to(torch.bfloat16)
    w = quantize_nvfp4(torch.randn(512, 192, generator=generator(13)))
    assert w.scale is not None
    assert w.global_scale is not None
    operand = linear_operand(w.qdata, w.scale, w.global_scale.expand(512), nvfp4_global_scale(x))
    y = linear_kernel.run(x, operand)
    assert same_bytes(y, linear_invariant.run(x, operand))
    assert kernels.columns_per_tile(2048, 512) == 256
    monkeypatch.setattr("ownpath.kernels.nvfp4_sm100.linear.columns_per_tile", lambda num_rows, n: 256)
    assert same_bytes(y, linear_kernel.run(x, operand))
    assert same_bytes(y, linear_invariant.run(x, operand))


def test_the_proof_accepts_the_kernels_and_finds_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner on its first Blackwell device: with right kernels it runs, with scales in the wrong order it refuses."""
    cpu = torch.device("cpu")
    prove_linear.__wrapped__(linear_kernel, cpu)
    prove_moe.__wrapped__(moe_kernel, cpu)

    class WrongLayout(Nvfp4LinearW4A4Kernel):
        def run(self, x: torch.Tensor, operand: W4A4LinearOperand, **given: object) -> torch.Tensor:
            swapped = operand.scale.view(torch.uint8).flip(-2).view(operand.scale.dtype)
            return super().run(x, replace(operand, scale=swapped))

    class NoInputScale(Nvfp4MoeW4A4Kernel):
        def run(self, x: torch.Tensor, routing: Routing, op: W4A4MoeOperand, **given: object) -> torch.Tensor:
            return super().run(x, routing, replace(op, w2_input_scale=torch.ones_like(op.w2_input_scale)))

    with pytest.raises(ProofError, match=r"WrongLayout on cpu: \d+ of \d+ values differ"):
        prove_linear.__wrapped__(WrongLayout(False), cpu)
    with pytest.raises(ProofError, match="relative difference"):
        prove_moe.__wrapped__(NoInputScale(False), cpu)


def test_the_runners_take_a_checkpoints_tensors() -> None:
    """Fused shards with their own input scales (the largest counts), leading dimensions, an expert's pair of scales."""
    x = torch.randn(2, 3, 128, generator=generator(14)).to(torch.bfloat16)
    shards = [quantize_nvfp4(torch.randn(n, 128, generator=generator(n))) for n in (64, 128)]
    parts = [[getattr(q, name) for q in shards] for name in ("qdata", "scale", "global_scale")]
    input_scale = nvfp4_global_scale(x.flatten(0, 1))
    linear = Nvfp4LinearW4A4(*parts, torch.stack([input_scale / 3, input_scale]))
    rows = torch.cat([q.global_scale.expand(len(q.qdata)) for q in shards if q.global_scale is not None])
    expected = ref.nvfp4_linear_w4a4(x.flatten(0, 1), input_scale, torch.cat(parts[0]), torch.cat(parts[1]), rows)
    y = linear(x)
    assert y.shape == (2, 3, 192)
    assert (y.flatten(0, 1) - expected).float().norm() <= BF16_HALF_ULP * expected.float().norm()
    w13, w2 = experts(4, 128, 128)
    pair = torch.stack((w13[3], w13[3] / 2), dim=1)
    runner = Nvfp4MoEW4A4((*w13[:3], pair), w2, LIMIT)
    ids, weights = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]])
    expected = ref.nvfp4_moe_w4a4(x[0, :1], ids, weights, w13, w2, LIMIT)
    assert (runner(x[0, :1], ids, weights) - expected).float().norm() <= BF16_HALF_ULP * expected.float().norm()
    with pytest.raises(ValueError, match=r"w2_input_scale must have shape \[4\]"):
        Nvfp4MoEW4A4(w13, (*w2[:3], torch.ones(4, 2)), LIMIT)
    with pytest.raises(ValueError, match="same number of shards"):
        Nvfp4LinearW4A4(parts[0], parts[1][:1], parts[2], input_scale)
