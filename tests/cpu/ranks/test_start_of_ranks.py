"""Ranks compare what they are about to run, and learn of each other's faults, before anything is loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ownpath.checkpoint.errors import CheckpointError
from ownpath.commands.rank_start import become_ready
from ownpath.config import EngineConfig, Parallel
from ownpath.loading import load_model
from ownpath.model.model import Model
from ownpath.ranks.group import join, leave
from ownpath.ranks.peers import PeerLost, RanksDiffer
from ownpath.ranks.start import RankFailed
from ownpath.ranks.started import RANK_LOST, launch_mark
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.ranks.wire import WireHeader, packed, unpacked


def errors_of(folders: list[Path]) -> list[Exception | None]:
    """Loads a folder on each rank, and returns what it raises."""

    def load(peers: VirtualPeers) -> Exception | None:
        try:
            engine = EngineConfig(max_model_len=64, parallel=Parallel(peers.rank, len(folders)))
            assert isinstance(load_model(folders[peers.rank], engine, peers=peers), Model)
        except (RanksDiffer, ValueError) as error:
            return error
        return None

    return run_virtual(len(folders), load)


def test_ranks_with_other_settings_are_refused_by_rank_and_field(tmp_path: Path) -> None:
    for number in range(2):
        random_checkpoint(tmp_path / str(number), "bf16")
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps(config | {"swiglu_limit": 7.0}))
    for error in errors_of([tmp_path / "0", tmp_path / "1"]):
        assert isinstance(error, RanksDiffer)
        assert str(error).startswith("rank 1 has another config.json than rank 0")


def test_a_fault_of_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    for number in range(3):
        random_checkpoint(tmp_path / str(number), "bf16", num_attention_heads=6, o_groups=3, vocab_size=99)
    folder = tmp_path / "1"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("layers.1.attn.wkv.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    first, own, third = errors_of([tmp_path / str(number) for number in range(3)])
    assert isinstance(own, CheckpointError)
    for error in (first, third):
        assert isinstance(error, RankFailed)
        assert str(error).startswith("rank 1: ")
        assert "layers.1.attn.wkv" in str(error)


def test_ranks_in_different_exchanges_are_found() -> None:
    def work(peers: VirtualPeers) -> str:
        try:
            peers.swap(f"layers.{peers.rank}.attn.reduce", (torch.zeros(1),))
        except RanksDiffer as error:
            return str(error)
        return ""

    told = run_virtual(2, work)
    assert "rank 0 is in layers.0.attn.reduce, rank 1 in layers.1.attn.reduce" in told


def test_a_virtual_rank_that_ends_is_lost_by_name() -> None:
    def work(peers: VirtualPeers) -> None:
        if peers.rank == 1:
            raise ZeroDivisionError("a bug")
        with pytest.raises(PeerLost, match=r"rank 1 is lost, in layers.0.ffn.reduce") as caught:
            peers.swap("layers.0.ffn.reduce", (torch.zeros(1),))
        assert caught.value.rank == 1

    with pytest.raises(ZeroDivisionError):
        run_virtual(2, work)


def test_tensors_go_over_the_wire_as_they_are() -> None:
    tensors = (
        torch.randn(3, 5).to(torch.bfloat16),
        torch.arange(6).view(2, 3).T,
        torch.empty(0, 7, dtype=torch.float64),
        torch.tensor([True, False]),
    )
    header = WireHeader.of(3, "layers.0.ffn.gather", tensors)
    assert WireHeader.read(header.values()) == header
    for sent, got in zip(tensors, unpacked(packed(tensors), header), strict=True):
        assert sent.dtype == got.dtype
        assert torch.equal(sent, got)


HANGING = """
import os, signal
import torch
from types import SimpleNamespace
from ownpath.commands.rank_start import become_ready
from ownpath.ranks.group import join
group = join(os.environ)
become_ready(SimpleNamespace(window=None), group, 60.0)
group.swap("layers.0.attn.reduce", (torch.ones(1),))
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
def test_a_rank_that_hangs_is_lost_when_the_limit_of_a_ready_server_is_over() -> None:
    """Its connections stay open, so that only the limit tells. Before the start has ended, the limit is minutes."""
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    other = subprocess.Popen([sys.executable, "-c", HANGING], env=os.environ | ranks | {"RANK": "1"})
    model: Any = SimpleNamespace(window=None)
    try:
        group = join(ranks | {"RANK": "0"}, store)
        become_ready(model, group, 1.0)
        group.swap("layers.0.attn.reduce", (torch.ones(1),))
        start = time.monotonic()
        with pytest.raises(PeerLost, match=r"rank 1 is lost, in layers\.1\.attn\.reduce: no answer in 1 s"):
            group.swap("layers.1.attn.reduce", (torch.ones(1),))
        assert 0.9 < time.monotonic() - start < 6
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        leave()


def test_ranks_of_two_hosts_are_refused() -> None:
    """As torchrun tells of four ranks, two of them on each host."""
    with pytest.raises(ValueError, match="4 ranks, 2 of them on this host: ownpath runs a model on one host"):
        join({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})


MEETING = """
from ownpath.ranks.launch import launched
from ownpath.ranks.peers import PeerLost
try:
    with launched(2, ["--version"]):
        pass
except PeerLost as error:
    print(error)
"""


def test_a_rank_that_ends_before_all_have_met_is_lost_at_once() -> None:
    """Its process prints a version and ends; the first rank does not wait for it until the start's limit is over."""
    told = subprocess.run([sys.executable, "-c", MEETING], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.splitlines()[-1] == "rank 1 is lost, in start: its process has ended"


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends it")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_rank_ends_with_the_process_that_started_it(is_there: bool) -> None:
    """One that comes late, when that process has ended already, sees that it has another parent."""
    mark = launch_mark() if is_there else {name: f"{value}0" for name, value in launch_mark().items()}
    script = "import os; from ownpath.ranks.started import end_with_parent as e; e(os.environ); print('goes on')"
    told = subprocess.run([sys.executable, "-c", script], env=os.environ | mark, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == ((0, "goes on\n") if is_there else (RANK_LOST, ""))
