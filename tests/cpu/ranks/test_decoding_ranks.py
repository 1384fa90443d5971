"""Decoders of two ranks, on a CPU, where steps run eagerly: the second launches what the first tells it."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.matchers import Every

from ownpath.config import EngineConfig, Parallel
from ownpath.engine.decoder import Decoder
from ownpath.engine.decoding_ranks import DECODE, REDRAW, FollowingDecoder, LeadingDecoder, RankDecoder
from ownpath.engine.engine import Engine
from ownpath.engine.following import Follower
from ownpath.engine.leading import LeadingModel, LeadingStore
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from ownpath.model.model import Model
from ownpath.ranks.control import DATA, Listener, RankMessage, packed_message
from ownpath.ranks.peers import RanksDiffer
from ownpath.ranks.virtual import VirtualPeers, run_virtual

VOCAB, MAX_ROWS = 96, 5
ENGINE = EngineConfig(dtype=torch.float64, max_model_len=512, max_num_seqs=MAX_ROWS, max_prefill_tokens=64)
SETTINGS = PrefixSettings(4, 256)
SMALL: dict[str, Any] = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "moe_intermediate_size": 64}
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"repetition_penalty": 1.6, "temperature": 0.7},
    {"logit_bias": ((7, 4.0), (VOCAB - 1, 3.0)), "temperature": 0.0},
    {"temperature": 1.0, "num_logprobs": 2},
)


@dataclass
class Told:
    """A leader whose messages lie in a queue."""

    messages: "queue.SimpleQueue[RankMessage | None]" = field(default_factory=queue.SimpleQueue)
    heard: list[RankMessage] = field(default_factory=list)

    def tell(self, message: RankMessage) -> None:
        self.heard.append(message)
        self.messages.put(message)

    @contextmanager
    def running(self, message: RankMessage) -> Iterator[None]:
        self.tell(message)
        yield


@dataclass
class Asked:
    """A request and what it heard. aborts_at: the tokens after which it is dropped."""

    request: Request
    aborts_at: int | None
    tokens: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


def send_back(engine: Engine) -> None:
    """Takes the memory of the request that began last, as if it were needed."""
    engine._runner.settle()
    engine._scheduler._send_back()


def ask(engine: Engine, number: int) -> Asked:
    """Submits one of many kinds of requests; the last ones share the beginning of their prompts."""
    kind, aborts_at = KINDS[number % len(KINDS)], 3 if number % 6 == 5 else None
    params = SamplingParams(20 if number in (6, 7, 8) else 2 + 5 * number % 11, seed=number, ignore_eos=True, **kind)
    shared = torch.randint(2, 90, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    prompt = shared[: 262 + number] if number >= 9 else [1 + number, *shared[: 249 if number > 5 else number]]

    def sink(output: StepOutput) -> None:
        assert output.error is None or asked.ended.is_set(), output.error
        if output.token is not None:
            asked.tokens.append(output.token.token_id)
        if number == 7 and len(asked.tokens) == 4:
            engine._inbox.put(lambda: send_back(engine))
        if len(asked.tokens) == aborts_at:
            engine.abort(asked.request)
            asked.ended.set()
        if output.finish_reason is not None:
            asked.ended.set()

    asked = Asked(Request(prompt, params, sink), aborts_at)
    asked.request.matcher = Every(3, VOCAB) if number in (2, 6) else None
    engine.submit([asked.request])
    return asked


def answers(engine: Engine) -> list[list[int]]:
    """Answers of more requests than rows, many at a time, then of three of one beginning after each other."""
    engine.start()
    try:
        together = [ask(engine, number) for number in range(9)]
        assert all(one.ended.wait(60) for one in together)
        later = []
        for number in range(9, 12):
            later.append(ask(engine, number))
            assert later[-1].ended.wait(60)
        return [one.tokens[: one.aborts_at] for one in (*together, *later)]
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    random_checkpoint(folder, "full-nvfp4", seed=3, **SMALL)
    return folder


def on_two_ranks(folder: Path, lead: Callable[[Model, Told], None]) -> tuple[Told, list[Model]]:
    """Runs ``lead`` on rank 0, and a follower on rank 1."""
    told = Told()

    def work(peers: VirtualPeers) -> Model:
        model = load_model(folder, replace(ENGINE, parallel=Parallel(peers.rank, 2)), peers=peers)
        with torch.inference_mode():
            if peers.rank == 0:
                lead(model, told)
                told.messages.put(None)
            else:
                decoder = FollowingDecoder(model, MAX_ROWS, VOCAB)
                decoder.warm_up(lambda *_: None)
                Follower(model, SETTINGS.num_snapshots, SETTINGS.num_tails, decoder).follow(told.messages.get)
        return model

    return told, run_virtual(2, work)


def warm(decoder: RankDecoder) -> RankDecoder:
    """Runs every bucket, as the other rank does too."""
    decoder.warm_up(lambda *_: None)
    return decoder


def test_two_ranks_draw_the_tokens_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come, go, are sent back and dropped; grammars, penalties and bias; prompts that were seen; several buckets.

    Rank 0 launches steps before it has read the ones before, as it does where they are graphs.
    """
    monkeypatch.setattr(LeadingDecoder, "has_graph", lambda decoder, num_rows: True)
    found = list[list[int]]()
    counts = list[tuple[int, int]]()

    def lead(model: Model, told: Told) -> None:
        leading = LeadingModel(model, told)  # type: ignore[arg-type]
        store = LeadingStore(model.caches, SETTINGS.num_snapshots, told, leading.passed)  # type: ignore[arg-type]
        prefix = PrefixCache(model.caches, SETTINGS, store=store)
        decoder = warm(LeadingDecoder(model, MAX_ROWS, VOCAB, told))  # type: ignore[arg-type]
        engine = Engine(leading, ENGINE, VOCAB, end_token_ids=(), decoder=decoder, prefix=prefix)
        found.extend(answers(engine))
        counts.append((engine.counts.num_preempted, engine.counts.num_prefix_hits))

    told, (first, second) = on_two_ranks(folder, lead)
    assert counts[0][0] > 0
    assert counts[0][1] > 0
    steps = [message for message in told.heard if message["kind"] == DECODE]
    assert len({message["rows"] for message in steps}) >= 3
    assert any(message["kind"] == REDRAW for message in told.heard)
    assert any(DATA not in message for message in steps)
    for member, tensor in first.caches.tensors.items():
        assert torch.equal(tensor, second.caches.tensors[member]), member
    alone = load_model(folder, ENGINE)
    prefix = PrefixCache(alone.caches, SETTINGS)
    decoder = Decoder(alone, MAX_ROWS, VOCAB)
    assert found == answers(Engine(alone, ENGINE, VOCAB, end_token_ids=(), decoder=decoder, prefix=prefix))


