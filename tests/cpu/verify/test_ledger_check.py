"""The ledger's check: what differs between a written plan and what ran is named, and nothing else is."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken import change_tensors
from support.checkpoints import random_checkpoint

from ownpath import assembly
from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict
from ownpath.kernels.nvfp4.ref import NVFP4_LINEAR
from ownpath.kernels.select.ref import SELECT
from ownpath.loading import plan_model
from ownpath.model import build
from ownpath.plan.show import plan_dict
from ownpath.trace import Record
from ownpath.trace.launches import DeviceLaunch
from ownpath.trace.uses import Use
from ownpath.verify.launch_check import check_launches
from ownpath.verify.ledger_check import RanSlot, check_ledger
from ownpath.verify.ledger_run import PartRun
from ownpath.verify.plan_file import PlanFile, read_plan_file
from ownpath.verify.subject import Selection, Subject

ENGINE = EngineConfig(max_model_len=256)
IDS = ("LG01", "LG02", "LG03", "LG04", "LG05", "LG06")
SLOT = "layers.1.attn.wq_b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full-nvfp4")
    random_checkpoint(path, "full-nvfp4")
    return path


def written(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(json.dumps(plan_dict(plan_model(folder, "cpu"))))
    return plan


def faults(folder: Path, plan: dict[str, Any], engine: EngineConfig = ENGINE) -> dict[str, list[tuple[str, str]]]:
    """id -> (where, message) of what failed; every finding that failed has a remedy."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in check_ledger(Subject.of(folder, engine), plan):
        if isinstance(finding, Finding) and finding.verdict is Verdict.FAIL:
            assert finding.remedy
            found.setdefault(finding.id, []).append((finding.where, finding.message))
    return found


def test_chosen_layers_alone_are_run(folder: Path) -> None:
    told = []
    subject = Subject.of(folder, ENGINE, Selection(frozenset({1, 3})))
    yielded = list(check_ledger(subject, written(folder), lambda *at: told.append(at)))
    findings = [item for item in yielded if isinstance(item, Finding)]
    assert not [finding for finding in findings if finding.verdict is Verdict.FAIL]
    slots = plan_model(folder, "cpu").slots
    chosen = [slot for slot in slots if not slot.startswith(("layers.0.", "layers.2.", "layers.4."))]
    assert findings[1].message == f"{len(chosen)} slots were called"
    assert told == [(0, 3, "layers.1"), (1, 3, "layers.3")]
    assert {item.slot for item in yielded if isinstance(item, RanSlot)} == set(chosen)


def replacing(monkeypatch: pytest.MonkeyPatch, slot: str, replacement: Callable[[Any], Any]) -> None:
    """Puts something else in the place of a slot's runner, after it was made as planned."""
    make = assembly.make_runners

    def made(*args: Any) -> Any:
        runners = make(*args)
        return runners | ({slot: replacement(runners[slot])} if slot in runners else {})

    monkeypatch.setattr(assembly, "make_runners", made)


def test_a_kernel_that_was_swapped_inside_its_runner_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(runner: Any) -> Any:
        runner.kernel = copy.copy(NVFP4_LINEAR)  # the same arithmetic under no name
        return runner

    replacing(monkeypatch, SLOT, swapped)
    found = faults(folder, written(folder))
    assert set(found) == {"LG03", "LG04"}
    [(where, message)] = found["LG03"]
    assert where == SLOT
    assert message.startswith("planned Nvfp4Linear (ref.nvfp4_linear), ran Nvfp4Linear (unregistered ")
    assert found["LG04"] == [(SLOT, "planned row_major, the kernel that ran reads unknown")]


def test_a_swapped_kernel_of_decode_steps_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(runner: Any) -> Any:
        runner.kernel = copy.copy(SELECT)
        return runner

    make = build.Select
    monkeypatch.setattr(build, "Select", lambda *args, **given: swapped(make(*args, **given)))
    found = faults(folder, written(folder))
    assert set(found) == {"LG03"}
    [(where, message)] = found["LG03"]
    assert where == "layers.{1,3}.attn.decode.select"
    assert message.startswith("planned Select (ref.select), ran Select (unregistered ")


def test_decode_slots_are_run_by_the_token_behind_the_prompt(folder: Path) -> None:
    chosen = Subject.of(folder, ENGINE, Selection(frozenset({3})))
    ran = {item.slot: item.kernel for item in check_ledger(chosen, written(folder)) if isinstance(item, RanSlot)}
    assert {slot: kernel for slot, kernel in ran.items() if ".3.attn.decode." in slot} == {
        "layers.3.attn.decode.entries": "ref.entries",
        "layers.3.attn.decode.scores": "ref.index_scores",
        "layers.3.attn.decode.select": "ref.select",
        "layers.3.attn.decode.attend": "ref.attend",
    }


