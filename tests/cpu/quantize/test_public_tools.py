"""Public tools read the output of ``ownpath quantize`` on CPU: their own code decodes it to our values.

compressed-tensors reads the folder itself, shard by shard. ModelOpt, whose layout this is, writes it and reads none on
CPU: its tensor class is given what safetensors reads. transformers has no loader for the layout; it loads what
compressed-tensors decoded.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.quantize.sources import read_tensors, store_mxfp4
from support.broken import change_tensors
from support.checkpoints import Tensors, random_checkpoint

from ownpath.config import EngineConfig
from ownpath.formats import NVFP4
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import decode_e2m1, dequantize, unpack_e2m1
from ownpath.qtensor import QuantTensor
from ownpath.quantize.run import Options, quantize_checkpoint
from ownpath.quantize.steps import QuantizeScope

TARGET = r"re:layers\.\d+\.ffn\.experts\.\d+\.w[123]$"
TOKEN_IDS = torch.randint(0, 96, (160,), generator=torch.Generator().manual_seed(3)).tolist()


def quantized(
    folder: Path, layout: str, experts: str, scope: QuantizeScope = QuantizeScope.EXPERTS, **changes: Any
) -> Path:
    """A random checkpoint's result. experts: how the source stores them, ``as-made`` or ``mxfp4``."""
    random_checkpoint(folder / "source", layout, moe_intermediate_size=64, **changes)

    def to_mxfp4(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".ffn.experts." in key]:
            tensors.update(store_mxfp4(key.removesuffix(".weight"), tensors.pop(key).float()))

    if experts == "mxfp4":
        change_tensors(folder / "source", to_mxfp4)
    quantize_checkpoint(folder / "source", folder / "out", Options(scope, 500_000))
    return folder / "out"


