"""The tool is itself tested: every corruption fails and is named, what is intact passes, and the page says so."""

from pathlib import Path

import pytest
from support.checkpoints import LAYOUTS
from support.hopper_layouts import allow_packing_on_cpu
from support.mutations import MUTATIONS
from support.mutations.drafts import OPTIONS
from support.mutations.mutation import Mutation
from support.mutations.runs import outcome_of, verified, write_model, write_models
from support.mutations.table import rows, unseen_names
from support.mutations.unseen import MUTATIONS as UNSEEN
from support.slots import slots_apart

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict, failed, warned
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir
from ownpath.plan.opspec import STEP_ANGLES
from ownpath.verify import kernel_stage
from ownpath.verify.checks import TITLES
from ownpath.verify.layers.batching import Batching
from ownpath.verify.report import report_dict
from ownpath.verify.run import STAGES, Verification, VerifyJob, verify
from ownpath.verify.subject import Selection

EXPERTS = "layers.1.ffn.experts"
SAYS = {
    "gate and up exchanged": f"they are those of '{EXPERTS}.5.w3.weight'",
    "global scale applied twice": "its square",
    "global scale as a divisor": "its reciprocal",
    "block scales moved by one": "moved on by one block",
    "expert zeroed": "all zero",
    "experts shifted by one": f"they are those of '{EXPERTS}.3.w2.weight'",
    "other nibble first": "the two codes of each byte are exchanged",
    "NaN in a norm, behind the loader": "first at [9]",
    "one row's factor": "first at [17]",
    "expert's output lost": "the expert is empty",
    "tokens sent to another expert": "it gives what expert 6 should",
    "gate and up exchanged in the kernel": "w1 and w3 (gate and up) are swapped",
    "w1 scaled in the kernel": "w1 is scaled by 3",
    "w3 scaled in the kernel": "w3 is scaled by 3",
    "w2 scaled in the kernel": "w2 is scaled by 3",
    "one output of a fused pair": "1 of 64 outputs are wrong, the first is 61",
    "no clamp in the routed experts": "the clamp is missing",
    "hash layer reads token 0": "tid2eid",
    "kernel raises": "RuntimeError: no kernel image is available",
    "runner replaced after planning": "planned Nvfp4Linear (ref.nvfp4_linear), ran PlainLinear (ref.plain_linear)",
    "slot that the ledger never sees": "never called; planned RMSNorm (ref.rms_norm)",
    "another kernel in the plan's file": "kernel cute.nvfp4_linear in the file, ref.nvfp4_linear here",
    "a slot lost from the plan's file": "planned here, not in the file",
    "runner that refuses nothing": "integer activations: not refused",
    "decode: window one too short": "the row at position 1",
    "decode: window one too long": "the row at position 0",
    "decode: ring overwritten one early": "main state, row ",
    "decode: entry one block off": "main entries, row ",
    "decode: another theta": "window, row ",
    "decode: ties broken upwards": "is to be next",
    "decode: selection one short": "attends to 47 entries where 48 are to be selected",
}
"""Words of the message that name the cause."""
OF_A_LAYER = (
    *("L01", "L02", "L04", "K01", "K02", "K03", "K07", "K10", "K11"),
    *("V01", "V02", "V03", "V05", "V08", "V09", "V10"),
)
"""Checks that say something of each layer by its name."""
FINDS = {"K01": {"K01", "K04", "K06"}}
"""Ids that a check of the kernels stage tells besides its own."""
OF_BATCHES = frozenset({"V05", "V08", "V09"})
"""Checks of a layer run in other batches."""
RUN = frozenset({"kernels", "layers"})
"""Stages that take time."""
AFTER_PRODUCTS = ("stale input buffer",)
"""Their fault shows in memory that an earlier check's calls left."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught_and_named(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the checks of kernels and batches that are to see it alone, in half the time; the next test runs all."""
    mutation = MUTATIONS[name]
    if mutation.device != "CPU":
        allow_packing_on_cpu(monkeypatch)
    (row,) = (row for row in rows() if row.name == name)
    wanted = {*row.ids, "K01"} if name in AFTER_PRODUCTS else set(row.ids)
    checks = [pair for pair in kernel_stage.CHECKS if not FINDS.get(pair[0], {pair[0]}).isdisjoint(wanted)]
    monkeypatch.setattr(kernel_stage, "CHECKS", tuple(checks))
    if OF_BATCHES.isdisjoint(row.ids):
        monkeypatch.setattr(Batching, "findings", lambda _: iter(()))
    result = verified(mutation, models, tmp_path)
    assert result.passed == mutation.is_warning
    found = warned(result.findings) if mutation.is_warning else failed(result.findings)
    outcome = outcome_of(mutation, result)
    assert outcome.finding is not None, [(finding.id, finding.where) for finding in found]
    assert outcome.finding.remedy
    assert "\n" not in outcome.finding.message
    assert SAYS.get(name, "") in outcome.finding.message
    if mutation.layer_idx is not None:
        of_layer = [finding for finding in found if finding.where != STEP_ANGLES]  # which no layer has to itself
        assert {".".join(finding.where.split(".")[:2]) for finding in of_layer} == {f"layers.{mutation.layer_idx}"}
    assert (row.ids, row.where) == (outcome.ids, mutation.where), "docs/mutations.md: python tools/mutation_table.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, it in MUTATIONS.items() if not it.stages or {*it.stages} & RUN])