def test_an_engine_of_another_dtype_is_named(folder: Path) -> None:
    found = faults(folder, written(folder), dataclasses.replace(ENGINE, dtype=torch.bfloat16))
    assert found["LG01"][0] == ("activations", "'float32' in the file, 'bfloat16' here")
    assert [where for where, _ in found["LG01"]] == ["activations", "caches"], "whose dtype is the activations'"
    assert ("layers.{0-4}.attn.wq_b", "argument 0 must be float32, is bfloat16") in found["LG05"]
    wide = [where for where, _ in found["LG05"] if where.endswith("ffn.gate")]
    assert wide, "the gate's input is as wide as the activations"
    results = {where for where, message in found["LG05"] if message.startswith("result")}
    assert "layers.{0-4}.ffn.gate" not in results, "and its result float32 whatever they are"
    decode = {where.rpartition(".")[2] for where, _ in found["LG05"] if ".decode." in where}
    assert decode == {"entries", "scores", "attend", "route"}, "the selection's scores are float32 as well"
    assert "attend" in {where.rpartition(".")[2] for where in results}


def test_a_companion_that_the_file_lacks_is_named(folder: Path) -> None:
    plan, slot = written(folder), "layers.0.ffn.router"
    uses = PlanFile.of(plan).slots[slot]
    for kind in ("ops", "companions"):
        plan[kind] = [entry for entry in plan[kind] if entry["slot"] != slot]
    assert faults(folder, plan) == {
        "LG01": [(slot, "planned here, not in the file")],
        "LG03": [(slot, f"not in the plan, ran {uses.runner} ({uses.kernel})")],
    }


def test_the_plan_of_another_checkpoint_is_told(folder: Path, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16")
    found = faults(folder, written(tmp_path))
    assert set(found) == {"LG01", "LG03"}
    experts = "layers.{0-4}.ffn.experts"
    ran = "planned PlainMoE (ref.plain_moe), ran Nvfp4MoE (ref.nvfp4_moe)"
    assert (experts, ran) in found["LG03"]
    differences = [message.partition(" ")[0] for where, message in found["LG01"] if where == experts]
    assert differences == ["encoding", "runner", "kernel"]


def test_other_sizes_are_told(folder: Path, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", vocab_size=128)
    found = faults(folder, written(tmp_path))
    assert [where for where, _ in found["LG01"]] == ["head"]
    assert found["LG01"][0][1].startswith("sizes ((128, ")


def test_a_layer_that_cannot_be_loaded_is_named_and_the_others_run(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    key = "layers.3.ffn.experts.2.w1.weight_scale_2"
    change_tensors(tmp_path, lambda tensors: tensors[key].fill_(float("nan")))
    found = faults(tmp_path, written(tmp_path))
    assert set(found) == {"LG02"}
    [(where, message)] = found["LG02"]
    assert where == "layers.3"
    assert key in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "device is missing"),
        (
            json.dumps({"device": "CPU", "activations": "", "batch_invariant": False, "numerics": {}, "caches": []}),
            "ops is",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"before\.json: .*{message}"):
        read_plan_file(path)
    with pytest.raises(ValueError, match=r"absent\.json: no such file"):
        read_plan_file(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan["ops"][3].pop("runner"), r"ops\[3\]\.runner is missing"),
        (lambda plan: plan["ops"][3].update(kernel=7), r"ops\[3\]\.kernel is 7"),
        (lambda plan: plan["companions"][0].update(dims=["x"]), r"companions\[0\]\.dims are no sizes"),
        (lambda plan: plan.update(ops=["x"]), r"ops\[0\] is no object"),
    ],
)
def test_a_damaged_plan_is_refused(damage: Callable[[dict[str, Any]], Any], message: str, folder: Path) -> None:
    plan = written(folder)
    damage(plan)
    with pytest.raises(ValueError, match=message):
        list(check_ledger(Subject.of(folder, ENGINE), plan))


