"""The table and the records: nothing that was measured, or could not be, is left out."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_rows import case, row
from support.pages import table_text

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench_tables

from ownpath.bench.plot import plot_rows
from ownpath.bench.record import append_lines, provenance, row_dict
from ownpath.bench.row import Row, compare, geometric_mean

RECORDS = Path(__file__).parents[3] / "bench" / "results"


def test_a_lost_case_stays_and_says_so() -> None:
    rows = [row(case(1), "ownpath", 20.0), row(case(1), "humming", 30.0)]
    rows += [row(case(8), "ownpath", 50.0), row(case(8), "humming", 40.0)]
    text = table_text(rows, "title")
    won, lost = text.splitlines()[3:5]
    assert "1.50" in won
    assert "LOST" not in won
    assert "0.80 LOST" in lost
    # sqrt(1.5 x 0.8) = 1.095
    assert "1.10x in the geometric mean of 2 cases, 0.80x at least; lost: 1; without a comparison: 0" in text


def test_a_contender_that_is_not_there_has_its_column_and_its_reason() -> None:
    rows = [row(case(1), "ownpath", 20.0), row(case(1), "quack", None, "not installed", "no package quack-kernels")]
    text = table_text(rows, "title")
    assert "quack" in text.splitlines()[2]
    assert "not installed" in text.splitlines()[3]
    assert "quack: not installed: no package quack-kernels" in text
    assert "nothing is compared" in text


def test_a_wrong_answer_is_shown_but_never_the_best_peer() -> None:
    rows = [row(case(1), "ownpath", 20.0), row(case(1), "humming", 30.0), row(case(1), "quack", 5.0, "wrong", "off")]
    comparison = compare(rows)[0]
    assert comparison.best_peer is not None
    assert comparison.best_peer.contender == "humming"
    assert comparison.ratio == pytest.approx(1.5)
    line = table_text(rows, "title").splitlines()[3]
    assert "5.0 (2.0e-03) WRONG" in line


def test_our_own_failure_is_no_comparison_and_not_silent() -> None:
    rows = [row(case(1), "ownpath", None, "failed", "ValueError: no"), row(case(1), "humming", 30.0)]
    text = table_text(rows, "title")
    assert compare(rows)[0].ratio is None
    assert "ownpath: failed: ValueError: no" in text
    assert "failed" in text.splitlines()[3]


def test_a_case_that_one_contender_skipped_is_marked() -> None:
    rows = [row(case(1), "ownpath", 20.0), row(case(8), "ownpath", 20.0), row(case(1), "humming", 30.0)]
    text = table_text(rows, "title")
    assert "not run" in text.splitlines()[4]
    assert "without a comparison: 1" in text


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([]) is None


def test_a_record_says_where_its_number_comes_from(tmp_path: Path) -> None:
    origin = provenance("cpu", "abc123", "ownpath bench moe", "cpu wall clock")
    record = row_dict(row(case(4), "ownpath", 8.0), 7, origin)
    path = tmp_path / "deep" / "out.jsonl"
    append_lines(path, [record])
    append_lines(path, [record])
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert first == second
    assert first["device"].startswith("cpu")
    assert first["timer"] == "cpu wall clock"
    assert (first["commit"], first["command"], first["seed"]) == ("abc123", "ownpath bench moe", 7)
    assert first["versions"]["torch"]
    assert (first["bench"], first["shape"], first["tokens"], first["experts"]) == ("moe", "tiny", 4, 8)
    assert (first["us"], first["us_p10"], first["us_p90"]) == (8.0, 7.0, 9.0)
    assert (first["calls_per_replay"], first["replays"], first["distinct_experts"]) == (4, 11, 5.5)
    # 2 MB in 8 us are 0.25 TB/s, 4 MFLOP in 8 us 0.5 TFLOP/s.
    assert first["tb_per_s"] == pytest.approx(0.25)
    assert first["tflop_per_s"] == pytest.approx(0.5)


def test_a_row_without_a_time_and_one_with_nan_are_json_too(tmp_path: Path) -> None:
    missing = row_dict(row(case(4), "quack", None, "not installed", "no package"), 0, {})
    assert missing["us"] is None
    assert missing["tb_per_s"] is None
    unwritten = row(case(4), "humming", 8.0, "wrong", "NaN")
    object.__setattr__(unwritten, "rel_l2", math.nan)
    append_lines(tmp_path / "out.jsonl", [missing, row_dict(unwritten, 0, {})])
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[1])["rel_l2"] is None


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    rows = [row(case(tokens), name, 10.0 * tokens) for tokens in (1, 8) for name in ("ownpath", "humming")]
    plot_rows(rows, "title", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="no contender has a time"):
        plot_rows([row(case(1), "quack", None, "not installed")], "title", tmp_path / "none.png")


def written(path: Path, rows: list[Row]) -> None:
    """Writes rows as ``ownpath bench --out`` does."""
    origin = provenance("cpu", "abc123", "ownpath bench moe", "cpu wall clock")
    append_lines(path, [row_dict(one, 0, origin) for one in rows])


def test_the_tool_shows_rows_without_a_floor_or_a_plans_kernel_and_counts_other_lines(tmp_path: Path) -> None:
    alone = replace(row(case(1), "ownpath", 8.0), case=replace(case(1), shape="alone", floor_us=None))
    named = replace(row(case(8), "a kernel", 9.0), is_peer=False)
    found = row(case(1), "ownpath", 20.0), row(case(1), "humming", 10.0), named, row(case(8), "humming", 18.0)
    written(tmp_path / "rows.jsonl", [alone, *found])
    append_lines(tmp_path / "rows.jsonl", [{"bench": "ncu", "dram_pct": 55.6}])
    rows, others = bench_tables.read([tmp_path / "rows.jsonl"])
    assert others == 1
    text = bench_tables.table(rows)
    assert "| alone | 1 | - | 8.0 | - | - | - | - |" in text
    assert "| 20.0 | 10.0 | - | 0.50 lost |" in text
    assert "| 18.0 | 9.0 | 2.00 | 111% |" in text
    (tmp_path / "ncu.jsonl").write_text('{"bench": "ncu"}\n')
    with pytest.raises(ValueError, match="holds no rows of"):
        bench_tables.read([tmp_path / "ncu.jsonl"])
    drawn = bench_tables.newest(rows)
    assert {one.case.shape for one in drawn} == {"tiny"}
    assert [one.contender for one in drawn] == ["ownpath", "humming", "a kernel", "humming"]


@pytest.mark.parametrize("bench", ["parallel", "prompt", "drafts", "attend_chunk", "moe_v4_flash", "parallel_step"])
def test_the_tool_shows_the_records_of_every_bench(bench: str) -> None:
    rows, _ = bench_tables.read([RECORDS / f"{bench}_h200.jsonl"])
    assert len(bench_tables.table(rows).splitlines()) > 4
