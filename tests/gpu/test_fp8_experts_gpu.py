"""Experts on FP8 tensor cores: every stage of a call against float64 of the stage before it; bits; maps; refusals.

A rounding to E4M3 turns a difference in the last bit of its input into one of 2**-4 where it falls on the other side of
a midpoint. So stages are judged one by one, on what the call left in its scratch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from ownpath.conformance.bounds import MAX_REL_L2, relative_l2
from ownpath.conformance.quant_weights import ExpertStacks
from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.contract import Config, Routing, StoredExperts
from ownpath.kernels.fp8_experts.cases import CASES
from ownpath.kernels.fp8_experts.choose import choose
from ownpath.kernels.fp8_experts.config import QuantizeRowsConfig
from ownpath.kernels.fp8_experts.read_back_config import ReadBackConfig
from ownpath.kernels.nvfp4.choose import choose_moe
from ownpath.kernels.nvfp4.config import CombineConfig, PermuteConfig
from ownpath.kernels.nvfp4.launch import align_config
from ownpath.kernels.official_experts.ref import ExpertWeights, moe_quantized_inputs
from ownpath.numerics import decode_mxfp4_blocks, fake_quantize_fp8
from ownpath.qtensor import QuantTensor

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

LIMIT = 10.0
MIDDLE = 119
TENSOR_CORE_ULP = 2.0**-13
"""FP8 products are aligned to the largest of a step and cut to at least 13 fraction bits before they are added."""
TWIN_REL_L2 = 2.0**-6
"""Hidden rows of kernel and twin may differ in BF16's last bit, which is then one of E4M3's in 1 of 16 places."""
BF16_HALF_ULP = 2.0**-8
STEEPEST_SILU = 1.1
PARTS = ((0, 1), (1, 30), (30, 100))
MAPPED = 60
READ_BACK = 33


def kernel_configs() -> Iterator[Config]:
    """Those of the cases, of an expert map, and of the BF16 products behind the rounding of their inputs."""
    yield from (QuantizeRowsConfig(True), QuantizeRowsConfig(False), align_config(False, True, 0, MAPPED * 4))
    num_experts, top_k, hidden, inter = CASES[0].sizes
    wide = choose_moe(READ_BACK * top_k, num_experts, hidden, inter, False)
    yield from (ReadBackConfig(), wide.gate_up, wide.down, PermuteConfig())
    for case in CASES:
        num_experts, top_k, hidden, inter = case.sizes
        for is_invariant in (False, True):
            for count in (*case.tokens, 100, MAPPED, *(stop - start for start, stop in PARTS)):
                choice = choose(count * top_k, num_experts, hidden, inter, is_invariant)
                yield from (choice.gate_up, choice.down, CombineConfig(0, choice.down.wide))
                yield align_config(False, False, 0, count * top_k)


@dataclass(frozen=True)
class Experts:
    """MXFP4 experts: codes and E8M0 scales of gate and up, and of down."""

    w13: tuple[torch.Tensor, torch.Tensor]
    w2: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def draw(cls, num_experts: int, hidden: int, inter: int, device: torch.device) -> "Experts":
        def side(num_rows: int, num_cols: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randint(0, 256, (num_experts, num_rows, num_cols // 2), dtype=torch.uint8, device=device)
            exponents = torch.randint(-4, 5, (num_experts, num_rows, num_cols // 32), device=device) + MIDDLE
            return codes, exponents.to(torch.uint8).view(torch.float8_e8m0fnu)

        return cls(side(2 * inter, hidden), side(hidden, inter))

    def stored(self) -> StoredExperts:
        w13, w2 = (QuantTensor(codes.clone(), scale.clone(), None, MXFP4) for codes, scale in (self.w13, self.w2))
        return StoredExperts(w13, w2, LIMIT)


def routed(num_tokens: int, case: KernelCase, device: torch.device) -> tuple[torch.Tensor, Routing]:
    num_experts, top_k, hidden, _ = case.sizes
    ids = torch.rand(num_tokens, num_experts, device=device).topk(top_k).indices.int()
    x = torch.randn(num_tokens, hidden, device=device).bfloat16()
    return x, Routing(ids, torch.rand(num_tokens, top_k, device=device))


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, torch.nan)


class Stages:
    """The scratch that a call leaves: the rows of one (token, slot) pair each, in the experts' order."""

    def __init__(self, workspace: torch.Tensor, pairs: int, case: KernelCase, is_invariant: bool) -> None:
        from ownpath.kernels.fp8_experts.moe import Scratch

        num_experts, top_k, hidden, inter = case.sizes
        choice = choose(pairs, num_experts, hidden, inter, is_invariant)
        tiles = min(num_experts, pairs) + pairs // choice.tile_rows + 1
        places = Scratch.of(pairs, tiles, (hidden, inter), choice.down.wide)

        def part(start: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return workspace[start : start + pairs * width * dtype.itemsize].view(dtype)

        def scaled(start: int, scales: int, width: int) -> torch.Tensor:
            codes = part(start, width, torch.float8_e4m3fn).view(pairs, -1, 128).double()
            return (codes * part(scales, width // 128, torch.float32).view(-1, pairs).T[..., None].double()).flatten(1)

        schedule = workspace[: places.tokens].view(torch.int32)
        first = int(schedule[1]) + pairs
        self.row_of = schedule[first : first + pairs].view(-1, top_k).long()
        self.tokens = scaled(places.tokens, places.token_scales, hidden)
        self.hidden = part(places.hidden, inter, torch.bfloat16).view(pairs, inter)
        self.rounded = scaled(places.rounded, places.rounded_scales, inter)
        self.rows = part(places.rows, hidden, torch.float32 if choice.down.wide else torch.bfloat16).view(pairs, hidden)


def assert_near(found: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, what: object) -> None:
    assert torch.isfinite(found).all(), what
    assert ((found.double() - exact).abs() <= BF16_HALF_ULP * exact.abs() + slack).all(), what
    assert relative_l2(found, exact) <= MAX_REL_L2, what


def assert_stages(stages: Stages, experts: Experts, x: torch.Tensor, routing: Routing) -> None:
    for expert in routing.ids.unique().tolist():
        token_ids, slots = torch.where(routing.ids == expert)
        rows = stages.row_of[token_ids, slots]
        w13, w2 = (
            decode_mxfp4_blocks(*(part[expert] for part in side), torch.float64) for side in (experts.w13, experts.w2)
        )
        a = stages.tokens[rows]
        assert torch.equal(a.float(), fake_quantize_fp8(x[token_ids].float(), 128)), expert
        (gate, up), (e_gate, e_up) = (
            (a @ w13.T).chunk(2, 1),
            (4 * TENSOR_CORE_ULP * (a.abs() @ w13.abs().T)).chunk(2, 1),
        )
        silu, clamped = torch.nn.functional.silu(gate.clamp(max=LIMIT)), up.clamp(-LIMIT, LIMIT)
        slack = STEEPEST_SILU * e_gate * (clamped.abs() + e_up) + silu.abs() * e_up
        assert_near(stages.hidden[rows], silu * clamped, slack, ("hidden", expert))
        b = stages.rounded[rows]
        assert torch.equal(b.float(), fake_quantize_fp8(stages.hidden[rows].float(), 128)), expert
        assert_near(stages.rows[rows], b @ w2.T, 4 * TENSOR_CORE_ULP * (b.abs() @ w2.abs().T), ("rows", expert))


@pytest.mark.parametrize("name", ["cute.fp8_experts", "cute.fp8_experts_invariant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_stage_against_float64(name: str, case: KernelCase, cuda: torch.device) -> None:
    from ownpath.kernels.registry import KERNELS

    kernel, (num_experts, _, hidden, inter) = KERNELS[name], case.sizes
    experts = Experts.draw(num_experts, hidden, inter, cuda)
    operand = kernel.prepare(experts.stored())
    for num_tokens in case.tokens:
        x, routing = routed(num_tokens, case, cuda)
        found = []
        for _ in range(2):
            workspace = kernel.workspace(operand, *routing.ids.shape)
            workspace.fill_(255)
            found.append(kernel.run(x, routing, operand, out=poisoned(x), workspace=workspace))
        assert torch.equal(*found), num_tokens
        stages = Stages(workspace, routing.ids.numel(), case, name.endswith("_invariant"))
        assert_stages(stages, experts, x, routing)
        summed = (stages.rows[stages.row_of].double() * routing.weights[..., None].double()).sum(1)
        assert relative_l2(found[0], summed) <= MAX_REL_L2


def test_near_the_twin(cuda: torch.device) -> None:
    """The whole call: rounding flips between the stages are rare enough not to show in the mean."""
    from ownpath.kernels.fp8_experts.moe import fp8_experts

    case = CASES[0]
    experts = Experts.draw(case.sizes[0], case.sizes[2], case.sizes[3], cuda)
    operand = fp8_experts.prepare(experts.stored())
    x, routing = routed(150, case, cuda)
    w13, w2 = (ExpertWeights(MXFP4, *side) for side in (experts.w13, experts.w2))
    twin = moe_quantized_inputs(x, routing.ids, routing.weights, w13, w2, LIMIT)
    assert relative_l2(fp8_experts.run(x, routing, operand), twin) <= TWIN_REL_L2


def test_rows_keep_their_bits(cuda: torch.device) -> None:
    from ownpath.kernels.fp8_experts.moe import fp8_experts_invariant

    case = CASES[0]
    experts = Experts.draw(case.sizes[0], case.sizes[2], case.sizes[3], cuda)
    operand = fp8_experts_invariant.prepare(experts.stored())
    x, routing = routed(100, case, cuda)
    whole = fp8_experts_invariant.run(x, routing, operand)
    for start, stop in PARTS:
        part = Routing(routing.ids[start:stop].contiguous(), routing.weights[start:stop].contiguous())
        assert torch.equal(fp8_experts_invariant.run(x[start:stop], part, operand), whole[start:stop]), (start, stop)


def test_an_expert_map_leaves_the_others_out(cuda: torch.device) -> None:
    from ownpath.kernels.fp8_experts.moe import fp8_experts

    case = CASES[0]
    experts = Experts.draw(case.sizes[0], case.sizes[2], case.sizes[3], cuda)
    operand = fp8_experts.prepare(experts.stored())
    x, routing = routed(MAPPED, case, cuda)
    here = torch.arange(case.sizes[0], dtype=torch.int32, device=cuda)
    here[::2] = -1
    left = routing.weights * (routing.ids % 2 == 1)
    mapped = fp8_experts.run(x, Routing(routing.ids, routing.weights, 0, here), operand)
    assert torch.equal(mapped, fp8_experts.run(x, Routing(routing.ids, left), operand))


def test_nan_stays_with_its_token(cuda: torch.device) -> None:
    from ownpath.kernels.fp8_experts.moe import fp8_experts

    case = CASES[0]
    experts = Experts.draw(case.sizes[0], case.sizes[2], case.sizes[3], cuda)
    operand = fp8_experts.prepare(experts.stored())
    x, routing = routed(33, case, cuda)
    clean = fp8_experts.run(x, routing, operand)
    x[5, 700] = torch.nan
    y = fp8_experts.run(x, routing, operand)
    assert torch.isnan(y[5]).all()
    assert torch.equal(torch.cat((y[:5], y[6:])), torch.cat((clean[:5], clean[6:])))


def test_scales_outside_the_window_stay_on_bf16(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    from ownpath.kernels.fp8_experts.moe import fp8_experts

    case = CASES[0]
    experts = Experts.draw(case.sizes[0], case.sizes[2], case.sizes[3], cuda)
    row = experts.w2[1].view(torch.uint8)[1, 3]
    row.fill_(MIDDLE - 12)  # of the 18 powers that NVFP4 has, more than the 15 of one row
    row[2] = MIDDLE + 3
    operand = fp8_experts.prepare(experts.stored())
    assert "w2 of expert 1: the block scales of a row span more than 2**14" in caplog.text
    x, routing = routed(READ_BACK, case, cuda)
    assert fp8_experts.variant(x, routing, operand).startswith("fp8_experts_read_back nvfp4_moe")
    w13, w2 = (ExpertWeights(MXFP4, *side) for side in (experts.w13, experts.w2))
    twin = moe_quantized_inputs(x, routing.ids, routing.weights, w13, w2, LIMIT)
    for _ in range(2):
        y = fp8_experts.run(x, routing, operand, out=poisoned(x))
        assert relative_l2(y, twin) <= TWIN_REL_L2


def test_other_nvfp4_is_refused(cuda: torch.device) -> None:
    from ownpath.kernels.fp8_experts.moe import fp8_experts

    experts = ExpertStacks.draw(2, 256, 256, cuda)
    codes = experts.w13.clone()
    sides = (experts.w13, experts.w13_scale, experts.w13_scale_2), (experts.w2, experts.w2_scale, experts.w2_scale_2)
    stored = StoredExperts(*(QuantTensor(*side, NVFP4) for side in sides), LIMIT)
    with pytest.raises(ValueError, match="w13 of expert 0 was not made from MXFP4: a block scale is no power of two"):
        fp8_experts.prepare(stored)
    assert torch.equal(experts.w13, codes)
