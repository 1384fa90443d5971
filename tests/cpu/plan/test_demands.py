"""The engine's demands on kernels are an input of the plan: batch invariance, activations, sizes, packages."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint
from support.pages import plan_text
from support.slots import slots_apart

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.cli import main
from ownpath.config import ModelConfig
from ownpath.formats import BF16, FP8_BLOCK, NVFP4
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind
from ownpath.plan.errors import PlanError
from ownpath.plan.opspec import CompanionSpec, angles_op, companion_ops, decode_ops, model_ops, route_op
from ownpath.plan.plan import make_plan, replan
from ownpath.plan.select import Caps, Choice, Demands, Refusal, select
from ownpath.plan.show import companion_rows

HOPPER = Caps("cuda", "H200", 90, frozenset({"triton"}))
BLACKWELL = Caps("cuda", "B200", 100, frozenset({"triton"}))


def spec(name: str, **changes: object) -> KernelSpec:
    return KernelSpec(name, OpKind.LINEAR, (NVFP4,), "Nvfp4Linear", "row_major", "why", "toy.ref:run", **changes)  # type: ignore[arg-type]


def chosen(*catalogue: KernelSpec, caps: Caps = HOPPER, **demands: object) -> Choice | Refusal:
    asked = Demands(**{"activations": "bfloat16"} | demands)  # type: ignore[arg-type]
    return select(OpKind.LINEAR, NVFP4, caps, catalogue, asked, dims=(256, 384))


PLAIN = spec("plain")


@pytest.mark.parametrize(
    ("better", "lack"),
    [
        (spec("better", min_sm=100), "needs sm_100, this is H200"),
        (spec("better", min_sm=80, end_sm=90), "is made for sm_80, this is H200"),
        (spec("better", packages=("cutlass",)), "needs the package cutlass"),
        (spec("better", activations=("float32",)), "takes float32 activations, not bfloat16"),
        (spec("better", dim_multiple=256), "needs dimensions that are multiples of 256, not 384"),
        (spec("better", first_dim=128), "needs a first dimension of 128, not 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_better_kernel_lacks_is_told_with_the_choice(better: KernelSpec, lack: str) -> None:
    assert chosen(better, PLAIN) == Choice(PLAIN, "why", (f"better {lack}",))
    refusal = chosen(better)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == f"no linear kernel for NVFP4: better {lack}"


def test_a_kernel_of_another_format_is_not_called_passed_over() -> None:
    other = KernelSpec("other", OpKind.LINEAR, (BF16,), "PlainLinear", "row_major", "why", "toy.ref:run")
    assert chosen(other, PLAIN) == Choice(PLAIN, "why")


def test_a_first_dimension_that_fits_leaves_the_multiple_to_the_others() -> None:
    fits = spec("fits", first_dim=256, dim_multiple=384)
    assert chosen(fits) == Choice(fits, "why")


def test_batch_invariance_is_an_input() -> None:
    fast, same = spec("fast"), spec("same", is_batch_invariant=True)
    assert chosen(fast, same) == Choice(fast, "why")
    assert chosen(fast, same, is_batch_invariant=True) == Choice(same, "why", ("fast is not batch-invariant",))


def all_companions(config: ModelConfig) -> list[CompanionSpec]:
    """Those of every step, then those of decode steps, layer by layer."""
    layers = config.backbone_layers()
    decode = ((*decode_ops(config, layer), route_op(config, layer)) for layer in layers)
    return [*companion_ops(config), angles_op(config), *chain.from_iterable(decode)]


def test_every_companion_is_planned_with_a_reason(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), HOPPER, Demands("bfloat16"))
    assert [op.spec for op in plan.companions] == all_companions(checkpoint.config)
    assert all(op.choice.why for op in plan.companions)
    kernels = {op.spec.slot: op.choice.kernel.name for op in plan.companions}
    assert kernels["layers.0.hc_attn"] == kernels["hc_head"] == "triton.hyper_boundary"
    assert kernels["layers.4.ffn.router"] == "triton.router"
    assert kernels["attn.decode.angles"] == "triton.step_angles"
    assert kernels["layers.0.attn.decode.entries"] == "ref.entries", "its head is not 512 wide"
    assert kernels["layers.4.ffn.decode.route"] == "triton.route"
    assert "layers.0.attn.decode.select" not in kernels, "a sliding layer selects nothing"
    boundaries = [slot for slot, kernel in kernels.items() if kernel == "triton.hyper_boundary"]
    assert len(boundaries) == 2 * checkpoint.config.num_hidden_layers + 1
    rows = companion_rows(plan)
    assert sum(max(1, len(row.layers)) for row in rows) == len(plan.companions)
    text = plan_text(plan)
    assert "layers.{0-4}.ffn.router " in text
    assert "triton.router: a warp a token" in text


def test_gate_and_router_stay_two_where_one_kernel_would_answer_otherwise(tmp_path: Path) -> None:
    checkpoint, asked = random_checkpoint(tmp_path), Demands("bfloat16", reference=frozenset({"layers.1.ffn"}))
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), HOPPER, asked)
    routes = {op.spec.slot for op in plan.companions if op.spec.kind is OpKind.ROUTE}
    assert routes == {f"layers.{layer_idx}.ffn.decode.route" for layer_idx in (0, 2, 3, 4)}
    same = Demands("bfloat16", is_batch_invariant=True)
    assert isinstance(select(OpKind.ROUTE, None, HOPPER, SPECS, same), Refusal), "its sums depend on the rows"


def test_a_quantised_gate_has_no_kernel_in_common_with_the_router(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), HOPPER, Demands("bfloat16"))
    wide = next(op.stored for op in plan.ops if op.encoding.format is FP8_BLOCK or op.encoding.format is NVFP4)
    ops = [replace(op, stored=wide) if op.spec.slot == "layers.2.ffn.gate" else op for op in plan.ops]
    found = replan(replace(plan, ops=tuple(ops)), HOPPER, Demands("bfloat16"))
    routes = {op.spec.slot for op in found.companions if op.spec.kind is OpKind.ROUTE}
    assert routes == {f"layers.{layer_idx}.ffn.decode.route" for layer_idx in (0, 1, 3, 4)}


def test_slots_are_unique_and_the_plan_names_each(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), HOPPER)
    slots = [op.slot for op in (*model_ops(checkpoint.config), *all_companions(checkpoint.config))]
    assert len(set(slots)) == len(slots)
    assert sorted(slots_apart(plan)) == sorted(slots)
    assert plan.slots["head"] == ("PlainLinear", "torch.plain_linear")


def test_other_activations_pass_kernels_over_by_name(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), HOPPER, Demands("float64"))
    (boundary,) = {op.choice for op in plan.companions if op.spec.slot == "hc_head"}
    assert boundary.kernel.name == "ref.hyper_boundary"
    assert "triton.hyper_boundary takes bfloat16 activations, not float64" in boundary.passed_over
    assert "passed over:\n" in plan_text(plan)


def test_a_demand_no_kernel_meets_is_a_refusal_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = random_checkpoint(tmp_path)
    cpu = Caps("cpu", "CPU")
    with pytest.raises(PlanError, match=r"ref\.nvfp4_linear is not batch-invariant"):
        make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), cpu, Demands("float32", is_batch_invariant=True))
    assert main(["plan", str(tmp_path), "--batch-invariant"]) == 2
    assert "not batch-invariant" in capsys.readouterr().err


def test_blackwell_never_runs_what_is_made_for_hopper_alone(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, CheckpointIndex.open(tmp_path), BLACKWELL, Demands("bfloat16"))
    for op in plan.decided:
        assert op.choice.kernel.end_sm is None or op.choice.kernel.end_sm > 100


def test_contracts_are_consistent() -> None:
    """A kernel appears once for each format and set of official steps, and one that is bound to a toolchain says so."""
    seen = [(kernel.name, stored, kernel.official) for kernel in SPECS for stored in kernel.formats or (None,)]
    assert len(set(seen)) == len(seen)
    for kernel in SPECS:
        if kernel.name.startswith("triton."):
            assert "triton" in kernel.packages, kernel.name
        assert kernel.end_sm is None or (kernel.min_sm is not None and kernel.min_sm < kernel.end_sm)
