"""Rank 0's engine leads and another rank follows: their caches and snapshots hold the same bits."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.cache.snapshot import SnapshotStore
from ownpath.config import EngineConfig, Parallel
from ownpath.engine.engine import Engine
from ownpath.engine.following import Follower
from ownpath.engine.leading import LeadingModel, LeadingStore
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from ownpath.model.model import Model
from ownpath.ranks.control import RankMessage
from ownpath.ranks.virtual import VirtualPeers, run_virtual

SETTINGS = PrefixSettings(4, 256, num_tails=2)
ENGINE = EngineConfig(max_model_len=768, max_num_seqs=3, max_prefill_tokens=200)
SMALL_LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "moe_intermediate_size": 64}


class Told:
    """A leader whose messages lie in a queue."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[RankMessage | None] = queue.SimpleQueue()
        self.kinds: list[str] = []

    def tell(self, message: RankMessage) -> None:
        self.kinds.append(message["kind"])
        self.messages.put(message)

    @contextmanager
    def running(self, message: RankMessage) -> Iterator[None]:
        self.tell(message)
        yield


def answer(engine: Engine, prompt: list[int], num_tokens: int) -> list[int]:
    """Runs one request to its end."""
    outputs, ended = list[StepOutput](), threading.Event()

    def sink(output: StepOutput) -> None:
        outputs.append(output)
        if output.finish_reason is not None:
            ended.set()

    engine.submit([Request(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0), sink)])
    assert ended.wait(60)
    assert outputs[-1].error is None
    return [output.token.token_id for output in outputs if output.token is not None]


def answers(engine: Engine) -> list[list[int]]:
    """A prompt whose answer ends a block, twice, the same beginning twice, passing a block, and what parts from it."""
    prompt = torch.randint(2, 90, (600,), generator=torch.Generator().manual_seed(4)).tolist()
    engine.start()
    try:
        found = [answer(engine, prompt[:n], 12) for n in (505, 505, 600, 270)]
        return [*found, answer(engine, [*prompt[:300], *prompt[:40]], 6)]
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("following")
    random_checkpoint(folder, "full-nvfp4", seed=3, **SMALL_LAYERS)
    return folder


def places_of(store: SnapshotStore) -> list[torch.Tensor]:
    copied = [*store._columns, *store._tail_slots, *store._tail_blocks]
    return [place for columns in copied for place in columns.places]


def test_the_follower_holds_what_the_leader_holds(folder: Path) -> None:
    told, stores, found = Told(), dict[int, SnapshotStore](), list[list[int]]()

    def lead(model: Model) -> None:
        leading = LeadingModel(model, told)  # type: ignore[arg-type]
        places = SETTINGS.num_snapshots, SETTINGS.num_tails
        stores[0] = LeadingStore(model.caches, places[0], told, leading.passed, places[1])  # type: ignore[arg-type]
        prefix = PrefixCache(model.caches, SETTINGS, store=stores[0])
        found.extend(answers(Engine(leading, ENGINE, 96, prefix=prefix)))
        assert prefix.counts.num_prefix_hits >= 2
        told.messages.put(None)

    def work(peers: VirtualPeers) -> Model:
        model = load_model(folder, replace(ENGINE, parallel=Parallel(peers.rank, 2)), peers=peers)
        if peers.rank == 0:
            lead(model)
        else:
            follower = Follower(model, SETTINGS.num_snapshots, SETTINGS.num_tails)
            follower.follow(told.messages.get)
            stores[1] = follower._snapshots
        return model

    first, second = run_virtual(2, work)
    assert {"step", "save", "put", "load", "save-tail", "load-tail"} == {*told.kinds}
    for member, tensor in first.caches.tensors.items():
        assert torch.equal(tensor, second.caches.tensors[member]), member
    assert len(places_of(stores[0])) > len(stores[0]._columns), "else no tail is compared"
    for one, other in zip(places_of(stores[0]), places_of(stores[1]), strict=True):
        assert torch.equal(one, other)
    alone = load_model(folder, ENGINE)
    assert found == answers(Engine(alone, ENGINE, 96, prefix=PrefixCache(alone.caches, SETTINGS)))
