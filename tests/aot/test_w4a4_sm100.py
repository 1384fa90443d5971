"""Blackwell's NVFP4 kernels compile for sm_100a to the block-scaled instruction, without a spill. Nothing is run."""

from pathlib import Path

import pytest
import torch
from support.triton_aot import Compiled, compile_launch, recorded_launches

from ownpath.kernels.contract import Routing
from ownpath.kernels.nvfp4_sm100 import launch as kernels
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand, boxed_shape
from ownpath.kernels.nvfp4_sm100.linear import nvfp4_linear_w4a4
from ownpath.kernels.nvfp4_sm100.moe import nvfp4_moe_w4a4

SHARED_BYTES = 232448  # what one program may use on sm_100
TENSOR_MEMORY_COLUMNS = 512
BLOCK_SCALED = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"
FLASH_LINEARS = {"wqa_wkv": (1536, 4096), "wq_b": (32768, 1024), "wo_b": (4096, 8192), "down": (4096, 2048)}
PRODUCTS = ("gemm_w4a4_kernel", "gate_up_w4a4_kernel")


def linear(n: int, k: int) -> W4A4LinearOperand:
    scale = torch.empty(boxed_shape(n, k), dtype=torch.float8_e4m3fn)
    return W4A4LinearOperand(torch.empty(n, k // 2, dtype=torch.uint8), scale, torch.empty(n), torch.empty(()))


def moe(num_experts: int, dim: int, inter: int) -> W4A4MoeOperand:
    """V4-Flash's widths, with few experts: their number matters to ``place_pairs`` alone, which gets all 256."""
    gate_up, down = linear(num_experts * 2 * inter, dim), linear(num_experts * dim, inter)
    pair, one = torch.empty(num_experts, 2), torch.empty(num_experts)
    return W4A4MoeOperand(gate_up.codes, gate_up.scale, pair, one, down.codes, down.scale, one, one, 10.0)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every distinct launch of V4-Flash's linears and experts, at one token and at many, compiled for sm_100."""
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        for module in ("launch", "linear"):
            name = f"ownpath.kernels.nvfp4_sm100.{module}.check_input"
            patch.setattr(name, lambda x, width, device: None)  # it refuses what no GPU holds
        for num_rows in (1, 2048):
            for n, k in FLASH_LINEARS.values():
                nvfp4_linear_w4a4.run(torch.empty(num_rows, k, dtype=torch.bfloat16), linear(n, k))
        operand = moe(4, 4096, 2048)
        for num_tokens in (1, 1024):
            x = torch.empty(num_tokens, 4096, dtype=torch.bfloat16)
            for ids_dtype in (torch.int32, torch.int64):
                ids = torch.empty(num_tokens, 6, dtype=ids_dtype)
                nvfp4_moe_w4a4.run(x, Routing(ids, torch.empty(num_tokens, 6)), operand)
                kernels.place_pairs(ids, 256)
    folder = tmp_path_factory.mktemp("cubins")
    return [compile_launch(launch, 100, folder) for launch in launches]


def test_every_kernel_of_the_path_is_there(compiled: list[Compiled]) -> None:
    assert {one.launch.name for one in compiled} == {
        "quantize_kernel",
        "count_kernel",
        "place_kernel",
        "combine_kernel",
        *PRODUCTS,
    }
    tiles = {dict(one.launch.constants)["BN"] for one in compiled if one.launch.name == "gemm_w4a4_kernel"}
    assert tiles == {128, 256}


def test_no_batch_size_compiles_anew(compiled: list[Compiled]) -> None:
    """From 1 token to 2048: one quantiser for each K and use, one placement for each id type and number of experts."""
    quantisers = [one for one in compiled if one.launch.name == "quantize_kernel"]
    assert len(quantisers) == len({k for _, k in FLASH_LINEARS.values()}) + 1
    assert len([one for one in compiled if one.launch.name == "count_kernel"]) == 2
    assert len([one for one in compiled if one.launch.name == "place_kernel"]) == 4


def test_no_kernel_spills_or_asks_for_more_than_an_sm_has(compiled: list[Compiled]) -> None:
    for one in compiled:
        assert one.stack_bytes == 0, one
        assert one.shared_bytes <= SHARED_BYTES, one
        assert one.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS, one


def test_the_products_are_block_scaled_tensor_core_instructions(compiled: list[Compiled]) -> None:
    """Codes go from TMA to the tensor cores as they are: nothing decodes, nothing falls back to BF16 or FP8."""
    for one in (one for one in compiled if one.launch.name in PRODUCTS):
        assert BLOCK_SCALED in one.ptx, one
        assert one.ptx.count("tcgen05.mma.") == one.ptx.count(BLOCK_SCALED), "another kind of product"
        assert "mma.sync" not in one.ptx
        assert "tcgen05.cp.cta_group::1.warpx4.32x128b" in one.ptx, "scales do not go straight to tensor memory"
        assert "cp.async.bulk.tensor.5d" in one.ptx, "scales are not fetched by TMA"
        products = [line for line in one.intermediate.splitlines() if "ttng.tc_gen5_mma_scaled" in line]
        assert products
        assert all("is_async" in line for line in products), "a product is waited for before the next fetch"
        assert "UTCOMMA.4X" in one.sass(), "the SASS has no block-scaled FP4 product"


def test_sm_103_gets_the_same_instruction(compiled: list[Compiled], tmp_path: Path) -> None:
    """B300 is in the plan's range too; anything else (consumer Blackwell has no tcgen05) is not."""
    for one in (one for one in compiled if one.launch.name == "gate_up_w4a4_kernel"):
        other = compile_launch(one.launch, 103, tmp_path)
        assert ".target sm_103a" in other.ptx
        assert BLOCK_SCALED in other.ptx
        assert other.stack_bytes == 0


def test_the_quantiser_divides_and_rounds_as_the_definition(compiled: list[Compiled]) -> None:
    for one in compiled:
        if one.launch.name == "quantize_kernel":
            assert "div.rn.f32" in one.ptx
            assert "div.full.f32" not in one.ptx
            assert "cvt.rn.satfinite.e4m3x2.f32" in one.ptx


def test_two_programs_of_the_narrow_product_fit_an_sm(compiled: list[Compiled]) -> None:
    """The module's claims about its tiles: shared memory, tensor memory and registers (65536) for two at a time."""
    for one in compiled:
        if one.launch.name == "gemm_w4a4_kernel" and dict(one.launch.constants)["BN"] == 128:
            assert 2 * one.shared_bytes <= SHARED_BYTES
            assert 2 * one.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS
            assert 2 * one.registers * 32 * dict(one.launch.options)["num_warps"] <= 65536
