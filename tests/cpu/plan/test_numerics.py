"""The numerics that were requested, and the plan's text for them."""

import re
from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint
from support.pages import plan_text

from ownpath.cli import main
from ownpath.loading import plan_model
from ownpath.official import ALWAYS_OFFICIAL, OFFICIAL, PLAIN, Step, numerics_name, parse_numerics
from ownpath.ops import OpKind
from ownpath.plan.show import plan_dict


def test_texts_and_steps() -> None:
    assert parse_numerics("plain") == PLAIN == frozenset()
    assert parse_numerics("official") == OFFICIAL == set(Step) - {Step.FP8_EXPERTS}
    assert parse_numerics("indexer,kv") == {Step.KV, Step.INDEXER}
    for official in (PLAIN, OFFICIAL, frozenset({Step.KV, Step.FP8_INPUTS})):
        assert parse_numerics(numerics_name(official)) == official
    assert numerics_name(ALWAYS_OFFICIAL) == "plain"


@pytest.mark.parametrize("text", ["", "kv,", "Official", "plain,kv"])
def test_what_is_no_step_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = next(name for name in text.split(",") if name not in tuple(Step))
    with pytest.raises(ValueError, match=re.escape(f"{unknown!r} is none of plain, official, fp8_inputs")):
        parse_numerics(text)
    assert main(["plan", "--numerics", text]) == 2
    assert f"{unknown!r} is none of plain, official" in capsys.readouterr().err


def test_the_plan_shows_every_step(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "deepseek-native")
    plan = plan_model(tmp_path, "cpu", official=parse_numerics("kv,routing_weight"))
    shown = plan_dict(plan)["numerics"]
    official = {Step.KV, Step.ROUTING_WEIGHT, Step.COMPRESSOR, Step.HEAD}
    assert shown == {step: "official" if step in official else "plain" for step in Step}
    text = plan_text(plan)
    assert "\nnumerics: kv,routing_weight\n" in text
    for step, value in shown.items():
        assert f"\n  {step}: {value} (" in text
    assert "ref.fp8_keys" in text
    assert "ref.moe_weight_first" in text
    assert "computes routing_weight as plain numerics do: ref.nvfp4_moe" in text


def test_plain_plans_hold_nothing_official(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "deepseek-native")
    for device in ("cpu", "sm_90", "sm_100"):
        plan = plan_model(tmp_path, device)
        assert not any(op.choice.kernel.official for op in plan.decided)
        assert not any("plain numerics" in lack for op in plan.decided for lack in op.choice.passed_over)


@pytest.mark.parametrize("device", ["cpu", "sm_90", "sm_100"])
@pytest.mark.parametrize("layout", ["modelopt-experts-only", "full-nvfp4", "deepseek-native", "bf16"])
def test_official_plans_leave_no_step_out(layout: str, device: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, layout, hidden_size=256, moe_intermediate_size=128, q_lora_rank=128, head_dim=128)
    plan = plan_model(tmp_path, device, official=OFFICIAL)
    found = set().union(*(op.choice.kernel.official for op in plan.decided))
    inputs = {
        "modelopt-experts-only": {Step.FP8_INPUTS, Step.NVFP4_INPUTS},
        "full-nvfp4": {Step.FP8_INPUTS, Step.NVFP4_INPUTS},
        "deepseek-native": {Step.FP8_INPUTS},
        "bf16": set(),
    }[layout]
    assert found == inputs | {Step.KV, Step.INDEXER, Step.Q_HEAD_NORM, Step.ROUTING_WEIGHT}
    if device == "sm_90":
        runners = {op.choice.kernel.runner: op.choice.kernel.name for op in plan.ops}
        assert runners.get("QuantizedFp8Linear", "cute.fp8_linear_sm90") == "cute.fp8_linear_sm90"


@pytest.mark.parametrize(
    ("layout", "step"), [("modelopt-experts-only", "fp8_experts"), ("deepseek-native", "fp8_inputs")]
)
def test_quantised_inputs_bring_experts_to_fp8_tensor_cores(layout: str, step: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, layout, hidden_size=256, moe_intermediate_size=256, q_lora_rank=128, head_dim=128)
    for device, expected in (("sm_90", "cute.fp8_experts"), ("cpu", "ref.moe_"), ("sm_100", "ref.moe_")):
        plan = plan_model(tmp_path, device, official=parse_numerics(step))
        chosen = {op.choice.kernel.name for op in plan.ops if op.spec.kind is OpKind.MOE}
        assert all(name.startswith(expected) for name in chosen), (device, chosen)
    plan = plan_model(tmp_path, "sm_90")
    assert "cute.nvfp4_moe" in {op.choice.kernel.name for op in plan.ops if op.spec.kind is OpKind.MOE}
