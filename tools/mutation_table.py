"""Writes docs/mutations.md: the findings of `ownpath verify` for every corruption of tests/support/mutations.

It also prints details that the page leaves out: the corruption, the options, and the finding's message.

python tools/mutation_table.py        # two minutes of one core
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hopper_layouts import allow_packing_on_cpu  # noqa: E402
from support.mutations import MUTATIONS  # noqa: E402
from support.mutations.runs import Outcome, outcome_of, verified, write_models  # noqa: E402
from support.mutations.table import PATH, page, told  # noqa: E402


def main() -> None:
    """Runs all mutations, one after the other."""
    torch.set_num_threads(1)
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        models = write_models(Path(folder))
        for number, name in enumerate(MUTATIONS):
            outcomes[name] = _outcome(name, models, Path(folder) / str(number), monkeypatch)
            print(told(name, MUTATIONS[name], outcomes[name]), flush=True)
    PATH.write_text(page(outcomes), encoding="utf-8")
    print(f"{len(outcomes)} mutations, all caught or told: {PATH.relative_to(ROOT)}")


def _outcome(name: str, models: dict[str, Path], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    mutation = MUTATIONS[name]
    with monkeypatch.context() as patched:
        if mutation.device != "CPU":
            allow_packing_on_cpu(patched)
        return outcome_of(mutation, verified(mutation, models, scratch))


if __name__ == "__main__":
    main()
