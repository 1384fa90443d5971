"""``Nvfp4MoE`` on Hopper against float64: token counts, routings, amplitudes, clamps, maps; bits; refusals."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import moe_configs

from ownpath import Nvfp4MoE
from ownpath.conformance.bounds import MAX_REL_L2, Exact, assert_allowed, assert_rounded_once, relative_l2, rounding
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens, exact_mixture, random_codes
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.contract import Config
from ownpath.kernels.nvfp4.cases import CASES
from ownpath.numerics import decode_mxfp4_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

LIMIT = 10.0
EXPERTS = [case for case in CASES if case.op == "nvfp4_moe"]
FULL = ((256, 4096, 2048), (384, 7168, 3072))
FULL_COUNTS = (1, 8, 100, 700)
SKEWED_COUNTS = (1, 40, 700, 6144)
SHARED_COUNTS = (1, 30, 900)
PARTS = (1, 9, 130, 1100)


def kernel_configs() -> Iterator[Config]:
    """Those of the shapes, and of the small experts below by their (token, slot) pairs."""
    for case in EXPERTS:
        num_experts, top_k, hidden, inter = case.sizes
        for is_invariant in (False, True):
            pairs = [count * top_k for count in case.tokens]
            yield from moe_configs((num_experts, hidden, inter), pairs, is_invariant=is_invariant)
    for dims in FULL:
        yield from moe_configs(dims, [6 * count for count in FULL_COUNTS])
    yield from moe_configs((16, 512, 256), [4 * count for count in SKEWED_COUNTS])
    yield from moe_configs((8, 256, 256), [50 * 3, 20 * 2, 1 * 2, 33 * 2, 21 * 2, 12 * 2])
    yield from moe_configs((8, 256, 256), [33 * 2], wide_ids=True)
    yield from moe_configs((9, 512, 256), [4 * count for count in SHARED_COUNTS], num_shared=1)
    yield from moe_configs((8, 512, 256), [77 * 3], mapped=True)
    yield from moe_configs((16, 512, 256), [4 * count for count in (*PARTS, 3000)], is_invariant=True)


def runner(experts: ExpertStacks, name: str = "cute.nvfp4_moe", limit: float = LIMIT) -> Nvfp4MoE:
    return Nvfp4MoE(*experts.clone().tensors(), swiglu_limit=limit, kernel=name)


def poison(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0xFF)


def check(
    moe: Nvfp4MoE, experts: ExpertStacks, routed: RoutedTokens, limit: float = LIMIT, num_shared: int = 0
) -> None:
    given = {"num_shared": num_shared} if num_shared else {}
    workspace = moe.workspace(len(routed.x), routed.ids.shape[1] + num_shared)
    found = []
    for _ in range(2):
        out = torch.empty_like(routed.x)
        poison(workspace, out)
        y = moe(routed.x, routed.ids, routed.weights, out=out, workspace=workspace, **given)
        found.append(y.clone())
    assert found[0].any()
    assert torch.equal(*found)
    assert_rounded_once(found[0], exact_mixture(experts, routed, limit, num_shared))


@pytest.mark.parametrize("name", ["cute.nvfp4_moe", "cute.nvfp4_moe_invariant"])
@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.label)
def test_against_float64(name: str, case: KernelCase, cuda: torch.device) -> None:
    num_experts, top_k, hidden, inter = case.sizes
    experts = ExpertStacks.draw(num_experts, hidden, inter, cuda)
    moe = runner(experts, name)
    for num_tokens in case.tokens:
        check(moe, experts, RoutedTokens.draw(num_tokens, hidden, num_experts, top_k, cuda))


@pytest.mark.parametrize("shape", FULL, ids=["V4-Flash", "V4-Pro"])
def test_full_shapes(shape: tuple[int, int, int], cuda: torch.device) -> None:
    """All experts exist; tokens go to a few of them, so that the float64 reference stays small."""
    num_experts, hidden, inter = shape
    experts = ExpertStacks.draw(num_experts, hidden, inter, cuda)
    moe = Nvfp4MoE(*experts.clone().tensors(), swiglu_limit=LIMIT)
    few = torch.tensor([0, 1, num_experts // 2, num_experts - 2, num_experts - 1, 7], device=cuda)
    for num_tokens in FULL_COUNTS:
        routed = RoutedTokens.draw(num_tokens, hidden, len(few), 6, cuda)
        check(moe, experts, RoutedTokens(routed.x, few[routed.ids.long()].int(), routed.weights))


@pytest.mark.parametrize("num_tokens", SKEWED_COUNTS)
def test_skewed_routings(num_tokens: int, cuda: torch.device) -> None:
    experts = ExpertStacks.draw(16, 512, 256, cuda)
    moe = runner(experts)
    drawn = RoutedTokens.draw(num_tokens, 512, 16, 4, cuda)
    one = torch.full_like(drawn.ids, 11)
    half = torch.where(torch.rand(drawn.ids.shape, device=cuda) < 0.5, one, drawn.ids)
    for ids in (one, half, drawn.ids.clamp(max=3)):
        check(moe, experts, RoutedTokens(drawn.x, ids, drawn.weights))


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("limit", [0.5, 10.0, 1e9])
def test_amplitudes_and_clamps(amplitude: float, limit: float, cuda: torch.device) -> None:
    experts = ExpertStacks.draw(8, 256, 256, cuda, extreme=True)
    check(runner(experts, limit=limit), experts, RoutedTokens.draw(50, 256, 8, 3, cuda, amplitude), limit)


def test_shared_experts(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(9, 512, 256, cuda)
    for num_tokens in SHARED_COUNTS:
        check(runner(experts), experts, RoutedTokens.draw(num_tokens, 512, 8, 3, cuda), num_shared=1)


def test_an_expert_map_adds_up_to_the_whole(cuda: torch.device) -> None:
    """Two runners with every other expert: their float64 sum is the reference of all."""
    experts = ExpertStacks.draw(8, 512, 256, cuda)
    routed = RoutedTokens.draw(77, 512, 8, 3, cuda)
    exact = exact_mixture(experts, routed, LIMIT)
    total = torch.zeros_like(exact.value)
    for parity in (0, 1):
        local = ExpertStacks(*(tensor[parity::2].contiguous() for tensor in experts.tensors()))
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=cuda)
        expert_map[parity::2] = torch.arange(4, dtype=torch.int32, device=cuda)
        total += runner(local)(routed.x, routed.ids, routed.weights, expert_map=expert_map).double()
    # Each half is rounded, and a sum of their roundings is not one of the whole.
    halves = rounding(torch.bfloat16) * exact.value.abs()
    assert_allowed(total, Exact(exact.value, 2 * (exact.bound + halves)))


def test_ids_outside_the_experts_contribute_nothing(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(8, 256, 256, cuda)
    routed = RoutedTokens.draw(20, 256, 8, 2, cuda)
    ids = routed.ids.clone()
    ids[3], ids[4, 0], ids[5, 1] = -1, 8, 1 << 30
    check(runner(experts), experts, RoutedTokens(routed.x, ids, routed.weights))
    y = runner(experts)(routed.x[3:4], ids[3:4], routed.weights[3:4])
    assert not y.any()


def test_wide_ids_give_the_same_bits(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(8, 256, 256, cuda)
    routed = RoutedTokens.draw(33, 256, 8, 2, cuda)
    moe = runner(experts)
    assert torch.equal(moe(routed.x, routed.ids, routed.weights), moe(routed.x, routed.ids.long(), routed.weights))


def test_an_invariant_tokens_bits_do_not_depend_on_the_batch(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(16, 512, 256, cuda)
    moe = runner(experts, "cute.nvfp4_moe_invariant")
    routed = RoutedTokens.draw(3000, 512, 16, 4, cuda)
    whole = moe(routed.x, routed.ids, routed.weights)
    for count in PARTS:
        part = moe(routed.x[:count], routed.ids[:count], routed.weights[:count])
        assert torch.equal(part, whole[:count]), count


def test_from_mxfp4(cuda: torch.device) -> None:
    shapes = ((8, 512, 128), (8, 256, 128))
    codes = [random_codes(shape, cuda) for shape in shapes]
    scales = [torch.randint(110, 125, (e, n, k // 16), dtype=torch.uint8, device=cuda) for e, n, k in shapes]
    w13, w2 = (
        torch.stack([decode_mxfp4_blocks(c[i], s[i].view(torch.float8_e8m0fnu), torch.float64) for i in range(8)])
        for c, s in zip(codes, scales, strict=True)
    )
    routed = RoutedTokens.draw(21, 256, 8, 2, cuda)
    y = torch.zeros(21, 256, dtype=torch.float64, device=cuda)
    for expert in range(8):
        token_ids, slots = torch.where(routed.ids == expert)
        gate, up = (routed.x[token_ids].double() @ w13[expert].T).split(256, dim=-1)
        hidden = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
        y.index_add_(0, token_ids, hidden @ w2[expert].T * routed.weights[token_ids, slots, None].double())
    e8m0 = [scale.view(torch.float8_e8m0fnu) for scale in scales]
    moe = Nvfp4MoE.from_mxfp4(codes[0], e8m0[0], codes[1], e8m0[1], swiglu_limit=LIMIT)
    assert relative_l2(moe(routed.x, routed.ids, routed.weights), y) <= MAX_REL_L2


def test_a_captured_call_replays_without_allocating(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(8, 256, 256, cuda)
    moe = runner(experts)
    routed, other = (RoutedTokens.draw(12, 256, 8, 2, cuda) for _ in range(2))
    given = {"workspace": moe.workspace(12, 2), "out": torch.empty_like(routed.x)}
    moe(routed.x, routed.ids, routed.weights, **given)
    held = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    moe(routed.x, routed.ids, routed.weights, **given)
    assert torch.cuda.memory_stats(cuda)["allocation.all.allocated"] == held
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe(routed.x, routed.ids, routed.weights, **given)
    for name in ("x", "ids", "weights"):
        getattr(routed, name).copy_(getattr(other, name))
    graph.replay()
    replayed = y.clone()
    assert torch.equal(replayed, moe(other.x, other.ids, other.weights))


def test_what_it_cannot_take_is_named(cuda: torch.device) -> None:
    experts = ExpertStacks.draw(4, 256, 256, cuda)
    routed = RoutedTokens.draw(5, 256, 4, 2, cuda)
    moe = runner(experts)
    with pytest.raises(ValueError, match=r"x must be torch\.bfloat16"):
        moe(routed.x.float(), routed.ids, routed.weights)
    with pytest.raises(ValueError, match="topk_ids"):
        moe(routed.x, routed.ids[:3], routed.weights)
    with pytest.raises(ValueError, match="topk_weights"):
        moe(routed.x, routed.ids, routed.weights.double())
    with pytest.raises(ValueError, match=r"workspace holds \d+ bytes, this call of 5 tokens needs"):
        moe(routed.x, routed.ids, routed.weights, workspace=moe.workspace(1, 2))
    with pytest.raises(ValueError, match="num_shared is 4"):
        moe(routed.x, routed.ids, routed.weights, num_shared=4)
    bad = experts.clone()
    bad.w2_scale.view(torch.uint8)[1, 2, 3] = 0x7F
    kept = bad.w13.clone()
    with pytest.raises(ValueError, match="w2_scale holds a NaN"):
        Nvfp4MoE(*bad.tensors(), swiglu_limit=LIMIT)
    assert torch.equal(bad.w13, kept), "a refused operand must stay as it was"
    odd = ExpertStacks.draw(2, 192, 128, cuda)
    with pytest.raises(ValueError, match="multiples of 128"):
        Nvfp4MoE(*odd.tensors(), swiglu_limit=LIMIT)