def test_a_step_of_the_same_rows_is_told_in_a_few_bytes() -> None:
    """Sizes of what goes to each rank: the header of 16 bytes, and the JSON below."""
    again: RankMessage = {"kind": DECODE, "rows": 256, "turn": 1}
    assert len(packed_message(7, again)) == 16 + len('{"kind": "decode", "rows": 256, "turn": 1}')


class OneLine:
    """A group of which one message has been lost on the way."""

    rank = 1

    def __init__(self, *messages: bytes) -> None:
        self._data = b"".join(messages)
        self.written = b""

    def read(self, slot: str, rank: int, count: int) -> bytes:
        found, self._data = self._data[:count], self._data[count:]
        return found

    def write(self, slot: str, rank: int, data: bytes) -> None:
        self.written += data


def test_a_follower_that_misses_a_message_says_so() -> None:
    first, pulse, third = (
        packed_message(number, told)
        for number, told in enumerate([{"kind": DECODE, DATA: b"\1\0\2"}, {"kind": "pulse"}, {"kind": DECODE}])
    )
    whole = OneLine(first, pulse, third)
    listener = Listener(whole)  # type: ignore[arg-type]
    assert [listener.hear(), listener.hear()] == [{"kind": DECODE, DATA: b"\1\0\2"}, {"kind": DECODE}]
    assert len(whole.written) == 1
    gapped = Listener(OneLine(first, third))  # type: ignore[arg-type]
    gapped.hear()
    with pytest.raises(RanksDiffer, match="message 2 of rank 0 has come to rank 1, not 1"):
        gapped.hear()
