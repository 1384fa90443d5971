"""FP8 linears on Hopper: W8A16 against float64, W8A8 against the emulation, bits on repetition, errors by name."""

from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from support.kernel_configs import fp8_configs, w8a8_configs, w8a16_configs

from ownpath.bench.shapes import HALF_SHAPES, LINEAR_SHAPES
from ownpath.bench.tuners.fp8 import Fp8Family
from ownpath.conformance.bounds import MAX_REL_L2, relative_l2
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.formats import FP8_BLOCK
from ownpath.kernels.contract import Config, StoredLinear
from ownpath.kernels.fp8.cases import AMPLITUDES, CASES, NUM_ROWS, Fp8Case
from ownpath.kernels.fp8.choose import knobs_config, quantize_configs
from ownpath.kernels.fp8.config import QuantizeConfig, W8A8Config, W8A16Config
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, pack_fp8, unpack_blocks
from ownpath.kernels.fp8.ref import quantize_rows
from ownpath.numerics import decode_fp8_block
from ownpath.qtensor import QuantTensor
from ownpath.runners import Fp8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

MATRICES = [(shape.out_features, shape.in_features) for shape in LINEAR_SHAPES if shape.name != "tiny"]
HALVES = [(shape.out_features, shape.in_features) for shape in HALF_SHAPES]
Kernel = TypeVar("Kernel", W8A16Config, W8A8Config)
BF16_HALF_ULP = 2.0**-8
"""Largest relative error of one rounding to BF16 (8 significant bits), as a bound on |y| rather than on its binade."""
TENSOR_CORE_ULP = 2.0**-13
"""FP8 products are aligned to the largest of a step and cut to at least 13 fraction bits before they are added."""
PARTS = ((0, 1), (5, 12), (17, 33), (40, 73))
MANY_ROWS = (1, 7, 64, 129, 255, 1024, 2048, 4096)
WORKSPACE_ROWS = 1024
CAPTURED_ROWS = (5, 512)


def kernel_configs() -> Iterator[Config]:
    """Those of the cases, and every candidate of the tuner."""
    for case in CASES:
        for is_invariant in (False, True):
            yield from w8a16_configs(case, NUM_ROWS, is_invariant)
        yield from w8a16_configs(case, [100, *(stop - start for start, stop in PARTS)], is_invariant=True)
        yield from w8a8_configs(case, [min(num_rows, WORKSPACE_ROWS) for num_rows in MANY_ROWS])
    for matrix in (*MATRICES, *HALVES):
        yield from tuner_kernels(matrix, W8A16Config)
        yield from tuner_kernels(matrix, W8A8Config)
    yield from w8a16_configs(CASES[4], [70])
    yield from w8a8_configs(CASES[4], [70])
    yield from fp8_configs(CASES[0], CAPTURED_ROWS)


