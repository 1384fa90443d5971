"""The experts' kernel by slices on Hopper against float64: tiles, routings, forms of ids; a call's bits repeat."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from ownpath.conformance.bounds import assert_rounded_once
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens, exact_mixture
from ownpath.formats import NVFP4
from ownpath.kernels.contract import Config, Routing, StoredExperts
from ownpath.kernels.nvfp4.choose import MoeChoice, choose_moe
from ownpath.kernels.nvfp4.moe import MoeOperand, Nvfp4MoeKernel
from ownpath.kernels.nvfp4.sliced import sliced_bytes, sliced_configs
from ownpath.kernels.nvfp4.sliced_config import SlicedConfig
from ownpath.qtensor import QuantTensor

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

LIMIT = 10.0
NUM_EXPERTS, TOP_K, HIDDEN, INTER = 9, 4, 512, 512
TILES = tuple(SlicedConfig(tokens, 4, 4) for tokens in (1, 2, 4))
COUNTS = (1, 2, 3, 8)


def kernel_configs() -> Iterator[Config]:
    for tile in TILES:
        yield from sliced_configs(tile, False, False, 0)
    for flags in ((True, False, 0), (False, True, 0), (False, False, 1)):
        yield from sliced_configs(TILES[-1], *flags)


def choose_sliced(
    tile: SlicedConfig, pairs: int, num_experts: int, hidden: int, inter: int, invariant: bool
) -> MoeChoice:
    return replace(choose_moe(pairs, num_experts, hidden, inter, invariant), sliced=tile)


def runner(tile: SlicedConfig, experts: ExpertStacks) -> tuple[Nvfp4MoeKernel, MoeOperand]:
    kernel, own = Nvfp4MoeKernel(False, choose=partial(choose_sliced, tile)), experts.clone()
    gate_up = QuantTensor(own.w13, own.w13_scale, own.w13_scale_2, NVFP4)
    down = QuantTensor(own.w2, own.w2_scale, own.w2_scale_2, NVFP4)
    return kernel, kernel.prepare(StoredExperts(gate_up, down, LIMIT))


def run(made: tuple[Nvfp4MoeKernel, MoeOperand], x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Runs twice with poisoned memory and returns the result, the same bits both times."""
    kernel, operand = made
    pairs = len(x) * (routing.ids.shape[1] + routing.num_shared)
    found = []
    for _ in range(2):
        workspace = torch.full((sliced_bytes(pairs, HIDDEN, INTER),), 0xFF, dtype=torch.uint8, device=x.device)
        out = torch.full_like(x, torch.nan)
        found.append(kernel.run(x, routing, operand, out=out, workspace=workspace))
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_against_float64(tile: SlicedConfig, cuda: torch.device) -> None:
    experts = ExpertStacks.draw(NUM_EXPERTS, HIDDEN, INTER, cuda)
    made = runner(tile, experts)
    for count in COUNTS:
        routed = RoutedTokens.draw(count, HIDDEN, NUM_EXPERTS, TOP_K, cuda)
        one, absent = torch.full_like(routed.ids, 3), routed.ids.clone()
        absent[0, 1], absent[-1, 2], absent[-1, 0] = -1, NUM_EXPERTS, 1 << 30
        for ids in (routed.ids, one, absent):
            known = torch.where((ids >= 0) & (ids < NUM_EXPERTS), ids, -1)
            exact = exact_mixture(experts, RoutedTokens(routed.x, known, routed.weights), LIMIT)
            assert_rounded_once(run(made, routed.x, Routing(ids, routed.weights)), exact)


def test_forms_of_routing(cuda: torch.device) -> None:
    """Wide ids give the same bits; a shared expert takes every token; an expert map sends ids elsewhere."""
    experts = ExpertStacks.draw(NUM_EXPERTS, HIDDEN, INTER, cuda)
    made = runner(TILES[-1], experts)
    routed = RoutedTokens.draw(5, HIDDEN, NUM_EXPERTS - 1, TOP_K, cuda)
    plain = run(made, routed.x, Routing(routed.ids, routed.weights))
    assert torch.equal(plain, run(made, routed.x, Routing(routed.ids.long(), routed.weights)))
    shared = run(made, routed.x, Routing(routed.ids, routed.weights, 1))
    assert_rounded_once(shared, exact_mixture(experts, routed, LIMIT, 1))
    table = torch.tensor([0, 1, -1, 3, 2, -1, 6, 8, 7], dtype=torch.int32, device=cuda)
    mapped = run(made, routed.x, Routing(routed.ids, routed.weights, 0, table))
    local = RoutedTokens(routed.x, table[routed.ids.long()], routed.weights)
    assert_rounded_once(mapped, exact_mixture(experts, local, LIMIT))
