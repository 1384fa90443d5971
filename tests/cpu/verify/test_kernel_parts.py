"""Parts of the kernels stage: comparison, numbers of rows, rounding by table, angles, expected refusals."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.numerics.bit_oracles import nearest_code
from support.checkpoints import SMALL, random_checkpoint
from support.layer_faults import linear
from support.mutations.mutation import on_layer

from ownpath.config import EngineConfig, ModelConfig
from ownpath.conformance import exact
from ownpath.conformance.bounds import Exact, deviation, deviation_of_repeats, rounding
from ownpath.conformance.memory import FilledMemory, fill
from ownpath.finding import failed
from ownpath.formats import BF16
from ownpath.kernels.contract import StoredExperts
from ownpath.kernels.fp8.choose import w8a8_config, w8a16_config
from ownpath.kernels.nvfp4.choose import choose_linear, choose_moe
from ownpath.kernels.nvfp4.moe_sliced import sliced_configs
from ownpath.oracle.formats import E2M1, E4M3, nearest
from ownpath.oracle.formulas import frequencies
from ownpath.qtensor import QuantTensor
from ownpath.runners import PlainLinear, Router
from ownpath.runners.moe import MoeRunner
from ownpath.verify import kernel_stage as stage
from ownpath.verify.kernels import products
from ownpath.verify.kernels.quantizers import EXPONENTS, edges
from ownpath.verify.kernels.row_counts import MOST, row_counts, row_ranges, scan_row_counts
from ownpath.verify.subject import Selection, Subject

HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Of the significand: 8 bits and 24."""


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_one_rounding_is_all_that_is_allowed(dtype: torch.dtype) -> None:
    assert rounding(dtype) == HALF_ULP[dtype]
    exact = torch.linspace(0.5, 4, 1001, dtype=torch.float64)[:, None]
    right = exact.to(dtype)
    assert 0.9 < deviation(right, Exact(exact, torch.zeros_like(exact))).ratio <= 1
    beyond = torch.nextafter(right, torch.full_like(right, math.inf))
    assert deviation(beyond, Exact(exact, torch.zeros_like(exact))).ratio > 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_near(wrong: float) -> None:
    value = torch.ones(5, 3, dtype=torch.float64)
    found = torch.ones(11, 3)
    found[8, 2] = wrong
    worst = deviation_of_repeats(found, Exact(value, value * 1e9))
    assert worst.ratio == math.inf
    assert worst.place == (8, 2)
    assert worst.columns == (2,)


def test_another_shape_is_never_near() -> None:
    value = torch.ones(4, 3, dtype=torch.float64)
    assert deviation(torch.ones(4, 2), Exact(value, value)).ratio == math.inf


@pytest.mark.parametrize("matrix", [(1536, 4096), (32768, 1024), (4096, 8192), (8192, 1024)], ids=str)
def test_no_variant_of_the_dense_products_is_missed(matrix: tuple[int, int]) -> None:
    num_rows, num_cols = matrix
    key = num_rows // 64, num_cols // 128, True, False
    for variant in (
        lambda count: choose_linear(count, num_rows, num_cols, False).gemm.name,
        lambda count: w8a16_config(count, key, 132).name,
        lambda count: w8a8_config(count, key, 132).name,
    ):
        found = row_ranges(variant)
        assert set(found) == {variant(count) for count in range(1, MOST + 1)}
        for name, counts in found.items():
            assert {variant(count) for count in counts} == {name}


def test_no_variant_of_the_experts_is_missed() -> None:
    def variant(count: int) -> str:
        choice = choose_moe(6 * count, 256, 4096, 2048, False)
        if choice.sliced:
            return " ".join(config.name for config in sliced_configs(choice.sliced, False, False, 0))
        return f"{choice.gate_up.name} {choice.down.name}"

    assert set(row_ranges(variant)) == {variant(count) for count in range(1, MOST + 1)}
    assert max(scan_row_counts()) == MOST


