"""Whole decoder layers of the published shapes on the planned kernels, against references with the same weights."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.kernel_configs import plan_configs

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import full_layer

from ownpath.bench.synthetic import layer_config
from ownpath.config import EngineConfig
from ownpath.inspect.memory import KINDS
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import device_caps
from ownpath.plan.exports import headers
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Caps, Demands

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CONTEXT = 300
LAYERS = (("csa", "full", (1, 7, 64, 512)), ("sliding", "nvidia", (1, 32)), ("hca", "nvidia", (1, 33)))


def kernel_configs() -> Iterator[Config]:
    """Those of each layer's plan."""
    (caps,) = (caps for caps in KINDS if caps.name == "sm_90")
    for layer, export, _ in LAYERS:
        config = layer_config("flash", layer, "hash")
        index = headers(config, export)
        yield from plan_configs(make_plan(config, index, caps, Demands("bfloat16")), index)


@pytest.mark.parametrize(("layer", "export", "tokens"), LAYERS, ids=lambda value: str(value))
@torch.inference_mode()
def test_a_flash_layer_equals_its_reference(
    layer: str, export: str, tokens: tuple[int, ...], cuda: torch.device
) -> None:
    """W4A16 and W8A16: BF16 activations on both sides, so that only roundings and orders of sums differ."""
    config = layer_config("flash", layer, "hash")
    engine = EngineConfig(str(cuda), torch.bfloat16, CONTEXT + max(tokens))
    caps = device_caps(str(cuda))
    ours = full_layer.make_layer(config, engine, export, caps)
    reference = full_layer.make_layer(config, engine, export, Caps("cuda", "references alone"))
    for num_tokens in tokens:
        row = full_layer.compare(ours, reference, engine, CONTEXT, num_tokens)
        assert row["cosine_streams"] >= full_layer.MIN_COSINE, row
        assert row["cosine_experts"] >= full_layer.MIN_COSINE, row
