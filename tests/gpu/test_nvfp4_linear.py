"""``Nvfp4Linear`` on Hopper against float64: every count of tokens, amplitudes, scales, shards; bits; refusals."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import linear_configs

from ownpath import Nvfp4Linear
from ownpath.conformance.bounds import assert_allowed, assert_rounded_once
from ownpath.conformance.exact import product
from ownpath.conformance.quant_weights import DenseWeight
from ownpath.formats import NVFP4
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.contract import Config, StoredLinear
from ownpath.kernels.nvfp4.cases import CASES
from ownpath.kernels.registry import KERNELS
from ownpath.qtensor import QuantTensor

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

LINEARS = [case for case in CASES if case.op == "nvfp4_linear"]
KERNEL_NAMES = ("cute.nvfp4_linear", "cute.nvfp4_linear_invariant")
EXTREME_COUNTS = (1, 33, 600)
PARTS = (1, 5, 16, 40, 100, 300, 700)


def kernel_configs() -> Iterator[Config]:
    """Those of the shapes and of the small products below."""
    for case in LINEARS:
        for is_invariant in (False, True):
            yield from linear_configs(case.sizes, case.tokens, is_invariant)
    yield from linear_configs((640, 512), EXTREME_COUNTS)
    yield from linear_configs((128, 512), [512])
    yield from linear_configs((384, 256), [9])
    yield from linear_configs((1536, 1024), (*PARTS, 2100), is_invariant=True)
    yield from linear_configs((1536, 1024), [4])


def stored(dense: DenseWeight) -> StoredLinear:
    return StoredLinear((QuantTensor(dense.codes, dense.scale, dense.global_scale, NVFP4),))


def poisoned(num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.full((num_rows, width), torch.nan, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("case", LINEARS, ids=lambda case: case.label)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_against_float64(name: str, case: KernelCase, cuda: torch.device) -> None:
    num_rows, num_cols = case.sizes
    dense = DenseWeight.draw(num_rows, num_cols, cuda)
    weight = dense.weight()
    kernel = KERNELS[name]
    operand = kernel.prepare(stored(dense))
    for num_tokens in case.tokens:
        x = torch.randn(num_tokens, num_cols, device=cuda).bfloat16()
        first, again = (kernel.run(x, operand, out=poisoned(num_tokens, num_rows, cuda)) for _ in range(2))
        assert first.any(), num_tokens
        assert torch.equal(first, again), num_tokens
        assert_rounded_once(first, product(x.double(), weight), num_tokens)


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("num_tokens", EXTREME_COUNTS)
def test_amplitudes_and_extreme_scales(amplitude: float, num_tokens: int, cuda: torch.device) -> None:
    dense = DenseWeight.draw(640, 512, cuda, extreme=True)
    weight = dense.weight()
    x = (torch.randn(num_tokens, 512, device=cuda) * amplitude).bfloat16()
    y = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)(x)
    assert_rounded_once(y, product(x.double(), weight))


def test_every_code_with_every_scale_is_exact(cuda: torch.device) -> None:
    """A one-hot input reads weights back: with a global scale of 1 each is code * scale, exact in BF16."""
    codes = torch.arange(256, dtype=torch.uint8, device=cuda).repeat(128, 1).view(128, 256)
    scale = torch.arange(128, dtype=torch.uint8, device=cuda)[:, None].repeat(1, 32)
    scale[127] = 0  # NaN
    dense = DenseWeight(codes, scale.view(torch.float8_e4m3fn), torch.ones(128, device=cuda))
    weight = dense.weight()
    y = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)(torch.eye(512, dtype=torch.bfloat16, device=cuda))
    assert torch.equal(y.double(), weight.T)


def test_shards_keep_their_own_global_scales(cuda: torch.device) -> None:
    shards = [DenseWeight.draw(rows, 256, cuda) for rows in (192, 64, 128)]
    scales = [torch.tensor(value, device=cuda) for value in (1e-3, 7.0, 1.0)]
    weight = torch.cat(
        [DenseWeight(s.codes, s.scale, g.expand(len(s.codes))).weight() for s, g in zip(shards, scales, strict=True)]
    )
    linear = Nvfp4Linear([s.codes for s in shards], [s.scale for s in shards], scales)
    x = torch.randn(9, 256, device=cuda).bfloat16()
    assert_allowed(linear(x), product(x.double(), weight))


def test_an_invariant_rows_bits_do_not_depend_on_the_batch(cuda: torch.device) -> None:
    dense = DenseWeight.draw(1536, 1024, cuda)
    kernel = KERNELS["cute.nvfp4_linear_invariant"]
    operand = kernel.prepare(stored(dense))
    x = torch.randn(2100, 1024, device=cuda).bfloat16()
    whole = kernel.run(x, operand)
    for count in PARTS:
        assert torch.equal(kernel.run(x[:count], operand), whole[:count]), count


def test_a_captured_call_replays(cuda: torch.device) -> None:
    dense = DenseWeight.draw(1536, 1024, cuda)
    linear = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)
    x = torch.randn(4, 1024, device=cuda).bfloat16()
    linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    x.copy_(torch.randn(4, 1024, device=cuda))
    graph.replay()
    assert torch.equal(y, linear(x))


def test_what_it_cannot_take_is_named(cuda: torch.device) -> None:
    dense = DenseWeight.draw(128, 256, cuda)
    with pytest.raises(ValueError, match="columns of 128"):
        Nvfp4Linear(dense.codes[:, :96].contiguous(), dense.scale[:, :12].contiguous(), torch.ones((), device=cuda))
    linear = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)
    with pytest.raises(ValueError, match=r"x must be torch\.bfloat16"):
        linear(torch.randn(2, 256, device=cuda))
    with pytest.raises(ValueError, match="256"):
        linear(torch.randn(2, 128, device=cuda).bfloat16())
    with pytest.raises(ValueError, match="16 bytes"):
        linear(torch.randn(2 * 256 + 1, device=cuda).bfloat16()[1:].view(2, 256))
    with pytest.raises(ValueError, match="cpu"):
        linear(torch.randn(2, 256).bfloat16())
