"""Needless tensors are told and not fatal; every other tensor that nothing reads still is."""

import json
from pathlib import Path

import pytest
import torch
from support.pages import inspection_text, plan_text
from support.tiny_exports import logits_of, tiny_tensors, write_tiny

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.needless import NEEDLESS, needless_reason
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.finding import failed
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import default_model_dir, load_model, plan_model

NAMES = {
    "KV cache": (
        "layers.0.attn.k_scale",
        "layers.1.attn.v_scale",
        "layers.0.attn.kv_scale",
        "layers.0.attn.q_scale",
        "layers.0.attn.prob_scale",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.v_proj.v_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
        "layers.2.attn.kv_cache_scale",
        "layers.2.attn.kv_cache_scaling_factor",
        "layers.2.attn.kv_cache_rcp_scaling_factor",
        "layers.0.attn.wkv.kv_scale",
        "layers.1.attn.indexer.k_scale",
        "layers.0.attn.k_zero_point",
        "layers.0.attn.k_bmm_quantizer._amax",
    ),
    "bookkeeping": ("layers.0.attn.wq_b._extra_state", "layers.3.ffn.experts.1.w2._extra_state"),
    "rotary": (
        "rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.compress_inv_freq",
        "freqs_cis",
        "layers.0.attn.freqs_cis",
        "layers.0.attn.rotary_emb.cos_cached",
        "layers.0.attn.rotary_emb.sin_cached",
        "model.rotary_emb.cos_sin_cache",
    ),
    "scale of an input": ("layers.1.attn.wo_a.input_scale", "head.input_global_scale"),
    "a cache": ("layers.1.attn.compressor.kv_state", "layers.1.attn.compressor.score_state", "layers.1.attn.kv_cache"),
}

FATAL = (
    "layers.1.attn.wq_c.weight",
    "layers.1.attn.k_scales",
    "layers.1.attn.wkv.lora_A",
    "layers.1.attn.wq_b.bias",
    "layers.1.ffn.experts.3.w2.weight_zero_point",
    "layers.4.attn_norm.weight",
    "k_scale_up.weight",
    "layers.0.attn.my_freqs",
)


def test_needless_tensors_are_told_and_change_no_bit(tmp_path: Path) -> None:
    extra = {name: torch.tensor(0.02) for names in NAMES.values() for name in names}
    folder = write_tiny(tmp_path, tiny_tensors() | extra)
    assert torch.equal(logits_of(folder), logits_of(default_model_dir()))
    inspection = inspect_folder(folder)
    assert not failed(inspection.problems)
    told = (inspection_text(inspection), plan_text(plan_model(folder, "cpu")))
    for words, names in NAMES.items():
        for text in told:
            lines = [line for line in text.splitlines() if line.startswith("not read") and words in line]
            num_keys = int(lines[0].split()[2])
            assert num_keys >= len(names)


@pytest.mark.parametrize("name", FATAL)
def test_a_tensor_on_no_list_is_fatal(name: str, tmp_path: Path) -> None:
    assert needless_reason(name) is None
    folder = write_tiny(tmp_path, tiny_tensors() | {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"'{name}'.*nothing in this model reads it"):
        plan_model(folder, "cpu")
    (problem,) = failed(inspect_folder(folder).problems) if name != "layers.4.attn_norm.weight" else [
        problem for problem in failed(inspect_folder(folder).problems) if problem.where == name
    ]  # fmt: skip
    assert (problem.id, problem.where) == ("unexpected-tensor", name)
    assert "config.json" not in problem.remedy


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--list"])
    printed = "".join(capsys.readouterr().out.split())  # lines are wrapped
    for kind in NEEDLESS:
        assert needless_reason(kind.example) == kind.reason
        assert "".join(f"{kind.example}{kind.reason}".split()) in printed


def test_every_planned_tensor_is_off_the_list() -> None:
    """The list must never swallow a tensor that something reads, but for scales of inputs."""
    plan = plan_model(default_model_dir(), "cpu")
    keys = {param.key for param in plan.params}
    keys |= {key for op in plan.ops for module in op.spec.modules for key in op.encoding.keys(module.name)}
    assert [key for key in keys if needless_reason(key)] == []


# --- a drafter that is not there --------------------------------------------------------------------------------------

GONE = {f"mtp.0.{name}": "model-mtp.safetensors" for name in ("e_proj.weight", "h_proj.weight", "norm.weight")}


@pytest.mark.parametrize("shard", ["model-mtp.safetensors", "model.safetensors"])
def test_a_deleted_draft_is_no_fault_until_it_is_asked_for(shard: str, tmp_path: Path) -> None:
    """Its shard was deleted; or it was taken out of a shard, and the index still lists it."""
    folder = write_tiny(tmp_path, tiny_tensors(), listed=dict.fromkeys(GONE, shard))
    index = CheckpointIndex.open(folder)
    assert set(index.absent) == set(GONE)
    assert not failed(inspect_folder(folder).problems)
    assert f"not there: 3 tensors that the index lists in '{shard}'" in plan_text(plan_model(folder, "cpu"))
    assert f"not there: 3 tensors that the index lists in '{shard}'" in inspection_text(inspect_folder(folder))
    assert torch.equal(logits_of(folder), logits_of(default_model_dir()))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
    with pytest.raises(CheckpointError, match=rf"a draft was asked for, but shard '{shard}'.*'mtp\.0\.e_proj\.weight'"):
        load_model(folder, EngineConfig(max_model_len=64, loads_draft=True))
    assert [p.id for p in failed(inspect_folder(folder, with_draft=True).problems)] == ["draft"]


def test_a_shard_with_anything_else_is_still_missed(tmp_path: Path) -> None:
    listed = GONE | {"layers.0.attn.wq_z.weight": "model-mtp.safetensors"}
    folder = write_tiny(tmp_path, tiny_tensors(), listed=listed)
    with pytest.raises(CheckpointError, match=r"shard 'model-mtp.safetensors' does not exist"):
        CheckpointIndex.open(folder)
    assert ("missing-shard", "model-mtp.safetensors") in {(p.id, p.where) for p in inspect_folder(folder).problems}


def test_generate_runs_beside_a_deleted_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path, tiny_tensors(), listed=GONE)
    assert main(["generate", str(folder), "The capital of France is", "--max-tokens", "2"]) == 0
    assert "Paris" in capsys.readouterr().out
