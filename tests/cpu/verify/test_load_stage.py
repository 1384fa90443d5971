"""Stage load: silent on intact checkpoints in every layout, and each fault of a loaded layer under its id and name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.broken import change_tensors
from support.checkpoints import LAYOUTS, random_checkpoint
from support.hopper_layouts import allow_packing_on_cpu, subject_on

from ownpath.assembly import LoadedPart
from ownpath.finding import Finding, Verdict, failed
from ownpath.loading import default_model_dir
from ownpath.verify.layer import in_layer, load_part, restricted
from ownpath.verify.load_stage import load_stage, read_back, unwritten_slots
from ownpath.verify.subject import Selection, Subject
from ownpath.weights.load import load_weights
from ownpath.weights.operands import sentinel

TINY = default_model_dir()


def quiet(_done: int, _total: int, _name: str) -> None:
    pass


def findings(subject: Subject) -> list[Finding]:
    return list(load_stage(subject, quiet))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_packing_on_cpu(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_intact_checkpoints_pass_in_every_layout(layout: str, seed: int, tmp_path: Path) -> None:
    subject = subject_on(random_checkpoint(tmp_path, layout, seed).folder)
    found = findings(subject)
    assert not failed(found)
    passed = {finding.where for finding in found if finding.id == "L02" and finding.verdict is Verdict.PASS}
    assert passed == {"ends", *(f"layers.{idx}" for idx in range(subject.config.num_hidden_layers))}


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


def loaded(subject: Subject, layer_idx: int = 1) -> LoadedPart:
    return load_part(subject, in_layer(f"layers.{layer_idx}"))


def faults(subject: Subject, part: LoadedPart, layer_idx: int = 1) -> list[Finding]:
    return failed(read_back(subject, part, f"layers.{layer_idx}"))


def experts(part: LoadedPart, layer_idx: int = 1) -> list[torch.Tensor]:
    """The routed experts' buffers as the runner holds them: w13, w13_scale, w13_scale_2, then w2's."""
    stored = part.runners[f"layers.{layer_idx}.ffn.experts"].operand
    return [part for side in (stored.gate_up, stored.down) for part in (side.qdata, side.scale, side.global_scale)]


def swap_gate_and_up(part: LoadedPart) -> None:
    codes, scale = experts(part)[:2]
    for buffer in (codes[5], scale[5].view(torch.uint8)):
        buffer.copy_(torch.cat(buffer.chunk(2)[::-1]).clone())


def square_a_global_scale(part: LoadedPart) -> None:
    experts(part)[2][3, 0] **= 2


def invert_a_global_scale(part: LoadedPart) -> None:
    experts(part)[5][7] = 1 / experts(part)[5][7]


def shift_block_scales(part: LoadedPart) -> None:
    scale = experts(part)[4][2].view(torch.uint8)
    scale.copy_(scale.roll(1, dims=1).clone())


def zero_an_expert(part: LoadedPart) -> None:
    experts(part)[3][6].zero_()


def shift_experts(part: LoadedPart) -> None:
    codes = experts(part)[3]
    codes.copy_(codes.roll(1, dims=0).clone())


def exchange_nibbles(part: LoadedPart) -> None:
    codes = experts(part)[3][1]
    codes.copy_(codes << 4 | codes >> 4)


def poison_a_norm(part: LoadedPart) -> None:
    part.weights.params["layers.1.attn_norm.weight"][9] = torch.nan


def drop_the_bias(part: LoadedPart) -> None:
    part.weights.params["layers.1.ffn.gate.bias"].zero_()


def scale_a_row(part: LoadedPart) -> None:
    part.runners["layers.1.attn.wq_b"].operand.shards[0].global_scale[17] *= 1.001


EXPERT = "layers.1.ffn.experts"


@pytest.mark.parametrize(
    ("corrupt", "id_", "named", "guess"),
    [
        (swap_gate_and_up, "L02", f"{EXPERT}.5.w1", f"they are those of '{EXPERT}.5.w3.weight'"),
        (square_a_global_scale, "L03", f"{EXPERT}.3.w1", "its square"),
        (invert_a_global_scale, "L03", f"{EXPERT}.7.w2", "its reciprocal"),
        (shift_block_scales, "L02", f"{EXPERT}.2.w2", "moved on by one block"),
        (zero_an_expert, "L02", f"{EXPERT}.6.w2", "all zero"),
        (shift_experts, "L02", f"{EXPERT}.4.w2", f"they are those of '{EXPERT}.3.w2.weight'"),
        (exchange_nibbles, "L02", f"{EXPERT}.1.w2", "the two codes of each byte are exchanged"),
        (poison_a_norm, "L02", "layers.1.attn_norm.weight", "first at [9]"),
        (drop_the_bias, "L02", "layers.1.ffn.gate.bias", "all zero"),
        (scale_a_row, "L03", "layers.1.attn.wq_b", "in 1 of 2048 elements, first at [17]"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_named(corrupt: Callable[[LoadedPart], None], id_: str, named: str, guess: str) -> None:
    subject = subject_on(TINY)
    part = loaded(subject)
    assert not faults(subject, part)
    corrupt(part)
    found = faults(subject, part)
    assert {finding.id for finding in found} == {id_}
    assert any(finding.where == named and guess in finding.message for finding in found), found
    assert all(finding.remedy for finding in found)


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
    part.runners["layers.1.attn.wq_b"].operand.weight.scales[0, 0, 1] += 1
    (found,) = faults(subject, part)
    assert (found.id, found.where, found.number) == ("L02", "layers.1.attn.wq_b", 1)


@pytest.mark.parametrize(
    "name", ["attn.wq_b.weight", "ffn.experts.3.w2.weight", "ffn.experts.3.w2.weight_scale", "ffn.gate.bias"]
)
def test_a_slot_that_nothing_filled_is_named(name: str) -> None:
    subject = subject_on(TINY)
    plan = restricted(subject.plan, in_layer("layers.1"))
    weights = load_weights(plan, subject.index, subject.device, allocate=sentinel)
    assert not list(unwritten_slots(subject, weights))
    key = f"layers.1.{name}"
    slots = {slot.key: slot.target for operand in weights.operands for slot in operand.slots} | weights.params
    target = slots[key]
    fill = sentinel(tuple(target.shape), target.dtype, target.device)
    target.view(torch.uint8).copy_(fill.view(torch.uint8))
    (found,) = unwritten_slots(subject, weights)
    assert (found.id, found.where, found.verdict) == ("L01", key, Verdict.FAIL)


def test_a_checkpoint_that_cannot_be_loaded_is_a_finding(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path).folder
    key = "layers.2.ffn.experts.1.w3.weight_scale"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(torch.uint8)[0, 1] = 0x7F

    change_tensors(folder, poison)
    found = failed(findings(subject_on(folder)))
    assert [(finding.id, finding.where) for finding in found] == [("L01", key)]


def test_only_the_chosen_layers_and_experts_are_read_back() -> None:
    subject = subject_on(TINY, selection=Selection(frozenset({1, 3}), num_experts=2, seed=4))
    found = findings(subject)
    assert {finding.where for finding in found if finding.id == "L02"} == {"layers.1", "layers.3"}
    part = loaded(subject)
    chosen = set(subject.expert_ids(1))
    for expert in range(8):
        experts(part)[0][expert, 0, 0] ^= 1
    assert {finding.where for finding in faults(subject, part)} == {f"{EXPERT}.{expert}.w1" for expert in chosen}
