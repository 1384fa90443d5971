"""Experts of which a rank has some: their kernels with a map are known at start, and no later call needs another."""

from types import SimpleNamespace

import pytest
import torch

from ownpath.config import ModelConfig
from ownpath.integrations.vllm.mapped import mapped_configs
from ownpath.kernels.nvfp4.moe import Nvfp4MoeKernel, nvfp4_moe, nvfp4_moe_invariant
from ownpath.loading import default_model_dir
from ownpath.plan.part import RankShare
from ownpath.runners.moe import MoeRunner, PlainMoE

SLOT = "layers.0.ffn.experts"
FLASH = {"hidden": 4096, "inter": 2048}


def runner_of(kernel: Nvfp4MoeKernel, num_experts: int) -> MoeRunner:
    """A runner with V4-Flash's widths, of which only shapes are there."""
    runner = MoeRunner.__new__(MoeRunner)
    runner.kernel = kernel  # type: ignore[assignment]
    runner.operand = SimpleNamespace(num_experts=num_experts, **FLASH)
    return runner


@pytest.mark.parametrize("kernel", [nvfp4_moe, nvfp4_moe_invariant])
def test_every_kernel_of_a_call_through_a_map_is_compiled_at_start(kernel: Nvfp4MoeKernel) -> None:
    config = ModelConfig.from_file(default_model_dir() / "config.json")
    runner = runner_of(kernel, config.n_routed_experts // 2)
    share = RankShare(experts=tuple(range(config.n_routed_experts // 2)))
    found = {one.name for one in mapped_configs({SLOT: runner}, {SLOT: share}, config)}
    pairs = (count * config.num_experts_per_tok for count in range(1, 8193, 1))
    calls = (kernel.mapped_configs(count, runner.operand, config.n_routed_experts) for count in pairs)
    assert {one.name for configs in calls for one in configs} == found
    assert all("mapped" in name for name in found if name.startswith("moe_align"))


def test_whole_experts_and_kernels_without_forms_have_none() -> None:
    config = ModelConfig.from_file(default_model_dir() / "config.json")
    plain = PlainMoE(torch.ones(2, 4, 8), torch.ones(2, 8, 2), 10.0)
    some = RankShare(experts=(0, 1))
    assert not list(mapped_configs({SLOT: runner_of(nvfp4_moe, 8)}, {SLOT: RankShare()}, config))
    assert not list(mapped_configs({SLOT: plain}, {SLOT: some}, config))
