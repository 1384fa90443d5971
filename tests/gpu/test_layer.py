"""Whole decoder layers of the published shapes on the planned kernels, against references with the same weights."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import full_layer
from layer.synthetic import layer_config

from ownpath.config import EngineConfig
from ownpath.loading import device_caps
from ownpath.plan.select import Caps

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CONTEXT = 300


@pytest.mark.parametrize(
    ("layer", "export", "tokens"),
    [("csa", "full", (1, 7, 64, 512)), ("sliding", "nvidia", (1, 32)), ("hca", "nvidia", (1, 33))],
    ids=lambda value: str(value),
)
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
