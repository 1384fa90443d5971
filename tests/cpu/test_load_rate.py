"""The tool that measures loading: its checkpoint loads, whatever its size, and its rows say what was measured."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import load_rate  # noqa: E402

from ownpath.checkpoint.index import CheckpointIndex  # noqa: E402


@pytest.mark.skipif(not load_rate.STATUS.exists(), reason="needs Linux's /proc")
def test_rates_of_a_small_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "model", tmp_path / "rows.jsonl"
    options = ["--folder", str(folder), "--shape", "small", "--layers", "4", "--threads", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["load_rate.py", *options])
    load_rate.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    num_bytes = sum(info.num_bytes for info in CheckpointIndex.open(folder).tensors.values())
    assert [row["run"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["bytes"], row["threads"]) == (num_bytes, 3)
        assert row["load_gb_per_s"] == pytest.approx(num_bytes / 1e9 / row["load_s"])
        assert row["ratio_n"] == pytest.approx(row["load_gb_per_s"] / row["read_n_gb_per_s"])
