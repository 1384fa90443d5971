"""A plan for Blackwell names the W4A4 kernels and says that no device has run them; no other plan does."""

import pytest
import torch
from support.pages import plan_text

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.cli import main
from ownpath.config import ModelConfig
from ownpath.formats import NVFP4
from ownpath.kernels.nvfp4_sm100.layout import W4A4LinearOperand, W4A4MoeOperand
from ownpath.loading import default_model_dir
from ownpath.ops import OpKind
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps, Choice, Demands, select
from ownpath.runners import make
from ownpath.weights.load import load_weights

TRITON = frozenset({"triton"})
B200 = Caps("cuda", "NVIDIA B200", 100, TRITON)
BF16 = Demands("bfloat16")
LINEAR, MOE = "triton.nvfp4_linear_w4a4_sm100", "triton.nvfp4_moe_w4a4_sm100"


def chosen(kind: OpKind, caps: Caps, demands: Demands = BF16, dims: tuple[int, ...] = (4096, 2048)) -> str:
    choice = select(kind, NVFP4, caps, demands=demands, dims=dims)
    assert isinstance(choice, Choice)
    return choice.kernel.name


def plan_on(caps: Caps) -> Plan:
    folder = default_model_dir()
    config = ModelConfig.from_file(folder / "config.json")
    return make_plan(config, CheckpointIndex.open(folder), caps, BF16)


def test_the_plan_of_a_blackwell_device_names_them_and_says_that_they_never_ran() -> None:
    text = plan_text(plan_on(B200))
    for name in (LINEAR, MOE):
        reason = next(line for line in text.splitlines() if f"{name} on NVFP4:" in line)
        assert "W4A4" in reason
        assert "never run on a device" in reason


def test_the_command_plans_for_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "sm_100"]) == 0
    text = capsys.readouterr().out
    assert LINEAR in text
    assert MOE in text
    assert "device: sm_100" in text
    assert main(["plan", "--device", "sm_90"]) == 0
    assert "W4A4" not in capsys.readouterr().out
    assert main(["plan", "--device", "sm_"]) == 2


@pytest.mark.parametrize(
    "caps",
    [
        Caps("cpu", "CPU", None, TRITON),
        Caps("cuda", "H200", 90, TRITON),
        Caps("cuda", "RTX PRO 6000 Blackwell", 120, TRITON),  # FP4, but by another instruction: Triton would spill
        Caps("cuda", "Thor", 110, TRITON),
        Caps("cuda", "B200 without Triton", 100),
    ],
    ids=lambda caps: caps.name,
)
def test_no_other_device_gets_them(caps: Caps) -> None:
    assert chosen(OpKind.LINEAR, caps) != LINEAR
    assert chosen(OpKind.MOE, caps) != MOE


def test_what_they_do_not_promise_is_not_asked_of_them() -> None:
    assert chosen(OpKind.LINEAR, B200) == LINEAR
    assert chosen(OpKind.MOE, Caps("cuda", "B300", 103, TRITON)) == MOE
    assert chosen(OpKind.LINEAR, B200, Demands("float32")) != LINEAR
    for kind, name in ((OpKind.LINEAR, LINEAR), (OpKind.MOE, MOE)):
        assert chosen(kind, B200, Demands("bfloat16", is_batch_invariant=True)) == f"{name}_invariant"
    assert chosen(OpKind.MOE, B200, dims=(4096, 2048 + 64)) != MOE
    assert chosen(OpKind.LINEAR, B200, dims=(4096, 2048 + 32)) != LINEAR


def test_the_runners_get_the_checkpoints_own_tensors() -> None:
    """The embedded model's full NVFP4 layers through plan, loader and runners, down to the kernels' operands."""
    plan = plan_on(B200)
    weights = load_weights(plan, CheckpointIndex.open(default_model_dir()), torch.device("cpu"))
    for op, operand in zip(plan.ops, weights.operands, strict=True):
        if op.choice.kernel.name not in (LINEAR, MOE):
            continue
        runner = make.make_runner(op, operand, plan.config)
        buffers = {name: parts[0] for name, parts in operand.buffers.items()}
        (leaf,) = runner.leaves
        if op.choice.kernel.name == LINEAR:
            held = leaf.operand
            assert isinstance(held, W4A4LinearOperand)
            assert held.shape == op.spec.shape
            assert held.input_scale == buffers["input_scale"].max()
            assert torch.equal(held.alpha, held.input_scale * buffers["weight_scale_2"])
        else:
            held_experts = leaf.operand
            assert isinstance(held_experts, W4A4MoeOperand)
            assert torch.equal(held_experts.w13_input_scale, buffers["w13_input_scale"].amax(dim=1))
            assert torch.equal(held_experts.w2_alpha, buffers["w2_input_scale"] * buffers["w2_scale_2"])
