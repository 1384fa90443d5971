"""V4's attention in the installed vLLM, imported as vLLM does before breakable graphs are on, breaks after all."""

import subprocess
import sys

import pytest
from conftest import environment

pytest.importorskip("vllm")

ASKED = """
import os, sys
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("fp8")
file = sys.modules["vllm.models.deepseek_v4.attention"]  # what the plugin cannot keep from being imported
from ownpath.integrations.vllm.breaks import marked_methods, take_breaks
import inspect
marked = list(marked_methods(inspect.getsource(file)))
def breaks():
    return [hasattr(vars(getattr(file, owner))[name], "__wrapped__") for owner, name in marked]
assert marked and not any(breaks()), (marked, breaks())
assert take_breaks() == "" and not any(breaks())
os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
said = take_breaks()
assert all(breaks()) and all(f"{owner}.{name}" in said for owner, name in marked), said
assert take_breaks() == ""
print("mended", len(marked))
"""


def test_the_installed_attention_is_mended() -> None:
    given = {key: value for key, value in environment().items() if key != "VLLM_USE_BREAKABLE_CUDAGRAPH"}
    found = subprocess.run([sys.executable, "-c", ASKED], env=given, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "mended" in found.stdout
