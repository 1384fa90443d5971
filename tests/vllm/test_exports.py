"""The embedded model as other exporters store it, inside vLLM: greedy ids are our own engine's of the same folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answers, ask_each, greedy, prompts, reference
from support.tiny_exports import (
    Tensors,
    compressed_nvfp4,
    modules_with,
    tiny_tensors,
    write_tiny,
)

from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.numerics import dequantize, quantize_fp8_block, quantize_mxfp4
from ownpath.qtensor import QuantTensor

pytestmark = pytest.mark.vllm
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
       "weight_block_size": [128, 128]}  # fmt: skip
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}, "ignore": []}


def decoded(tensors: Tensors, module: str) -> torch.Tensor:
    """An NVFP4 module of the embedded model in float32."""
    parts = (tensors[f"{module}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    return dequantize(QuantTensor(*parts, NVFP4), torch.float32)


def restored(tensors: Tensors, modules: list[str], store: Callable[[torch.Tensor], QuantTensor]) -> None:
    """Stores NVFP4 or BF16 modules anew, as codes and one grid of scales."""
    for module in modules:
        is_nvfp4 = f"{module}.weight_scale_2" in tensors
        weight = decoded(tensors, module) if is_nvfp4 else tensors[f"{module}.weight"].float()
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            tensors.pop(f"{module}.{part}", None)
        stored = store(weight)
        assert stored.scale is not None
        tensors[f"{module}.weight"], tensors[f"{module}.scale"] = stored.qdata, stored.scale


def fp8(weight: torch.Tensor) -> QuantTensor:
    return quantize_fp8_block(weight, torch.float8_e8m0fnu)


def experts_only(tensors: Tensors) -> Tensors:
    """NVIDIA's: routed experts NVFP4, attention, shared experts and ``wo_a`` FP8 in blocks."""
    dense = [name for name in modules_with(tensors, "weight_scale_2") if ".ffn.experts." not in name]
    restored(tensors, [*dense, *(f"layers.{at}.attn.wo_a" for at in range(4))], fp8)
    return tensors


def unquantise(tensors: Tensors, modules: list[str]) -> None:
    """Stores NVFP4 modules in BF16."""
    for module in modules:
        tensors[f"{module}.weight"] = decoded(tensors, module).bfloat16()
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            tensors.pop(f"{module}.{part}", None)


def bf16_experts(tensors: Tensors) -> Tensors:
    """Attention and shared experts NVFP4, routed experts BF16."""
    unquantise(tensors, modules_with(tensors, "weight_scale_2", ".ffn.experts."))
    return tensors


def bf16_linears(tensors: Tensors) -> Tensors:
    """Routed experts NVFP4, everything else BF16."""
    unquantise(tensors, [name for name in modules_with(tensors, "weight_scale_2") if ".ffn.experts." not in name])
    for at in (1, 3):  # FP8 in blocks
        key = f"layers.{at}.attn.indexer.wq_b"
        stored = QuantTensor(tensors[f"{key}.weight"], tensors.pop(f"{key}.scale"), None, FP8_BLOCK)
        tensors[f"{key}.weight"] = dequantize(stored, torch.bfloat16)
    return tensors


def native(tensors: Tensors) -> Tensors:
    """DeepSeek's: routed experts MXFP4, the rest as ``experts_only``."""
    experts = modules_with(tensors, "weight_scale_2", ".ffn.experts.")
    restored(experts_only(tensors), experts, quantize_mxfp4)
    return tensors


def fp8_experts(tensors: Tensors) -> Tensors:
    """DeepSeek's base model: routed experts FP8 in blocks too."""
    experts = modules_with(tensors, "weight_scale_2", ".ffn.experts.")
    restored(experts_only(tensors), experts, fp8)
    return tensors


def unlike_halves(tensors: Tensors) -> Tensors:
    """Full NVFP4 whose fused halves have global scales far apart: codes and block scales stay, wkv's scale is 1/4."""
    for at in range(4):
        for half in (f"layers.{at}.attn.wkv", f"layers.{at}.ffn.shared_experts.w3"):
            tensors[f"{half}.weight_scale_2"] = tensors[f"{half}.weight_scale_2"] / 4
    return tensors


EXPORTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "experts-only": (experts_only, FP8 | {"moe_quant_algo": "NVFP4"}, "fp4"),
    "full-unlike-halves": (unlike_halves, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
    "compressed-tensors": (compressed_nvfp4, COMPRESSED, "fp4"),
    "deepseek-native": (native, FP8, "fp4"),
    "fp8-experts": (fp8_experts, FP8, "fp8"),
    "bf16-experts": (bf16_experts, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
    "bf16-linears": (bf16_linears, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("exports"), {}
    for name, (change, quantization, experts) in EXPORTS.items():
        config: dict[str, Any] = {"quantization_config": quantization, "expert_dtype": experts}
        found[name] = write_tiny(root / name, change(tiny_tensors()), config=config)
    return found


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> dict[str, Answers]:
    """All of them in one process: an engine of ours ends as any other, and the next one's weights are its own."""
    out = next(iter(folders.values())).parent / "out.json"
    found = ask_each(list(folders.values()), out, {"prompts": prompts()})
    return dict(zip(folders, found, strict=True))


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_answers_as_our_engine(name: str, folders: dict[str, Path], answers: dict[str, Answers]) -> None:
    model = reference(folders[name])
    found = answers[name]
    assert found.ids == [greedy(model, ids, 4) for ids in prompts()]
    assert len(found.ranks[0]["kernels"]) == 30
    assert all(kernel.startswith("ref.") for kernel in found.ranks[0]["kernels"].values())


@pytest.mark.parametrize(("name", "parts"), [("bf16-linears", "experts"), ("bf16-experts", "linears,wo_a")])
def test_parts_are_left_to_vllm(name: str, parts: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Of what its CPU model can run itself, vLLM keeps the weights; of what we take, it has none."""
    options = {"prompts": prompts(), "engine": {"load_format": "ownpath"}}  # some layer is to be ours
    (found,) = ask_each([folders[name]], tmp_path / "out.json", options, OWNPATH_VLLM=parts)
    model = reference(folders[name])
    assert found.ids == [greedy(model, ids, 4) for ids in prompts()]
    taken = {slot.partition(".")[2].partition(".")[2] for slot in found.ranks[0]["kernels"]}
    assert ("ffn.experts" in taken) == (parts == "experts")
    assert ("attn.wo_a" in taken) == ("wo_a" in parts)
    assert "OWNPATH_VLLM leaves it" in found.log
