"""Stage file beside what test_mutations runs: how findings belong to checks, what few experts tell, another export."""

import json
import math
import random
from pathlib import Path

import pytest
from support.broken import Tensors, change_tensors
from support.checkpoints import DSPARK, random_checkpoint

from ownpath.chat.markers import ASSISTANT, THINK_END
from ownpath.checkpoint.problems import REMEDIES
from ownpath.config import unread_fields
from ownpath.finding import Finding, Verdict, failed
from ownpath.inspect.experts import outlier_limit
from ownpath.inspect.golden_prompts import GOLDEN_PROMPTS, ROUND_TRIPS
from ownpath.verify.checks import TITLES
from ownpath.verify.file_stage import CHECK_OF, file_stage
from ownpath.verify.subject import Selection

IDS = [f"F{number:02}" for number in range(1, 14) if number != 8]


def quiet(_done: int, _total: int, _name: str) -> None:
    pass


def findings(folder: Path, selection: Selection | None = None, source: Path | None = None) -> list[Finding]:
    return list(file_stage(folder, selection or Selection(), source, quiet))


def found(folder: Path) -> set[tuple[str, str]]:
    failures = failed(findings(folder))
    assert all(finding.remedy and "\n" not in finding.message for finding in failures)
    return {(finding.id, finding.where) for finding in failures}


def test_every_kind_of_problem_belongs_to_one_check() -> None:
    kinds = [kind for kinds in CHECK_OF.values() for kind in kinds]
    assert sorted(kinds) == sorted(REMEDIES)
    assert set(CHECK_OF) <= set(TITLES)


def test_a_folder_without_a_tokenizer_fails_for_that_alone(tmp_path: Path) -> None:
    assert found(random_checkpoint(tmp_path, "full-nvfp4", 5).folder) == {("F12", "tokenizer.json")}