LINEAR, NORM, PLAIN = "layers.0.attn.wq_b", "layers.0.attn.q_norm", "layers.0.ffn.gate"
FEW = "layers.0.attn.compressor"
ATTEND = "layers.0.attn.decode.attend"
ON_HOPPER = {
    "device": "NVIDIA H200",
    "activations": "bfloat16",
    "batch_invariant": False,
    "caches": [],
    "numerics": {},
    "ops": [
        {"slot": slot, "encoding": "x", "runner": "x", "kernel": kernel, "layout": "x", "shape": [1, 1]}
        for slot, kernel in (
            (LINEAR, "cute.nvfp4_linear"),
            (PLAIN, "torch.plain_linear"),
            (FEW, "triton.plain_linear_few"),
        )
    ],
    "companions": [
        {"slot": NORM, "runner": "RMSNorm", "kernel": "triton.rms_norm", "dims": [1]},
        {"slot": ATTEND, "runner": "DecodeAttention", "kernel": "triton.attend", "dims": [1]},
    ],
}
GEMM = "kernel_cutlass_kernel_ownpathkernelscutegemm_sm90Gemm_object_at__0"
CUBLAS = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(int)"
INTACT = [(LINEAR, GEMM), (PLAIN, CUBLAS), (NORM, "rms_norm_kernel"), (ATTEND, "attend_kernel"), (None, ADD)]


def launched(*launches: tuple[str | None, str], few: tuple[str, ...] = ()) -> list[Finding]:
    """The findings about these launches. few: recorded variants of the slot with few rows, which else never ran."""
    slots = [*((slot, "") for slot in (LINEAR, PLAIN, NORM, ATTEND)), *((FEW, variant) for variant in few)]
    records = [Record(slot, Use("", "", ""), variant, (), (), 1) for slot, variant in slots]
    seen = tuple(DeviceLaunch(slot, kernel, 0.0, 1.0) for slot, kernel in launches)
    return list(check_launches(PlanFile.of(ON_HOPPER), [PartRun("layers.0", tuple(records), seen)]))


def test_launches_as_planned_pass() -> None:
    [finding] = launched(*INTACT)
    assert (finding.id, finding.verdict) == ("LG06", Verdict.PASS)


@pytest.mark.parametrize(
    ("launches", "where", "message"),
    [
        ([*INTACT, (None, CUBLAS)], "outside every slot", f"a product ran: {CUBLAS}"),
        ([*INTACT, (None, "step_angles_kernel")], "outside every slot", "a kernel of ours ran: step_angles_kernel"),
        (
            [*INTACT, (LINEAR, CUBLAS)],
            LINEAR,
            f"planned cute.nvfp4_linear, but a product that is not ours ran: {CUBLAS}",
        ),
        (INTACT[1:], LINEAR, "planned cute.nvfp4_linear, but the device ran nothing named gemm_sm90"),
        ([INTACT[0], *INTACT[2:]], PLAIN, "planned torch.plain_linear, but the device ran nothing"),
        (
            [*INTACT[:2], (NORM, ADD), *INTACT[3:]],
            NORM,
            "planned triton.rms_norm, but the device ran nothing named rms_norm_kernel",
        ),
        (INTACT[:3], ATTEND, "planned triton.attend, but the device ran nothing named attend_kernel"),
        ([*INTACT, (ATTEND, CUBLAS)], ATTEND, f"planned triton.attend, but a product that is not ours ran: {CUBLAS}"),
    ],
)
def test_launches_that_differ_are_named(launches: list[tuple[str | None, str]], where: str, message: str) -> None:
    [finding] = launched(*launches)
    assert (finding.verdict, finding.where, finding.message) == (Verdict.FAIL, where, message)


TILE, FEW_KERNEL = "plain_linear_few_rows16", "plain_linear_few_kernel"


@pytest.mark.parametrize(
    ("variants", "kernels"),
    [((TILE,), (FEW_KERNEL,)), (("library",), (CUBLAS,)), ((TILE, "library"), (FEW_KERNEL, CUBLAS))],
)
def test_calls_that_a_kernel_leaves_to_a_library_are_planned(
    variants: tuple[str, ...], kernels: tuple[str, ...]
) -> None:
    [finding] = launched(*INTACT, *((FEW, kernel) for kernel in kernels), few=variants)
    assert finding.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("variants", "kernels", "message"),
    [
        ((TILE,), (FEW_KERNEL, CUBLAS), f"but a product that is not ours ran: {CUBLAS}"),
        ((TILE, "library"), (CUBLAS,), "but the device ran nothing named plain_linear_few(_fma)?_kernel"),
        (("library",), (), "but the device ran nothing"),
    ],
)
def test_a_library_runs_only_the_calls_that_are_left_to_it(
    variants: tuple[str, ...], kernels: tuple[str, ...], message: str
) -> None:
    [finding] = launched(*INTACT, *((FEW, kernel) for kernel in kernels), few=variants)
    assert (finding.verdict, finding.where) == (Verdict.FAIL, FEW)
    assert finding.message == f"planned triton.plain_linear_few, {message}"