def test_no_other_check_fails(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    (row,) = (row for row in rows() if row.name == name)
    assert outcome_of(MUTATIONS[name], verified(MUTATIONS[name], models, tmp_path)).ids == row.ids


def test_the_page_lists_the_mutations_that_there_are() -> None:
    assert [row.name for row in rows()] == list(MUTATIONS)
    assert unseen_names() == list(UNSEEN)
    assert {mutation.check for mutation in MUTATIONS.values()} <= set(TITLES)
    assert set(SAYS) <= set(MUTATIONS)


def test_an_intact_module_raises_no_alarm(models: dict[str, Path], tmp_path: Path) -> None:
    """Beside which the mutations of drafts are seen."""
    intact = Mutation("nothing", "V12", "mtp.0", **OPTIONS)
    result = verified(intact, models, tmp_path)
    assert result.passed, failed(result.findings)
    passed = {(one.id, one.where) for one in result.findings if one.verdict is Verdict.PASS}
    assert {(check, "mtp.0") for check in ("V01", "V02", "V03", "V05", "V08", "V09", "V11", "V12")} <= passed


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_said_not_to_be_caught_is_not(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert verified(UNSEEN[name].mutation, models, tmp_path).passed


def assert_no_alarm(result: Verification) -> None:
    """Nothing failed, nothing came too near, and no layer, slot or check was left out."""
    assert result.passed, failed(result.findings)
    assert {finding.id for finding in result.findings} == set(TITLES) - {"RUN"}
    assert all(finding.number is None or finding.number <= 1 for finding in of_stage(result, "kernels"))
    seen = {(finding.id, finding.where) for finding in result.findings}
    plan = result.job.subject.plan
    layers = [f"layers.{idx}" for idx in range(plan.config.num_hidden_layers)]
    assert {(check, layer) for check in OF_A_LAYER for layer in layers} <= seen
    (called,) = (f for f in of_stage(result, "ledger") if f.id == "LG02" and f.where == "ledger")
    assert called.message == f"{len(plan.slots)} slots were called"
    assert {("V01", "embed"), ("V01", "head"), ("V03", "streams"), ("V04", "logits"), ("L02", "ends")} <= seen
    rows = result.measurements
    compared = {f"layers.{row.layer_idx}.{row.slot}" for row in rows} | {"hc_head", "head"}
    for slot in slots_apart(plan):
        if ".decode." in slot:
            continue  # V05's steps run through them; K11 looks at each
        assert any(name == slot or name.startswith(f"{slot}.") for name in compared), f"{slot} was not compared"
    assert all(0 < row.budget < 1 and row.is_within for row in rows)


def of_stage(result: Verification, name: str) -> tuple[Finding, ...]:
    (stage,) = (stage for stage in result.stages if stage.name == name)
    return stage.findings


SLOW_LAYOUTS = ("compressed-tensors", "bf16")
"""The other four have every quantised format, in ModelOpt's and DeepSeek's names."""


@pytest.mark.parametrize(
    ("seed", "layout"),
    [
        pytest.param(seed, layout, marks=pytest.mark.slow if layout in SLOW_LAYOUTS else ())
        for seed, layout in enumerate(LAYOUTS, start=101)
    ],
)
def test_intact_checkpoints_raise_no_alarm(seed: int, layout: str, tmp_path: Path) -> None:
    """Each export with a seed of its own."""
    widths = {"moe_intermediate_size": 64} if layout == "deepseek-native" else {}
    result = verify(VerifyJob(write_model(tmp_path / "model", layout, seed, **widths)), STAGES)
    assert_no_alarm(result)
    if layout == "full-nvfp4":
        assert {f.id for f in of_stage(result, "file") if f.verdict is Verdict.SKIPPED} == {"F13"}


@pytest.mark.parametrize("cache_format", [CacheFormat.FP4_INDEX, pytest.param(CacheFormat.FP8, marks=pytest.mark.slow)])
def test_caches_in_pages_raise_no_alarm(cache_format: CacheFormat) -> None:
    """Of a CSA layer, which has all kinds of keys; beside FP4 index keys the others are FP8's. test_decode_check has
    the other layers' decode steps."""
    job = VerifyJob(default_model_dir(), EngineConfig(cache_format=cache_format), Selection(frozenset({1}), 1))
    result = verify(job, ("kernels", "layers"))
    assert result.passed, failed(result.findings)
    caches = report_dict(result)["caches"]
    assert [(cache["keys"], cache["format"]) for cache in caches] == [  # type: ignore[attr-defined]
        ("window keys", "fp8"),
        ("compressed entries", "fp8"),
        ("index keys", cache_format.index_keys),
    ]


def test_the_embedded_model_raises_no_alarm() -> None:
    assert_no_alarm(verify(VerifyJob(default_model_dir()), STAGES))
