"""Every export on the kernels that its plan chooses: each product against the same operand on the CPU reference."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from support.checkpoints import LAYOUTS, random_checkpoint
from support.kernel_configs import model_configs

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import ModelConfig
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, device_caps
from ownpath.official import OFFICIAL, PLAIN, parse_numerics
from ownpath.ops import OpKind
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.weights.load import load_weights

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

NUM_TOKENS = 16
ROUNDINGS = 3
"""The most that lie between a product's input and its output: hidden rows, an expert's output, their sum."""


def export(folder: Path, layout: str) -> None:
    """A checkpoint of random values with the embedded model's shapes."""
    shape = json.loads((default_model_dir() / "config.json").read_text(encoding="utf-8"))
    shape.pop("quantization_config")
    random_checkpoint(folder, layout, **shape)


def kernel_configs() -> Iterator[Config]:
    """Those of every layout with either numerics."""
    for layout in LAYOUTS:
        with TemporaryDirectory() as folder:
            export(Path(folder), layout)
            for official in (PLAIN, OFFICIAL):
                yield from model_configs(Path(folder), official=official)


@pytest.mark.parametrize("numerics", ["plain", "official"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_product_of_an_export_equals_the_cpu_reference(
    layout: str, numerics: str, tmp_path: Path, cuda: torch.device
) -> None:
    """Plain numerics against float32; official ones against the same BF16 activations, which round alike."""
    official = parse_numerics(numerics)
    export(tmp_path, layout)
    config = ModelConfig.from_file(tmp_path / "config.json")
    index = CheckpointIndex.open(tmp_path)
    runners = []
    for name, dtype in ((str(cuda), "bfloat16"), ("cpu", "bfloat16" if official else "float32")):
        plan = make_plan(config, index, device_caps(name), Demands(dtype, official=official))
        runners.append(make_runners(plan, load_weights(plan, index, torch.device(name)).operands))
    ours, reference = runners
    compile_kernels(ours.values())
    for op in plan.ops:
        if op.spec.kind is OpKind.GROUPED:
            continue  # takes the rotation's angles too; tests/gpu/test_small_ops.py has it
        x = torch.randn(NUM_TOKENS, op.spec.shape[1]).to(torch.bfloat16)
        more = _routing(config) if op.spec.kind is OpKind.MOE else ()
        found = ours[op.spec.slot](x.to(cuda), *(part.to(cuda) for part in more)).float().cpu()
        expected = reference[op.spec.slot](x if official else x.float(), *more).float()
        error = ((found - expected).norm() / expected.norm()).item()
        assert error <= ROUNDINGS * 2**-9, (op.spec.slot, error)


def _routing(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts and weights of each token."""
    scores = torch.rand(NUM_TOKENS, config.n_routed_experts)
    ids = scores.argsort(dim=1)[:, : config.num_experts_per_tok].to(torch.int32)
    return ids, torch.rand(NUM_TOKENS, config.num_experts_per_tok) + 0.1
