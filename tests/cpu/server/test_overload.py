"""The tool that overloads a server, for a few seconds, on a server of this process: every request ends as it may."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from cpu.server.harness import harness, listening

from ownpath.server.app import Rules

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import overload
from overloading import mix
from overloading.watch import Watch

SECONDS, TIMES = 1.5, 8.0
KINDS = {kind.name for kind in mix.KINDS}
ENDS = ("answer", "429", "left", "refused")


def ends_of(tally: overload.Tally) -> dict[str, int]:
    """The ends of requests of all kinds, and how often there was each."""
    return sum(tally.ends.values(), start=overload.Counter())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_every_request_ends_in_an_answer_or_a_named_error(caplog: pytest.LogCaptureFixture) -> None:
    tally = overload.Tally()
    with harness(rules=Rules(timeout_s=1.0), max_num_queued=16, max_model_len=2048) as served, listening(served) as url:
        port = int(url.rsplit(":", 1)[1])
        for seed in range(3, 11):  # a busy machine is sent less in the time
            watch = Watch(os.getpid(), port)
            outcome = asyncio.run(overload.overload(port, watch, SECONDS, TIMES, tally, seed))
            assert watch.problems == []
            assert not any(outcome.held.values())
            if set(tally.ends) == KINDS and set(ENDS) <= set(ends_of(tally)) and tally.num_killed:
                break
        assert served.settled()
        assert served.model.caches.slots.faults() == []
        assert not served.model.caches.slots.owned
    assert tally.faults == []
    assert set(tally.ends) == KINDS, "every kind was sent"
    assert set(ENDS) <= set(ends_of(tally)), "it was more than the server takes"
    assert tally.num_killed
    assert not [record for record in caplog.records if record.exc_info], "nothing failed inside"
