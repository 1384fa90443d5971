"""Weights that were cast from MXFP4 without loss are recognised by their scales, in memory and on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import SMALL, random_checkpoint

from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.loading import load_model, lossless_casts, plan_model
from ownpath.weights.lossless import is_lossless_cast

POWERS = [2.0**e for e in range(-9, 9)]
"""Every power of two that E4M3 holds: its smallest subnormal is 2^-9, its largest power 2^8."""


def cast_scales(generator: torch.Generator, rows: int, blocks: int) -> torch.Tensor:
    """Scales as the cast writes them: a power of two for 32 values, twice."""
    picked = torch.randint(len(POWERS), (rows, blocks // 2), generator=generator)
    return torch.tensor(POWERS)[picked].repeat_interleave(2, dim=1).to(torch.float8_e4m3fn)


@pytest.fixture
def scale() -> torch.Tensor:
    return cast_scales(torch.Generator().manual_seed(0), 256, 8)


def changed(scale: torch.Tensor, row: int, block: slice, value: float) -> torch.Tensor:
    copy = scale.float()
    copy[row, block] = value
    return copy.to(torch.float8_e4m3fn)


def test_every_power_of_two_is_recognised(scale: torch.Tensor) -> None:
    assert {value.item() for value in scale.float().unique()} == set(POWERS)
    assert is_lossless_cast(scale, torch.tensor(2.0**-11))
    assert is_lossless_cast(scale.view(4, 64, 8), torch.tensor([[0.25, 2.0]]))


@pytest.mark.parametrize("row", [0, 255])
@pytest.mark.parametrize("value", [0.0, 3 * 2.0**-9, 5 * 2.0**-9, 1.5, 1.875, 448.0], ids=str)
def test_a_scale_that_is_no_power_of_two_is_not(scale: torch.Tensor, row: int, value: float) -> None:
    assert not is_lossless_cast(changed(scale, row, slice(2, 4), value), torch.tensor(1.0))


def test_neighbours_must_agree_in_their_own_pair(scale: torch.Tensor) -> None:
    ones = torch.ones(64, 8)
    assert is_lossless_cast(ones.to(torch.float8_e4m3fn), torch.tensor(1.0))
    assert not is_lossless_cast(changed(ones, 63, slice(1, 3), 2.0), torch.tensor(1.0))
    assert not is_lossless_cast(scale[:, :7], torch.tensor(1.0)), "an odd number of blocks has no pairs"


@pytest.mark.parametrize("global_scale", [0.3, 3.0, 2.0**-7 * (1 + 2.0**-23)])
def test_a_global_scale_that_is_no_power_of_two_is_not(scale: torch.Tensor, global_scale: float) -> None:
    assert not is_lossless_cast(scale, torch.tensor([1.0, global_scale]))


def rewrite_experts(folder: Path, layer_idx: int) -> None:
    """Makes one layer's routed experts look cast; their codes stay what they are."""
    generator = torch.Generator().manual_seed(1)
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.startswith(f"layers.{layer_idx}.ffn.experts.")]:
            if name.endswith(".weight_scale"):
                rows, blocks = tensors[name].shape
                tensors[name] = cast_scales(generator, rows, blocks)
            elif name.endswith(".weight_scale_2"):
                tensors[name] = torch.tensor(2.0**-12)
        save_file(tensors, shard)


def test_a_checkpoint_tells_which_modules_were_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64}
    random_checkpoint(tmp_path, **SMALL | sizes)
    plan = plan_model(tmp_path, "cpu")
    assert lossless_casts(plan, tmp_path) == ()
    rewrite_experts(tmp_path, 2)
    assert lossless_casts(plan, tmp_path) == ("layers.2.ffn.experts",)
    assert load_model(tmp_path, EngineConfig(max_model_len=16)).lossless_casts == ("layers.2.ffn.experts",)
    assert main(["plan", str(tmp_path), "--scales"]) == 0
    assert capsys.readouterr().out.endswith("cast from MXFP4 without loss: layers.2.ffn.experts\n")