def reference_weight(weights: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([decode_fp8_block(w, s, torch.float64) for w, s in zip(weights, scales, strict=True)])


def poisoned(num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.full((num_rows, width), torch.nan, dtype=torch.bfloat16, device=device)


def assert_right(y: torch.Tensor, reference: torch.Tensor, slack: torch.Tensor, what: object) -> None:
    """Every element written, near in the mean, and off by one rounding to BF16 and ``slack`` at most."""
    assert torch.isfinite(y).all(), what
    assert relative_l2(y, reference) <= MAX_REL_L2, what
    assert ((y.double() - reference).abs() <= BF16_HALF_ULP * reference.abs() + slack).all(), what


def tuner_kernels(matrix: tuple[int, int], kind: type[Kernel]) -> list[Kernel]:
    """Returns every kernel that ``ownpath bench --tune fp8`` tries for a matrix, once."""
    found = {}
    for case, candidates in Fp8Family("cpu").candidates.items():
        if case.endswith(",rows={},cols={}".format(*matrix)):
            kernels = [knobs_config(knobs, matrix[1] // 128) for knobs in candidates]
            found |= {kernel.name: kernel for kernel in kernels if isinstance(kernel, kind)}
    assert found
    return list(found.values())


def operand_of(weights: list[torch.Tensor], scales: list[torch.Tensor]) -> Any:
    from ownpath.kernels.fp8.linear import fp8_linear

    shards = (QuantTensor(weight, scale, None, FP8_BLOCK) for weight, scale in zip(weights, scales, strict=True))
    return fp8_linear.prepare(StoredLinear(tuple(shards)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("is_invariant", [False, True], ids=["fastest", "invariant"])
def test_w8a16_against_float64(case: Fp8Case, is_invariant: bool, cuda: torch.device) -> None:
    from ownpath.kernels.fp8.linear import Fp8LinearKernel

    kernel = Fp8LinearKernel(None, is_invariant)
    weights, scales = draw_weights(case, 1, cuda)
    operand = operand_of(weights, scales)
    packed = operand.weight
    exact = reference_weight(weights, scales)
    for num_rows in NUM_ROWS:
        for amplitude in AMPLITUDES:
            x = draw_rows(num_rows, case.width, amplitude, cuda)
            first, again = (poisoned(num_rows, packed.out_features, cuda) for _ in range(2))
            kernel.run(x, operand, out=first)
            kernel.run(x, operand, out=again)
            reference = x.double() @ exact.T
            assert torch.equal(first, again), (num_rows, amplitude)
            # Float32 sums of K products: 2**-24 of their absolute sum each.
            slack = 2.0**-24 * case.width * (x.double().abs() @ exact.abs().T)
            assert_right(first, reference, slack, (num_rows, amplitude))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_invariant_rows_keep_their_bits(case: Fp8Case, cuda: torch.device) -> None:
    from ownpath.kernels.fp8.linear import fp8_linear_invariant

    weights, scales = draw_weights(case, 2, cuda)
    operand = operand_of(weights, scales)
    packed = operand.weight
    x = draw_rows(100, case.width, 1.0, cuda)
    whole = poisoned(100, packed.out_features, cuda)
    fp8_linear_invariant.run(x, operand, out=whole)
    for start, stop in PARTS:
        part = poisoned(stop - start, packed.out_features, cuda)
        fp8_linear_invariant.run(x[start:stop], operand, out=part)
        assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("matrix", [*MATRICES, *HALVES], ids=lambda matrix: "x".join(map(str, matrix)))
def test_every_candidate_of_the_tuner_for_few_rows(matrix: tuple[int, int], cuda: torch.device) -> None:
    from ownpath.kernels.fp8.launch import w8a16_launch

    case = Fp8Case("tuned", matrix[:1], matrix[1], "e8m0")
    weights, scales = draw_weights(case, 7, cuda)
    packed = pack_fp8(weights, scales)
    exact = reference_weight(weights, scales)
    magnitude = exact.abs()
    for config in tuner_kernels(matrix, W8A16Config):
        # One row, most of a tile, all of it, and a second tile.
        for num_rows in (1, config.num_n - 1, config.num_n, config.num_n + 3):
            x = draw_rows(num_rows, case.width, 1.0, cuda)
            first, again = (poisoned(num_rows, packed.out_features, cuda) for _ in range(2))
            w8a16_launch(config, x, packed, first)
            w8a16_launch(config, x, packed, again)
            assert torch.equal(first, again), (config.name, num_rows)
            slack = 2.0**-24 * case.width * (x.double().abs() @ magnitude.T)
            assert_right(first, x.double() @ exact.T, slack, (config.name, num_rows))


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: "x".join(map(str, matrix)))
def test_every_candidate_of_the_tuner_for_many_rows(matrix: tuple[int, int], cuda: torch.device) -> None:
    from ownpath.kernels.fp8.launch import quantize_launch, w8a8_launch, workspace_bytes

    case = Fp8Case("tuned", matrix[:1], matrix[1], "e8m0")
    weights, scales = draw_weights(case, 8, cuda)
    packed = pack_fp8(weights, scales)
    exact = reference_weight(weights, scales)
    for num_rows in (65, 449, 2048):
        x = draw_rows(num_rows, case.width, 1.0, cuda)
        num_bytes = workspace_bytes(num_rows, packed.num_k_blocks)
        workspace = torch.full((num_bytes,), 255, dtype=torch.uint8, device=cuda)
        quantize_launch(QuantizeConfig(packed.power_of_two), x, workspace, packed.num_k_blocks)
        codes, scale = quantize_rows(x, packed.power_of_two)
        rows = (codes.double() * scale.double()[..., None]).flatten(1)[:, : case.width]
        reference = rows @ exact.T
        slack = 4 * TENSOR_CORE_ULP * (rows.abs() @ exact.abs().T)
        for config in tuner_kernels(matrix, W8A8Config):
            first, again = (poisoned(num_rows, packed.out_features, cuda) for _ in range(2))
            w8a8_launch(config, workspace, packed, first)
            w8a8_launch(config, workspace, packed, again)
            assert torch.equal(first, again), (config.name, num_rows)
            assert_right(first, reference, slack, (config.name, num_rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_quantised_blocks_are_the_definition(case: Fp8Case, cuda: torch.device) -> None:
    from ownpath.kernels.fp8.launch import quantize_launch, workspace_bytes

    for num_rows in (1, 63, 64, 130):
        for amplitude in AMPLITUDES:
            x = draw_rows(num_rows, case.width, amplitude, cuda)
            num_blocks = -(-case.width // 128)
            workspace = torch.full((workspace_bytes(num_rows, num_blocks),), 255, dtype=torch.uint8, device=cuda)
            is_power_of_two = case.scales != "float32"
            first, *others = quantize_configs(is_power_of_two)
            quantize_launch(first, x, workspace, num_blocks)
            for other in others:
                again = torch.full_like(workspace, 255)
                quantize_launch(other, x, again, num_blocks)
                assert torch.equal(again, workspace), other.name
            blocks = workspace.view(-1, num_blocks, ACT_BLOCK_BYTES)
            codes, scale = quantize_rows(x, is_power_of_two)
            found = unpack_blocks(blocks[..., :8192].contiguous(), torch.arange(64), num_rows, num_blocks * 128)
            assert torch.equal(found, codes.view(torch.uint8).flatten(1))
            found_scale = blocks[..., 8192:].contiguous().view(torch.float32).transpose(1, 2).flatten(0, 1)[:num_rows]
            assert torch.equal(found_scale, scale)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_w8a8_against_the_emulation(case: Fp8Case, cuda: torch.device) -> None:
    from ownpath.kernels.fp8.launch import workspace_bytes
    from ownpath.kernels.fp8.linear import Fp8LinearKernel

    kernel = Fp8LinearKernel(1)
    weights, scales = draw_weights(case, 3, cuda)
    operand = operand_of(weights, scales)
    packed = operand.weight
    exact = reference_weight(weights, scales)
    for num_rows in MANY_ROWS:
        for amplitude in AMPLITUDES:
            x = draw_rows(num_rows, case.width, amplitude, cuda)
            # More rows than it has room for go through it in turns.
            num_bytes = workspace_bytes(min(num_rows, WORKSPACE_ROWS), packed.num_k_blocks)
            workspace = torch.full((num_bytes,), 255, dtype=torch.uint8, device=cuda)
            first, again = (poisoned(num_rows, packed.out_features, cuda) for _ in range(2))
            kernel.run(x, operand, out=first, workspace=workspace)
            kernel.run(x, operand, out=again, workspace=workspace)
            codes, scale = quantize_rows(x, packed.power_of_two)
            rows = (codes.double() * scale.double()[..., None]).flatten(1)[:, : case.width]
            reference = rows @ exact.T
            assert torch.equal(first, again), (num_rows, amplitude)
            # Four steps of 32 products per block of K, each cut below the largest term.
            slack = 4 * TENSOR_CORE_ULP * (rows.abs() @ exact.abs().T)
            assert_right(first, reference, slack, (num_rows, amplitude))


def test_a_nan_reaches_only_its_own_row(cuda: torch.device) -> None:
    from ownpath.kernels.fp8.linear import Fp8LinearKernel

    weights, scales = draw_weights(CASES[4], 4, cuda)
    operand = operand_of(weights, scales)
    packed = operand.weight
    x = draw_rows(70, CASES[4].width, 1.0, cuda)
    x[3, 5], x[66, 200] = torch.nan, torch.inf
    for kernel in (Fp8LinearKernel(None), Fp8LinearKernel(1)):
        y = poisoned(70, packed.out_features, cuda)
        kernel.run(x, operand, out=y)
        bad = ~torch.isfinite(y)
        assert bad[3].all()
        assert bad[66].any()
        bad[[3, 66]] = False
        assert not bad.any()


def test_one_call_is_captured_and_replayed(cuda: torch.device) -> None:
    weights, scales = draw_weights(CASES[0], 5, cuda)
    linear = Fp8Linear(weights, scales)
    for num_rows in CAPTURED_ROWS:
        x = draw_rows(num_rows, CASES[0].width, 1.0, cuda)
        expected = linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_wrong_inputs_are_named(cuda: torch.device) -> None:
    weights, scales = draw_weights(CASES[0], 6, cuda)
    linear = Fp8Linear(weights, scales)
    x = draw_rows(4, CASES[0].width, 1.0, cuda)
    with pytest.raises(ValueError, match="features"):
        linear(x[:, :128])
    with pytest.raises(ValueError, match="bfloat16"):
        linear(x.float())
    with pytest.raises(ValueError, match=r"x is on cpu"):
        linear(x.cpu())
    with pytest.raises(ValueError, match="aligned"):
        linear(torch.empty(4 * 4096 + 1, dtype=torch.bfloat16, device=cuda)[1:].view(4, 4096))
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.empty(4096, 4, dtype=torch.bfloat16, device=cuda).T)
    with pytest.raises(ValueError, match="workspace"):
        linear.run(x.repeat(40, 1), workspace=torch.empty(64, dtype=torch.uint8, device=cuda))
    with pytest.raises(ValueError, match="NaN code"):
        Fp8Linear(weights[0].view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), scales[0])
