"""``bench drafts`` on the CPU: guesses accepted by force at the rate that is asked for, beside plain steps."""

import pytest
import torch

from ownpath.bench import drafts
from ownpath.bench.drafts import DraftBench, accept_by_chance
from ownpath.bench.measure import Settings
from ownpath.bench.request import BenchRequest, StepOptions
from ownpath.cli import main


@pytest.mark.parametrize(("share", "tokens"), [(0.0, 1.0), (1.0, 2.0)])
def test_rows_have_the_time_of_a_token(share: float, tokens: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "NUM_CHAINED", 3)
    options = StepOptions(context=130, layers=2, expert_sets=1, accepted=share)
    bench = DraftBench.of(BenchRequest(Settings.of("cpu", 0, 0.0), step=options), "small", 2)
    plain, drafted = bench.measured((2,))
    assert (plain.contender, drafted.contender) == ("ownpath", f"drafts, {share:g} accepted by force")
    assert "gain" not in plain.facts
    assert drafted.facts["tokens_of_a_step"] == tokens
    assert plain.timing is not None
    assert drafted.timing is not None
    assert drafted.facts["gain"] == pytest.approx(plain.timing.us / drafted.timing.us, abs=1e-3)


def test_guesses_are_accepted_by_chance() -> None:
    """Each call and each request has judgements of its own; the elements between those that it writes stay."""
    accepted, judge = torch.full((100, 2 * 20), 7, dtype=torch.int32), accept_by_chance(0.8, "cpu")
    for row in accepted:
        judge(torch.zeros(20), torch.ones(20), row[::2])
    assert (accepted[:, 1::2] == 7).all()
    accepted = accepted[:, ::2]
    assert not (accepted[0] == accepted[1]).all()
    assert not (accepted[:, 0] == accepted[:, 1]).all()
    assert float(accepted.float().mean()) == pytest.approx(0.8, abs=0.05), "5.6 standard deviations"


def test_the_rate_is_an_option_of_this_bench_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--accepted", "0.5", "--device", "cpu"]) == 2
    assert "--accepted: an option of bench drafts" in capsys.readouterr().err