@pytest.mark.parametrize("magnitudes", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_the_nearest_value_by_fractions(magnitudes: tuple[float, ...]) -> None:
    x = edges(magnitudes, 16, 16, torch.float32).flatten().unique()
    for value, got in zip(x.tolist(), nearest(x, magnitudes).tolist(), strict=True):
        assert got == math.copysign(magnitudes[nearest_code(value, list(magnitudes))], value)
    found = {abs(value) for value in x.tolist()}
    for middle in ((a + b) / 2 for a, b in pairwise(magnitudes)):
        assert any(math.ldexp(middle, exponent) in found for exponent in EXPONENTS)


@pytest.mark.parametrize("compressing", [False, True], ids=["sliding", "compressing"])
def test_frequencies_follow_yarn(compressing: bool) -> None:
    """Ends of the ramp as YaRN's paper has them: fast pairs unchanged, slow ones divided, between them a mixture."""
    config = ModelConfig.from_dict(SMALL)
    theta = SMALL["compress_rope_theta"] if compressing else SMALL["rope_theta"]
    plain = [theta ** (-2 * pair / SMALL["qk_rope_head_dim"]) for pair in range(SMALL["qk_rope_head_dim"] // 2)]
    ratio = (frequencies(config, int(compressing), torch.float64) / torch.tensor(plain, dtype=torch.float64)).tolist()
    if not compressing:
        assert ratio == pytest.approx([1.0] * len(plain), rel=1e-14)
        return
    scaling = SMALL["rope_scaling"]
    for pair, (freq, times) in enumerate(zip(plain, ratio, strict=True)):
        turns = freq * scaling["original_max_position_embeddings"] / (2 * math.pi)
        if turns > scaling["beta_fast"]:
            assert times == pytest.approx(1.0, rel=1e-14), pair
        elif turns < scaling["beta_slow"] / theta ** (2 / SMALL["qk_rope_head_dim"]):
            assert times == pytest.approx(1 / scaling["factor"], rel=1e-14), pair
        assert 1 / scaling["factor"] <= times * (1 + 1e-14)
        assert times <= 1 + 1e-14


@pytest.mark.parametrize("byte", [0xFF, 0x00])
def test_memory_without_contents_is_filled(byte: int) -> None:
    like = torch.ones(3, 4, dtype=torch.bfloat16)
    with FilledMemory(byte):
        made = [torch.empty(3), torch.empty_like(like), like.new_empty(2, 2), torch.zeros(2)]
        product = like.float() @ like.float().T
    for tensor in made[:3]:
        assert (tensor.view(torch.uint8) == byte).all()
    assert not made[3].any()
    assert (product == 4).all()
    part = torch.zeros(4, 4)[1:3, 2]
    fill(part, byte)
    assert part.isnan().all() == (byte == 0xFF)


def test_a_variant_that_no_other_row_count_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel wrong in one form alone, at a number of rows that only the chooser tells."""
    folder = random_checkpoint(tmp_path / "full", "full-nvfp4").folder
    monkeypatch.setattr(products, "variants_of", lambda *_: iter([("tile_n80", 77), ("tile_n64", 64)]))
    monkeypatch.setattr(stage, "CHECKS", stage.CHECKS[:1])
    of = Subject.of(folder, EngineConfig(), Selection(frozenset({3})))
    with on_layer(3, linear("wq_b", lambda run, x: run(x) * (1.01 if len(x) == 77 else 1.0))).applied():
        (found,) = failed(stage.kernel_stage(of))
    assert (found.id, found.where, found.kernel) == ("K04", "layers.3.attn.wq_b", "ref.nvfp4_linear tile_n80")
    assert "77 rows" in found.message


def test_a_router_asks_for_a_token_id_a_row() -> None:
    gate: Any = PlainLinear(torch.ones(4, 8))
    table = torch.zeros(10, 2, dtype=torch.int64)
    router = Router(gate, 2, 1.0, None, table)
    with pytest.raises(ValueError, match="2 ids for 3 rows"):
        router(torch.ones(3, 8), torch.zeros(2, dtype=torch.int64))


def test_official_experts_ask_for_routing_that_fits() -> None:
    w13, w2 = (QuantTensor(torch.ones(2, rows, 8), None, None, BF16) for rows in (16, 8))
    experts = MoeRunner("ref.moe_weight_first", StoredExperts(w13, w2, 10.0))
    ids, weights = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    for wrong_ids, wrong_weights in ((ids[:2], weights), (ids.float(), weights), (ids, weights[:, :1])):
        with pytest.raises(ValueError, match="topk_"):
            experts(torch.ones(3, 8), wrong_ids, wrong_weights)


def test_a_wide_product_is_bounded_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is made a few of the weight's rows at a time."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (3, 10))
    whole = exact.product(x, weight)
    monkeypatch.setattr(exact, "ROWS_AT_ONCE", 4)
    parts = exact.product(x, weight)
    assert torch.equal(parts.value, whole.value)
    assert torch.allclose(parts.bound, whole.bound, rtol=16 * torch.finfo(torch.float64).eps, atol=0)


def test_only_a_vocabularys_logits_are_never_those_of_many_rows() -> None:
    """V4-Pro's widest product has 128 heads of 512 columns."""
    assert max(row_counts(True, 128 * 512)) == 16384
    assert max(row_counts(True, 129280)) < 256
    assert row_counts(False, 512) == row_counts(True, 129280)
