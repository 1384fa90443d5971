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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_every_request_ends_in_an_answer_or_a_named_error(caplog: pytest.LogCaptureFixture) -> None:
    tally = overload.Tally()
    with harness(rules=Rules(timeout_s=1.0), max_num_queued=16, max_model_len=2048) as served, listening(served) as url:
        port = int(url.rsplit(":", 1)[1])
        watch = Watch(os.getpid(), port)
        outcome = asyncio.run(overload.overload(port, watch, SECONDS, TIMES, tally, seed=3))
        assert served.settled()
        assert served.model.caches.slots.faults() == []
        assert not served.model.caches.slots.owned
    assert tally.faults == []
    assert watch.problems == []
    assert set(tally.ends) == {kind.name for kind in mix.KINDS}, "every kind was sent"
    ends = sum(tally.ends.values(), start=overload.Counter())
    assert ends["answer"]
    assert ends["429"], "it was more than the server takes"
    assert ends["left"]
    assert ends["refused"]
    assert tally.num_killed
    assert not any(outcome.held.values())
    assert not [record for record in caplog.records if record.exc_info], "nothing failed inside"
