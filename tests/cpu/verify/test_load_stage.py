"""Stage load in the layouts of Hopper and Blackwell, and what is chosen of a model; test_mutations has its faults."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.hopper_layouts import allow_packing_on_cpu, subject_on

from ownpath.assembly import LoadedPart
from ownpath.finding import Finding, Verdict, failed
from ownpath.loading import default_model_dir
from ownpath.verify.layer import in_layer, load_part
from ownpath.verify.load_stage import load_stage, read_back
from ownpath.verify.subject import Selection, Subject

TINY = default_model_dir()


def quiet(_done: int, _total: int, _name: str) -> None:
    pass


def findings(subject: Subject) -> list[Finding]:
    return list(load_stage(subject, quiet))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_packing_on_cpu(monkeypatch)


@pytest.mark.parametrize("kind", ["CPU", "sm_90", "sm_100"])
@pytest.mark.usefixtures("on_cpu")
def test_the_embedded_model_passes_in_every_kernels_layout(kind: str) -> None:
    found = findings(subject_on(TINY, kind))
    assert not failed(found)
    assert {f.where for f in found if f.id == "L03" and f.verdict is Verdict.PASS} == {f"layers.{i}" for i in range(4)}


@pytest.mark.parametrize(("layout", "width"), [("deepseek-native", 128), ("fp8-experts", 128)])
@pytest.mark.usefixtures("on_cpu")
def test_other_exports_pass_in_hoppers_layouts(layout: str, width: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": width, "head_dim": 128, "q_lora_rank": 136}
    subject = subject_on(random_checkpoint(tmp_path, layout, **sizes).folder, "sm_90")
    assert not failed(findings(subject))


@pytest.mark.usefixtures("on_cpu")
def test_wo_a_in_fp8_stays_as_it_is_stored(tmp_path: Path) -> None:
    """It is packed, not decoded, and each of its bits is read back."""
    sizes = {"head_dim": 128, "o_lora_rank": 128}
    subject = subject_on(random_checkpoint(tmp_path, "deepseek-native", **sizes).folder, "sm_90")
    part = loaded(subject)
    runner = part.runners["layers.1.attn.wo_a"]
    assert runner.spec.name == "cute.grouped_linear_fp8_sm90"
    assert runner.operand.weight.blocks.numel() == 2 * 128 * 2 * 128, "a byte for each weight"
    assert not faults(subject, part)
    runner.operand.weight.blocks.view(-1)[12345] ^= 1
    (found,) = faults(subject, part)
    assert (found.id, found.where, found.number) == ("L02", "layers.1.attn.wo_a", 1)


def loaded(subject: Subject, layer_idx: int = 1) -> LoadedPart:
    return load_part(subject, in_layer(f"layers.{layer_idx}"))


def faults(subject: Subject, part: LoadedPart, layer_idx: int = 1) -> list[Finding]:
    return failed(read_back(subject, part, f"layers.{layer_idx}"))


def experts(part: LoadedPart, layer_idx: int = 1) -> list[torch.Tensor]:
    """The routed experts' buffers as the runner holds them: w13, w13_scale, w13_scale_2, then w2's."""
    stored = part.runners[f"layers.{layer_idx}.ffn.experts"].operand
    return [part for side in (stored.gate_up, stored.down) for part in (side.qdata, side.scale, side.global_scale)]


EXPERT = "layers.1.ffn.experts"


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
@pytest.mark.usefixtures("on_cpu")
def test_a_bit_of_a_packed_weight_is_found(kind: str) -> None:
    subject = subject_on(TINY, kind)
    part = loaded(subject)
    runner = part.runners["layers.1.ffn.experts"]
    w13 = runner.operand.w13.codes if kind == "sm_90" else runner.operand.w13
    expert = w13.view(8, -1)[5]
    expert[1234] ^= 1
    (found,) = faults(subject, part)
    assert (found.id, found.number) == ("L02", 1)
    assert found.where in ("layers.1.ffn.experts.5.w1", "layers.1.ffn.experts.5.w3")
    assert found.kernel == ("cute.nvfp4_moe" if kind == "sm_90" else "triton.nvfp4_moe_w4a4_sm100")


@pytest.mark.usefixtures("on_cpu")
def test_a_global_scale_that_the_kernel_holds_twice_must_be_right_twice() -> None:
    subject = subject_on(TINY, "sm_90")
    part = loaded(subject)
    part.runners["layers.1.ffn.experts"].operand.w2.global_scale[4, 1] *= 2
    (found,) = faults(subject, part)
    assert (found.id, found.where) == ("L03", "layers.1.ffn.experts.4.w2")


@pytest.mark.usefixtures("on_cpu")
def test_a_missing_input_scale_is_found_in_the_factor() -> None:
    subject = subject_on(TINY, "sm_100")
    part = loaded(subject)
    index = subject.index
    runner = part.runners["layers.1.attn.wo_b"]
    runner.operand.alpha.fill_(1.0)
    (found,) = faults(subject, part)
    assert (found.id, found.where) == ("L03", "layers.1.attn.wo_b")
    assert "left out" in found.message
    assert found.message.count(index["layers.1.attn.wo_b.weight_scale_2"].name) == 1


@pytest.mark.usefixtures("on_cpu")
def test_dirty_padding_is_found(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 136}
    subject = subject_on(random_checkpoint(tmp_path, "deepseek-native", **sizes).folder, "sm_90")
    part = loaded(subject)
    packed = part.runners["layers.1.attn.wqa_wkv"].operand.weight
    assert not faults(subject, part)
    blocks = packed.blocks.clone()
    blocks[packed.rows[:, 1] < 64] |= 1  # rows beyond the shard's 136, and real ones: those are L02's
    packed.blocks.copy_(blocks)
    assert {finding.id for finding in faults(subject, part)} == {"L02", "L04"}
    (padded,) = (finding for finding in faults(subject, part) if finding.id == "L04")
    assert padded.where == "layers.1.attn.wqa_wkv"


@pytest.mark.usefixtures("on_cpu")
def test_the_three_forms_of_an_fp8_scale_must_agree(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    subject = subject_on(random_checkpoint(tmp_path, "deepseek-native", **sizes).folder, "sm_90")
    part = loaded(subject)
    part.runners["layers.1.attn.queries"].operand.weight.scales[0, 0, 1] += 1
    (found,) = faults(subject, part)
    assert (found.id, found.where, found.number) == ("L02", "layers.1.attn.wq_b", 1)


def test_only_the_chosen_layers_and_experts_are_read_back() -> None:
    subject = subject_on(TINY, selection=Selection(frozenset({1, 3}), num_experts=2, seed=4))
    found = findings(subject)
    assert {finding.where for finding in found if finding.id == "L02"} == {"layers.1", "layers.3"}
    part = loaded(subject)
    chosen = set(subject.expert_ids(1))
    for expert in range(8):
        experts(part)[0][expert, 0, 0] ^= 1
    assert {finding.where for finding in faults(subject, part)} == {f"{EXPERT}.{expert}.w1" for expert in chosen}
