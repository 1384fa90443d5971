"""``wo_a`` with FP8 weights: what is packed comes back, kernels are chosen and planned alike, boxes land in order."""

import pytest
import torch

from ownpath.conformance.bounds import assert_allowed
from ownpath.conformance.exact import grouped_product, rotate_back
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.formats import FP8_BLOCK
from ownpath.kernels.contract import StoredGroups
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.grouped.cases import FP8_CASES, GroupedFp8Case
from ownpath.kernels.grouped.choose import SMS, choices, choose
from ownpath.kernels.grouped.config import GroupedFp8Config
from ownpath.kernels.grouped.ref import rope_grouped_linear_fp8
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import decode_fp8_block
from ownpath.qtensor import QuantTensor

CPU = torch.device("cpu")
NAMES = ("cute.grouped_linear_fp8_sm90", "cute.grouped_linear_fp8_sm90_invariant")
COUNTS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is arithmetic; there is no device to wait for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def stored(num_groups: int, num_rows: int, width: int, scales: str = "e8m0") -> StoredGroups:
    (weight,), (scale,) = draw_weights(Fp8Case("", (num_groups * num_rows,), width, scales), 1, CPU)
    return StoredGroups(QuantTensor(weight, scale, None, FP8_BLOCK), num_groups)


@pytest.mark.parametrize("scales", ["e8m0", "e8m0-wide", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_matrices_and_scales_come_back(name: str, scales: str) -> None:
    groups = stored(3, 128, 256, scales)
    operand = KERNELS[name].prepare(groups)
    (found,) = KERNELS[name].restore(operand)
    assert groups.matrix.scale is not None
    assert found.format == FP8_BLOCK
    assert torch.equal(found.qdata.view(torch.uint8), groups.matrix.qdata.view(torch.uint8))
    assert torch.equal(found.scale, groups.matrix.scale.float())
    assert operand.weight.folded == (scales == "e8m0")
    planned = [config.name for config in KERNELS[name].planned_configs(groups)]
    held = [config.name for config in KERNELS[name].configs(operand)]
    assert planned == held or scales == "e8m0-wide", "wide scales are known when they are read"
    for num_tokens in COUNTS:
        assert KERNELS[name].variant(torch.empty(num_tokens, 1, 1), operand) in held


@pytest.mark.parametrize("shape", [(2, 64, 256), (2, 192, 256), (2, 128, 192)], ids=str)
def test_sizes_that_128_does_not_divide_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="takes multiples of 128"):
        KERNELS[NAMES[0]].prepare(stored(*shape))


@pytest.mark.parametrize("case", FP8_CASES[:3], ids=lambda case: case.label)
def test_the_twin_against_float64(case: GroupedFp8Case) -> None:
    num_groups, num_heads, head_dim, rotary_dim, num_rows = case.sizes
    groups = stored(num_groups, num_rows, num_heads * head_dim, case.scales)
    weight, scale = groups.matrix.qdata, groups.matrix.scale
    assert scale is not None
    o_TNH = draw_rows(5, num_groups * num_heads * head_dim, 1.0, CPU).view(5, -1, head_dim)
    angles = torch.rand(5, rotary_dim // 2) * 1e6
    cos_TA, sin_TA = angles.cos(), angles.sin()
    out = torch.full((5, num_groups, num_rows), torch.nan, dtype=torch.bfloat16)
    rope_grouped_linear_fp8(o_TNH, cos_TA, sin_TA, weight.unflatten(0, (num_groups, -1)), scale, out)
    matrix = decode_fp8_block(weight, scale, torch.float64)
    assert_allowed(out.flatten(1), grouped_product(*rotate_back(o_TNH, (cos_TA, sin_TA)), num_groups, matrix))


@pytest.mark.parametrize("num_row_blocks", [64, 100, 128])
@pytest.mark.parametrize("num_k_blocks", [1, 2, 3, 32, 64, 512])
def test_every_choice_is_a_kernel_that_holds_the_weight(num_k_blocks: int, num_row_blocks: int) -> None:
    for folded in (True, False):
        sizes = num_row_blocks, num_k_blocks, folded
        for is_invariant in (False, True):
            listed = {config.name for config in choices(sizes, is_invariant)}
            chosen = {choose(count, sizes, is_invariant).name for count in COUNTS}
            assert chosen == listed if is_invariant else chosen <= listed
        orders = {(c.cluster_k, c.num_m64, c.wgmma, c.folded) for c in choices(sizes, is_batch_invariant=True)}
        assert len(orders) == 1, "one order of sums"


@pytest.mark.parametrize(("num_groups", "num_ctas"), [(8, 256), (4, 256), (2, 128)])
def test_ctas_of_few_tokens_run_at_once(num_groups: int, num_ctas: int) -> None:
    """V4-Flash's groups of 1,024 rows, on one, two and four ranks: no CTA waits for another one's end."""
    num_row_blocks = 16 * num_groups
    for num_tokens in (1, 8, 16):
        config = choose(num_tokens, (num_row_blocks, 32, True))
        assert config.grid(num_tokens, num_row_blocks) == num_ctas <= config.per_sm * SMS


@pytest.mark.parametrize(
    ("num_tokens", "tile"),
    [
        (65, (2, 2)),
        (128, (2, 2)),
        (256, (2, 1)),
        (384, (4, 1)),
        (640, (2, 1)),
        (1024, (4, 1)),
        (2048, (4, 1)),
        (8192, (4, 1)),
    ],
)
def test_tiles_grow_where_they_fill_the_device(num_tokens: int, tile: tuple[int, int]) -> None:
    """V4-Flash's eight groups: row blocks of a CTA, and CTAs that share K. Apart from scales that fold, two at most."""
    found = choose(num_tokens, (128, 32, True))
    assert (found.num_m64, found.cluster_k, found.num_n) == (*tile, 128)
    assert choose(num_tokens, (128, 32, False)).num_m64 == 2


def test_uneven_rows_and_unknown_registers_are_refused() -> None:
    with pytest.raises(ValueError, match="ragged"):
        GroupedFp8Config(1, 8, 4, 4, True, ragged=True, per_sm=4, consumers=1)
    with pytest.raises(ValueError, match="per_sm=1 with consumers=1"):
        GroupedFp8Config(1, 8, 4, 4, True, per_sm=1, consumers=1)
