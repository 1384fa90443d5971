"""The plan: decided from headers alone, per tensor, with a reason; a refusal names what is lacking."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import LAYOUTS, SMALL, random_checkpoint
from support.pages import plan_text

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.positioned import PositionedReader
from ownpath.checkpoint.schema import ENCODINGS, MODELOPT_NVFP4, NATIVE_FP8, PLAIN_BF16
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.cli import main
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import BF16, FP8_BLOCK, NVFP4
from ownpath.kernels.registry import KERNELS, SPECS
from ownpath.kernels.spec import KernelSpec
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import quantize_fp8_block, quantize_nvfp4
from ownpath.ops import OpKind
from ownpath.plan.errors import PlanError
from ownpath.plan.opspec import model_ops
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Caps, Choice, Refusal, select
from ownpath.plan.show import plan_rows

CPU = Caps("cpu", "CPU")


def test_every_module_has_its_format_runner_and_kernel(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    plan = plan_model(tmp_path, "cpu")
    decided = {op.spec.slot: (op.encoding.format, op.choice.kernel.runner) for op in plan.ops}
    assert decided["layers.0.attn.wqa_wkv"] == (NVFP4, "Nvfp4Linear")
    assert decided["layers.1.attn.indexer.wq_b"] == (FP8_BLOCK, "Fp8Linear")
    assert decided["layers.4.attn.wo_a"] == (BF16, "GroupedLinear")
    assert decided["layers.2.attn.compressor.wkv_wgate"] == (BF16, "PlainLinear")
    assert decided["layers.1.attn.x_products"] == (BF16, "PlainLinear")
    assert decided["layers.3.ffn.experts"] == (NVFP4, "Nvfp4MoE")
    assert decided["head"] == (BF16, "PlainLinear")
    planned = [part for op in plan.ops for part in op.spec.parts or (op.spec,)]
    assert sorted(planned, key=lambda op: op.slot) == sorted(model_ops(plan.config), key=lambda op: op.slot)
    assert all(op.choice.why for op in plan.ops)


def test_the_plan_moves_no_weight_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every shard, the header's length and the header are read, and nothing else."""
    random_checkpoint(tmp_path, "full-nvfp4")
    shards = sorted(tmp_path.glob("*.safetensors"))
    expected = {path: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards}
    num_read: Counter[Path] = Counter()
    real = os.pread

    def counted(descriptor: int, num_bytes: int, position: int) -> bytes:
        data = real(descriptor, num_bytes, position)
        num_read[Path(f"/proc/self/fd/{descriptor}").readlink()] += len(data)
        return data

    def no_other_way(*_: object, **__: object) -> None:
        raise AssertionError("a shard was opened for its tensors")

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(PositionedReader, "fill", no_other_way)
    assert plan_model(tmp_path, "cpu").ops
    assert num_read == expected


def test_the_format_is_read_off_the_tensor_not_the_config(tmp_path: Path) -> None:
    """A config that calls everything FP8 changes nothing: exports write different things there."""
    checkpoint = random_checkpoint(tmp_path, "full-nvfp4")
    claimed = {"quantization_config": {"quant_method": "fp8", "moe_quant_algo": None, "ignore": ["*"]}}
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.fields | claimed))
    formats = {op.encoding.format for op in plan_model(tmp_path, "cpu").ops}
    assert formats == {NVFP4, FP8_BLOCK, BF16}


def test_a_fused_slot_stored_in_two_formats_becomes_two_ops(tmp_path: Path) -> None:
    """wq_a NVFP4 beside wkv BF16: two kernels, one slot, the right sum of rows."""
    checkpoint = random_checkpoint(tmp_path, "full-nvfp4")
    name = "layers.0.attn.wkv"
    plain = checkpoint.decoded[name].to(torch.bfloat16)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    for key in MODELOPT_NVFP4.keys(name):
        shard = tmp_path / index["weight_map"].pop(key)
        save_file({k: v for k, v in load_file(shard).items() if k != key}, shard)
    save_file({f"{name}.weight": plain}, tmp_path / "extra.safetensors")
    index["weight_map"][f"{name}.weight"] = "extra.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    plan = plan_model(tmp_path, "cpu")
    shards = plan.ops_of("layers.0.attn.wqa_wkv")
    assert [op.choice.kernel.runner for op in shards] == ["Nvfp4Linear", "PlainLinear"]
    assert [op.label for op in shards] == ["layers.0.attn.wq_a", name]
    model = load_model(tmp_path, EngineConfig(max_model_len=64))
    logits = model.forward(ForwardBatch.of([([1, 2, 3], model.new_cache())], "cpu"))
    assert torch.isfinite(logits).all()
    runs = {slot: runner for slot, (runner, _) in model.ledger.kernels.items()}
    assert runs["layers.0.attn.wqa_wkv"] == "Nvfp4Linear+PlainLinear"


def test_experts_of_one_layer_must_agree(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, "full-nvfp4")
    index = CheckpointIndex.open(tmp_path)
    infos = dict(index.tensors)
    module = "layers.1.ffn.experts.2.w3"
    for key in MODELOPT_NVFP4.keys(module):
        del infos[key]
    shape = tuple(checkpoint.decoded[module].shape)
    infos[f"{module}.weight"] = type(index["norm.weight"])(f"{module}.weight", "BF16", shape, tmp_path)
    with pytest.raises(ValueError, match=f"'{module}' is bf16; experts of one layer must agree"):
        make_plan(checkpoint.config, CheckpointIndex(tmp_path, infos), CPU)  # type: ignore[arg-type]


