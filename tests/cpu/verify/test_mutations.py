"""The tool is itself tested: every corruption fails and is named, what is intact passes, and the page says so."""

from pathlib import Path

import pytest
from support.hopper_layouts import allow_packing_on_cpu
from support.mutations import MUTATIONS
from support.mutations.runs import outcome_of, verified, write_model, write_models
from support.mutations.table import rows, unseen_names
from support.mutations.unseen import MUTATIONS as UNSEEN

from ownpath.finding import failed
from ownpath.loading import default_model_dir
from ownpath.verify.checks import TITLES
from ownpath.verify.run import STAGES, Job, verify

INTACT = ("full-nvfp4", "modelopt-experts-only", "compressed-tensors", "deepseek-native", "fp8-experts")
"""Each with a seed of its own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught_and_named(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation = MUTATIONS[name]
    if mutation.device != "CPU":
        allow_packing_on_cpu(monkeypatch)
    result = verified(mutation, models, tmp_path)
    assert not result.passed
    found = failed(result.findings)
    outcome = outcome_of(mutation, result)
    assert outcome.finding is not None, [(finding.id, finding.where) for finding in found]
    assert outcome.finding.remedy
    assert "\n" not in outcome.finding.message
    if mutation.layer_idx is not None:
        assert {".".join(finding.where.split(".")[:2]) for finding in found} == {f"layers.{mutation.layer_idx}"}
    (row,) = (row for row in rows() if row.name == name)
    assert (row.ids, row.where) == (outcome.ids, mutation.where), "docs/mutations.md: python tools/mutation_table.py"


def test_the_page_lists_the_mutations_that_there_are() -> None:
    assert [row.name for row in rows()] == list(MUTATIONS)
    assert unseen_names() == list(UNSEEN)
    assert len(MUTATIONS) >= 30
    assert {mutation.check for mutation in MUTATIONS.values()} <= set(TITLES)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_said_not_to_be_caught_is_not(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert verified(UNSEEN[name].mutation, models, tmp_path).passed


@pytest.mark.parametrize(("seed", "layout"), tuple(enumerate(INTACT, start=101)))
def test_intact_checkpoints_raise_no_alarm(seed: int, layout: str, tmp_path: Path) -> None:
    widths = {"moe_intermediate_size": 64} if layout == "deepseek-native" else {}
    result = verify(Job(write_model(tmp_path / "model", layout, seed, **widths)), STAGES)
    assert result.passed, failed(result.findings)
    assert {finding.id for finding in result.findings} == set(TITLES) - {"RUN"}


def test_the_embedded_model_raises_no_alarm() -> None:
    result = verify(Job(default_model_dir()), STAGES)
    assert result.passed, failed(result.findings)
