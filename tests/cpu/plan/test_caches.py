"""The caches' formats in a plan: chosen with a reason, printed, refused by name. Which steps have decode kernels."""

from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint

from ownpath.cli import main
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir, plan_model
from ownpath.official import OFFICIAL, PLAIN, Step
from ownpath.plan.caches import ENTRIES, INDEX_KEYS, WINDOW_KEYS
from ownpath.plan.errors import PlanError
from ownpath.plan.plan import Plan
from ownpath.plan.show import plan_dict

NARROW_INDEX = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 64}


def planned(device: str, cache_format: CacheFormat, official: frozenset[Step] = PLAIN) -> Plan:
    return plan_model(default_model_dir(), device, cache_format=cache_format, official=official)


@pytest.mark.parametrize(
    ("device", "cache_format", "key_bytes"),
    [
        ("cpu", CacheFormat.BF16, (2048, 2048, 512)),
        ("sm_90", CacheFormat.BF16, (1024, 1024, 256)),
        ("cpu", CacheFormat.FP8, (584, 584, 132)),
        ("sm_90", CacheFormat.FP8, (584, 584, 132)),
        ("cpu", CacheFormat.FP4_INDEX, (584, 584, 68)),
        ("sm_90", CacheFormat.FP4_INDEX, (584, 584, 68)),
    ],
)
def test_each_kind_of_keys_has_a_format(device: str, cache_format: CacheFormat, key_bytes: tuple[int, ...]) -> None:
    plan = planned(device, cache_format)
    assert [cache.keys for cache in plan.caches] == [WINDOW_KEYS, ENTRIES, INDEX_KEYS]
    assert tuple(cache.key_bytes for cache in plan.caches) == key_bytes
    assert {cache.format for cache in plan.caches[:2]} == {cache_format.keys}
    assert plan.caches[2].format is cache_format.index_keys
    assert [entry["why"] for entry in plan_dict(plan)["caches"]] == [cache.why for cache in plan.caches]  # type: ignore[attr-defined]


def test_the_reason_says_what_is_lost() -> None:
    keys, _, index = planned("sm_90", CacheFormat.FP8).caches
    assert (keys.why.partition("; ")[0], keys.why.partition("; ")[2]) == (
        "asked for by --cache-format fp8",
        "rounds them, as kv is plain",
    )
    assert index.why.endswith("as indexer is plain")
    keys, _, index = planned("sm_90", CacheFormat.FP8, OFFICIAL).caches
    assert keys.why.endswith("exact: kv is official and rounds to these values")
    assert "exact: indexer is official" in index.why
    index = planned("sm_90", CacheFormat.FP4_INDEX, OFFICIAL).caches[2]
    assert index.why == "asked for by --cache-format fp4-index; exact: indexer is official and rounds to these values"
    keys, _, _ = planned("cpu", CacheFormat.FP8, OFFICIAL).caches
    assert keys.why.endswith("but for rotary channels, rounded from float32")
    keys, _, _ = planned("sm_90", CacheFormat.BF16, OFFICIAL).caches
    assert keys.why == "the default; holds what kv rounds to"


def test_the_page_and_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cache-format", "fp8"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(WINDOW_KEYS))
    assert " fp8 " in row
    assert " 584 " in row
    assert main(["plan", "--cache-format", "fp4-index"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(INDEX_KEYS))
    assert " fp4 " in row
    assert " 68 " in row
    assert main(["plan", "--cache-format", "fp4"]) == 2
    assert "--cache-format: 'fp4' is none of bf16, fp8, fp4-index" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (
            CacheFormat.FP8,
            {},
            "FP8 pages hold keys of 512 channels, 64 of them rotary; this model's keys have 64, 32",
        ),
        (CacheFormat.FP8, NARROW_INDEX, "FP8 pages hold index keys of 128 channels; this model's have 64"),
        (CacheFormat.FP4_INDEX, NARROW_INDEX, "FP4 pages hold index keys of 128 channels; this model's have 64"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_the_option(
    asked: CacheFormat, changes: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint(tmp_path, **changes)
    with pytest.raises(PlanError, match=f"--cache-format {asked}: {message}"):
        plan_model(tmp_path, "sm_90", cache_format=asked)
    assert main(["generate", str(tmp_path), "--cache-format", asked, "x"]) == 2


@pytest.mark.parametrize("official", [PLAIN, frozenset({Step.KV}), frozenset({Step.INDEXER}), OFFICIAL])
@pytest.mark.parametrize("device", ["cpu", "sm_90"])
def test_decode_steps_have_kernels_under_any_numerics(device: str, official: frozenset[Step]) -> None:
    plan = planned(device, CacheFormat.BF16, official)
    assert not plan.no_decode
    kernels = {op.spec.slot.rpartition(".")[2]: op.choice.kernel for op in plan.companions if op.spec.kind.is_of_lines}
    assert kernels["entries"].official <= official & {Step.KV, Step.INDEXER}
    assert kernels["scores"].official == official & {Step.INDEXER}
    assert kernels["attend"].official == official & {Step.Q_HEAD_NORM}
    assert all(kernel.name.startswith("ref.") == (device == "cpu") for kernel in kernels.values())


def test_the_plan_says_what_keeps_decode_steps_on_the_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_checkpoint(tmp_path, sliding_window=64)
    assert main(["plan", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("decode steps"))
    assert line == "decode steps: on attn.core, as prompts: made for windows of 128 keys, not 64"
    assert not [op for op in plan_model(tmp_path, "cpu").companions if op.spec.kind.is_of_lines]