def our_values(folder: Path) -> dict[str, tuple[QuantTensor, torch.Tensor]]:
    """Each NVFP4 weight with its values, by module."""
    tensors = read_tensors(folder)
    modules = [key.removesuffix(".weight_scale_2") for key in tensors if key.endswith(".weight_scale_2")]
    weights = {
        name: QuantTensor(*(tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")), NVFP4)
        for name in modules
    }
    return {name: (weight, dequantize(weight)) for name, weight in weights.items()}


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(max_model_len=256))
    return model.forward(ForwardBatch.of([(TOKEN_IDS, model.new_cache())], "cpu", all_logits=True))


@pytest.mark.parametrize("scope", QuantizeScope)
def test_modelopts_own_class_decodes_every_weight(scope: QuantizeScope, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    found = our_values(quantized(tmp_path, "deepseek-native", "as-made", scope))
    assert len(found) == 5 * 8 * 3 + (5 * (3 + 4) if scope is QuantizeScope.FULL else 0)
    for name, (weight, ours) in found.items():
        scales = {"scale": weight.scale, "double_scale": weight.global_scale, "block_sizes": {-1: 16}}
        theirs = NVFP4QTensor(ours.shape, torch.float32, weight.qdata).dequantize(torch.float32, **scales)
        if ".ffn.experts." in name:
            assert torch.equal(theirs, ours), f"{name}: powers of two, from MXFP4, round nowhere"
        # It multiplies the scales first: one rounding here, two there.
        assert ((theirs - ours).abs() <= ours.abs() * 2**-22).all(), name


def test_modelopts_own_cast_writes_the_same_bytes(tmp_path: Path) -> None:
    """Codes, block scales and global scales of every expert, but for the sign of zero, which it drops."""
    cast = pytest.importorskip(
        "modelopt.torch.export.shard_cast_utils", reason="nvidia-modelopt with a cast of MXFP4 (0.47) is not installed"
    )
    folder = quantized(tmp_path, "deepseek-native", "as-made")
    source, written = read_tensors(tmp_path / "source"), read_tensors(folder)
    modules = [key.removesuffix(".weight_scale_2") for key in written if key.endswith(".weight_scale_2")]
    assert len(modules) == 5 * 8 * 3
    for name in modules:
        sharing = [name] if name.endswith("w2") else [f"{name[:-1]}1", f"{name[:-1]}3"]
        top = max(cast.mxfp4_kmax(source[f"{module}.scale"]) for module in sharing)
        stored = source[f"{name}.weight"], source[f"{name}.scale"]
        codes, scale, global_scale, num_blocks, num_lossless = cast.quantize_mxfp4_to_nvfp4_lossless(
            *stored, top, "cpu"
        )
        assert num_blocks == num_lossless
        assert torch.equal(unpack_e2m1(codes) % 8, unpack_e2m1(written[f"{name}.weight"]) % 8)
        assert torch.equal(decode_e2m1(unpack_e2m1(codes)), decode_e2m1(unpack_e2m1(written[f"{name}.weight"])))
        assert torch.equal(scale.view(torch.uint8), written[f"{name}.weight_scale"].view(torch.uint8))
        assert torch.equal(global_scale, written[f"{name}.weight_scale_2"])


class TestCompressedTensors:
    """Its converter reads ModelOpt's layout, its dequantiser what the converter wrote: from folder to folder."""

    @pytest.fixture(autouse=True)
    def is_installed(self) -> None:
        reason = "compressed-tensors with a converter for ModelOpt's layout (0.20) is not installed"
        pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4", reason=reason)

    def converted(self, folder: Path) -> Path:
        from compressed_tensors.entrypoints.convert import convert_checkpoint
        from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

        target = folder.with_name("compressed-tensors")
        convert_checkpoint(str(folder), str(target), ModelOptNvfp4Converter(targets=[TARGET]), max_workers=1)
        return target

    def decoded(self, folder: Path, dtype: torch.dtype) -> Path:
        """Its dequantiser takes the input_global_scale that its converter wrote for an orphan: left out before it."""
        from compressed_tensors.entrypoints.convert import Converter, convert_checkpoint
        from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

        class WithoutInputScales(Converter):
            def process(self, tensors: Tensors) -> Tensors:
                return {key: tensor for key, tensor in tensors.items() if not key.endswith(".input_global_scale")}

            validate = process

            def get_dependencies(self, weight_name: str) -> set[str]:
                return set()

            def update_config(self, config: Any) -> Any:
                return config

        target = folder.with_name("decoded")
        steps = [WithoutInputScales(), CompressedTensorsDequantizer(str(folder), dtype=dtype)]
        convert_checkpoint(str(folder), str(target), steps, max_workers=1)
        return target

    @pytest.mark.parametrize("experts", ["mxfp4", "as-made"])
    def test_it_decodes_every_weight(self, experts: str, tmp_path: Path) -> None:
        folder = quantized(tmp_path, "bf16", experts)
        theirs, found = read_tensors(self.decoded(self.converted(folder), torch.float32)), our_values(folder)
        assert len(found) == 5 * 8 * 3
        eps = torch.finfo(torch.bfloat16).eps
        for name, (_, ours) in found.items():
            if experts == "mxfp4":
                assert torch.equal(theirs[f"{name}.weight"], ours), name
            # It computes in BF16: block scale over divisor is rounded, and so is its product with the code: half an
            # eps each. The divisor was rounded in float32.
            error = (theirs[f"{name}.weight"] - ours).abs()
            assert (error <= ours.abs() * eps * (1 + eps)).all(), name

    def test_what_it_carries_over_is_untouched(self, tmp_path: Path) -> None:
        """FP8 blocks and BF16 beside the experts. Its reader knows no E8M0 (0.20), so their scales are float32."""
        folder = quantized(tmp_path, "deepseek-native", "as-made", fp8_scale=torch.float32)
        ours, theirs = read_tensors(folder), read_tensors(self.converted(folder))
        others = [key for key in ours if ".ffn.experts." not in key]
        assert any(ours[key].dtype == torch.float8_e4m3fn for key in others)
        for key in others:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)), key

    def test_what_it_makes_of_the_folder_gives_the_same_bits_here(self, tmp_path: Path) -> None:
        folder = quantized(tmp_path, "deepseek-native", "as-made", fp8_scale=torch.float32)
        theirs = self.converted(folder)
        encodings = {op.label: op.encoding.name for op in plan_model(theirs, "cpu").ops}
        assert encodings["layers.0.ffn.experts"] == "compressed-tensors-nvfp4"
        assert json.loads((theirs / "config.json").read_text())["quantization_config"]["quant_method"] == (
            "compressed-tensors"
        )
        assert plan_model(theirs, "cpu").contradictions == ()
        assert torch.equal(logits(theirs), logits(folder))

    def test_transformers_loads_what_it_decoded_and_agrees(self, tmp_path: Path) -> None:
        """The whole way on public code, from our files to log-probabilities, within the forward's own tolerance."""
        pytest.importorskip("transformers.models.deepseek_v4", reason="transformers with DeepSeek-V4 is not installed")
        from transformers import DeepseekV4ForCausalLM

        folder = quantized(tmp_path, "bf16", "mxfp4")
        decoded = self.decoded(self.converted(folder), torch.bfloat16)
        model, found = DeepseekV4ForCausalLM.from_pretrained(
            decoded, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(found.values()), found
        with torch.inference_mode():
            theirs = model(torch.tensor([TOKEN_IDS]), use_cache=False).logits[0].log_softmax(-1)
        assert (logits(folder).log_softmax(-1) - theirs).abs().max() <= 2e-4