def test_a_config_that_cannot_be_read_leaves_the_rest_out(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    seen = {finding.id: finding for finding in findings(folder) if finding.id != "F13"}
    assert seen["F11"].verdict is Verdict.FAIL
    assert {seen[id_].verdict for id_ in IDS[1:9]} == {Verdict.SKIPPED}


def test_golden_prompts_are_the_formats_and_not_our_encoders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that forgets what closes reasoning disagrees with all of them but one."""
    from ownpath.chat import encode

    monkeypatch.setattr(encode, "THINK_END", "")
    assert {where for id_, where in found(folder) if id_ == "F12"} >= {"chat", "several turns", "tools"}
    assert all(golden.prompt.count(ASSISTANT) == sum(m.role == "user" or m.role == "tool" for m in golden.messages)
               for golden in GOLDEN_PROMPTS)  # fmt: skip
    assert THINK_END in GOLDEN_PROMPTS[0].prompt
    assert len(set(ROUND_TRIPS)) == len(ROUND_TRIPS)


def test_unread_fields_are_those_that_parsing_ignores(folder: Path) -> None:
    """Every other field changes the parsed configuration, or is refused, when it changes."""
    fields = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.0, "use_cache": True}
    assert set(unread_fields(fields | DSPARK)) == {"attention_dropout", "use_cache"}
    (folder / "config.json").write_text(json.dumps(fields))
    (config,) = (finding for finding in findings(folder) if finding.id == "F11")
    assert (config.verdict, config.number) == (Verdict.PASS, 2)
    assert config.message.endswith("attention_dropout, use_cache")


@pytest.mark.parametrize(("num_experts", "limit"), [(8, 18.7), (256, 5.4), (10**6, 5.256)])
def test_outliers_are_judged_by_how_well_the_spread_is_known(num_experts: int, limit: float) -> None:
    """Solved by hand from (1 + z^2 / n)^(-n / 2) = 1e-6; for many experts that is sqrt(-2 ln 1e-6) = 5.257."""
    n = num_experts - 1
    z = outlier_limit(num_experts)
    assert (1 + z * z / n) ** (-n / 2) == pytest.approx(1e-6, rel=1e-6)
    assert z == pytest.approx(limit, rel=0.01)


def test_log_normal_experts_are_no_outliers() -> None:
    """Ten thousand layers of eight experts whose sizes spread by a factor of two: as noisy as few experts get."""
    from ownpath.inspect.experts import expert_outliers

    draw = random.Random(7)
    largest = {
        f"layers.{layer}.ffn.experts.{expert}.w1": math.exp(draw.gauss(0, math.log(2)))
        for layer in range(10_000)
        for expert in range(8)
    }
    assert sum(1 for _ in expert_outliers(largest, ())) <= 2
    largest["layers.3.ffn.experts.5.w1"] = 2.0**60
    assert "layers.3.ffn.experts.5.w1" in {problem.where for problem in expert_outliers(largest, ())}


def test_only_the_chosen_layers_scales_are_all_read(folder: Path) -> None:
    whole = {finding.id: finding for finding in findings(folder)}["F07"]
    some = {finding.id: finding for finding in findings(folder, Selection(frozenset({2})))}["F07"]
    assert whole.number is not None
    assert some.number is not None
    assert some.number <= whole.number


def source_of(tmp_path: Path, layout: str, seed: int = 0) -> Path:
    sizes = {"moe_intermediate_size": 64}
    return random_checkpoint(tmp_path / f"{layout}-{seed}", layout, seed, **sizes).folder


@pytest.mark.parametrize("layout", ["full-nvfp4", "compressed-tensors", "deepseek-native", "fp8-experts"])
def test_exports_of_one_model_are_as_close_as_their_formats(layout: str, tmp_path: Path) -> None:
    """The same random weights, each export rounding them in its own way."""
    ours, theirs = source_of(tmp_path, layout), source_of(tmp_path, "bf16")
    for pair in ((ours, theirs), (theirs, ours)):
        compared = [f for f in findings(pair[0], source=pair[1]) if f.id == "F13"]
        assert [f.verdict for f in compared] == [Verdict.PASS] * 5
        assert [f.where for f in compared] == [f"layers.{idx}" for idx in range(5)]
        assert all(f.number is not None and 0 < f.number < 0.2 for f in compared)


@pytest.mark.parametrize("change", ["another model", "scaled", "swapped", "one block moved"])
def test_another_models_experts_are_told_apart(change: str, tmp_path: Path) -> None:
    ours, theirs = source_of(tmp_path, "full-nvfp4"), source_of(tmp_path, "bf16")
    key = "layers.2.ffn.experts.1"

    def changed(tensors: Tensors) -> None:
        if change == "scaled":
            tensors[f"{key}.w2.weight_scale_2"] *= 2
        elif change == "swapped":
            w1, w3 = (f"{key}.{projection}.weight" for projection in ("w1", "w3"))
            tensors[w1], tensors[w3] = tensors[w3], tensors[w1]
        else:
            scale = tensors[f"{key}.w2.weight"]
            tensors[f"{key}.w2.weight"] = scale.roll(8, dims=1).contiguous()

    if change == "another model":
        ours = source_of(tmp_path, "full-nvfp4", seed=1)
    else:
        change_tensors(ours, changed)
    compared = [f for f in findings(ours, Selection(num_experts=8), theirs) if f.id == "F13"]
    where = {finding.where for finding in failed(compared)}
    if change == "another model":
        assert len(where) == 5 * 8 * 3
    else:
        assert where == ({f"{key}.w1", f"{key}.w3"} if change == "swapped" else {f"{key}.w2"})


def test_a_source_that_is_none_fails(folder: Path, tmp_path: Path) -> None:
    (compared,) = (f for f in findings(folder, source=tmp_path) if f.id == "F13")
    assert (compared.verdict, compared.where) == (Verdict.FAIL, "--source")