def test_a_refusal_says_what_each_candidate_lacks() -> None:
    refusal = select(OpKind.GROUPED, NVFP4, CPU)
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("no grouped_linear kernel for NVFP4: ")
    lacks = refusal.reason.split(": ")[1].split("; ")
    grouped = [kernel for kernel in SPECS if kernel.kind is OpKind.GROUPED]
    assert lacks == [f"{kernel.name} takes {'/'.join(map(str, kernel.formats))}" for kernel in grouped]
    hopper_only = KernelSpec(
        "x.fast", OpKind.LINEAR, (NVFP4,), "Nvfp4Linear", "row_major", "fast", "toy.ref:run", min_sm=90
    )
    on_cpu = select(OpKind.LINEAR, NVFP4, CPU, (hopper_only,))
    assert isinstance(on_cpu, Refusal)
    assert "x.fast needs sm_90, this is CPU" in on_cpu.reason
    on_hopper = select(OpKind.LINEAR, NVFP4, Caps("cuda", "H200", 90), (hopper_only, *SPECS))
    assert on_hopper == Choice(hopper_only, "fast")


def test_a_module_no_kernel_runs_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(tmp_path, "full-nvfp4")
    monkeypatch.setattr("ownpath.plan.planner.select", lambda kind, stored, *_: Refusal(f"no kernel for {stored}"))
    with pytest.raises(PlanError, match=r"layers.0.attn.wqa_wkv: no kernel for NVFP4"):
        make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), CPU)


def test_every_catalogued_kernel_is_registered() -> None:
    assert {kernel.name for kernel in SPECS} == set(KERNELS)
    for name in KERNELS:
        if name.startswith(("ref.", "torch.")):
            assert KERNELS[name].configs(None) == (), "nothing is compiled to disk"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_runs_is_what_was_planned(layout: str, tmp_path: Path, device: torch.device) -> None:
    """After a prompt and a token the ledger holds every slot of the plan, under its runner and kernel, and no
    other."""
    random_checkpoint(tmp_path, layout)
    plan = plan_model(tmp_path, str(device))
    model = load_model(tmp_path, EngineConfig.for_device(str(device), max_model_len=64))
    cache = model.new_cache()
    for token_ids in ([5, 6, 7, 8, 9], [10]):
        model.forward(ForwardBatch.of([(token_ids, cache)], device))
    planned = {op.spec.slot: (op.choice.kernel.runner, op.choice.kernel.name) for op in plan.decided}
    assert {slot: model.ledger.kernels[slot] for slot in model.ledger.calls} == planned
    assert sum(modules for _, _, modules, _ in model.ledger.summary()) == len(planned)


def test_text_folds_equal_layers_and_keeps_every_module(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "modelopt-experts-only")
    plan = plan_model(tmp_path, "cpu")
    rows = plan_rows(plan)
    assert sum(max(1, len(row.layers)) for row in rows) == len(plan.ops)
    text = plan_text(plan)
    assert "layers.{0-4}.ffn.experts " in text
    assert "layers.{1,3}.attn.queries " in text
    assert "ref.nvfp4_moe on NVFP4: W4A16 per expert" in text


def test_the_command_prints_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_checkpoint(tmp_path / "model", "full-nvfp4")
    assert main(["plan", str(tmp_path / "model"), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["ops"]
    modules = {module for entry in entries for module in entry["modules"]}
    assert modules == {module.name for op in model_ops(ModelConfig.from_dict(SMALL)) for module in op.modules}
    assert main(["plan", str(tmp_path / "absent")]) == 2
    assert f"'{tmp_path / 'absent'}': no such model folder" in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "model"), "--device", "tpu"]) == 2
    assert "device 'tpu'" in capsys.readouterr().err


def test_encodings_are_told_apart_and_round_trip(tmp_path: Path) -> None:
    """Detection reads back what an encoding writes: names, dtypes and shapes, in both directions."""
    from dataclasses import replace

    from ownpath.checkpoint.detect import detect
    from ownpath.checkpoint.schema import ModuleSpec
    from ownpath.checkpoint.writer import write_checkpoint
    from ownpath.qtensor import QuantTensor

    weight = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    stored = {
        MODELOPT_NVFP4: quantize_nvfp4(weight),
        NATIVE_FP8: quantize_fp8_block(weight),
        PLAIN_BF16: QuantTensor(weight.bfloat16(), None, None, BF16),
    }
    for encoding, quantized in stored.items():
        folder = tmp_path / encoding.name
        write_checkpoint(folder, encoding.encode("m", quantized, torch.tensor(0.01)), 2**20)
        index = CheckpointIndex.open(folder)
        assert set(index.tensors) == set(encoding.keys("m"))
        assert detect(index, ModuleSpec("m", (130, 256))) == encoding
    assert set(stored) < set(ENCODINGS)
    with pytest.raises(ValueError, match="a BF16 weight cannot be stored as modelopt-nvfp4"):
        list(MODELOPT_NVFP4.encode("m", stored[PLAIN_BF16]))
    weight_only = dict(MODELOPT_NVFP4.encode("m", stored[MODELOPT_NVFP4]))
    assert set(weight_only) == set(MODELOPT_NVFP4.without_input_scale.keys("m"))
    no_scale = replace(stored[NATIVE_FP8], scale=None)
    with pytest.raises(ValueError, match=r"m\.scale: native-fp8-block needs it"):
        list(NATIVE_FP8.encode("m", no_scale))
