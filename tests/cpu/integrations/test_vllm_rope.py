"""Sliding layers' rotation in vLLM 0.26: plain frequencies, by settings that no other layer sees."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ownpath.attention.rope import rotary_frequencies
from ownpath.config import Yarn
from ownpath.integrations.vllm import rope
from ownpath.integrations.vllm.rope import BUILD, SlidingRope, mend_rope, plain_parameters, take_rope
from ownpath.integrations.vllm.versions import VllmRefusal

YARN = {"rope_type": "deepseek_yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32}
SIZES = {"head_dim": 512, "rope_head_dim": 64, "max_position_embeddings": 2**20}
FILE = "vllm.models.deepseek_v4.attention"


def build(config: Any, **given: int) -> tuple[dict[str, Any], float, dict[str, int]]:
    """As vLLM's, which writes the layer's base into the settings that it is given."""
    parameters = config.rope_parameters
    parameters["rope_theta"] = config.compress_rope_theta if given["compress_ratio"] > 1 else config.rope_theta
    return dict(parameters), parameters["rope_theta"], given


build.__module__ = "vllm.models.deepseek_v4.common.rope"


def config_of(**parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(rope_parameters=YARN | parameters, rope_theta=1e4, compress_rope_theta=1.6e5)


@pytest.mark.parametrize("compress_ratio", [0, 1])
def test_a_sliding_layer_has_settings_of_its_own(compress_ratio: int) -> None:
    config = config_of()
    parameters, theta, given = SlidingRope(build)(config, compress_ratio=compress_ratio, **SIZES)
    assert (parameters["factor"], parameters["original_max_position_embeddings"], theta) == (1, 16 * 65536, 1e4)
    assert parameters["beta_fast"] == YARN["beta_fast"]
    assert given == {"compress_ratio": compress_ratio, **SIZES}
    assert config.rope_parameters == YARN


@pytest.mark.parametrize("compress_ratio", [4, 128])
def test_a_compressing_layer_keeps_vllms(compress_ratio: int) -> None:
    parameters, theta, _ = SlidingRope(build)(config_of(), compress_ratio=compress_ratio, **SIZES)
    assert parameters == YARN | {"rope_theta": theta}
    assert theta == 1.6e5


def test_a_model_without_yarn_keeps_vllms() -> None:
    config = config_of(rope_type="default")
    assert SlidingRope(build)(config, compress_ratio=0, **SIZES)[0]["factor"] == YARN["factor"]


def test_a_factor_of_one_is_plain_rotation() -> None:
    """By YaRN's definition, within float32's rounding of a weighted mean of two equal numbers."""
    parameters = plain_parameters(YARN)
    yarn = Yarn(parameters["factor"], 32, 1, parameters["original_max_position_embeddings"])
    found, plain = rotary_frequencies(64, 1e4, yarn), rotary_frequencies(64, 1e4, None)
    assert torch.allclose(found, plain, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_the_patch_is_made_once() -> None:
    file = ModuleType(FILE)
    vars(file)[BUILD] = build
    said = {mend_rope(file) for _ in range(2)}
    assert said == {"sliding layers rotate by plain frequencies, and not by YaRN's as in vLLM 0.26"}
    assert vars(file)[BUILD] == SlidingRope(build)


@pytest.mark.parametrize("foreign", [len, None])
def test_what_somebody_else_replaced_stays_and_is_named(foreign: object) -> None:
    file = ModuleType(FILE)
    vars(file)[BUILD] = foreign
    with pytest.raises(VllmRefusal, match=r"attention\.build_deepseek_v4_rope is not vLLM's own.*leave rope out"):
        mend_rope(file)
    assert vars(file)[BUILD] is foreign


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1"])
def test_later_versions_need_nothing(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "installed_version", lambda: version)
    assert take_rope() == ""
