"""Ranks with requests of their own, on a CPU, as threads: one engine, whose answers are those of one rank."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.ranks.told import Told
from support.checkpoints import random_checkpoint
from support.matchers import Every

from ownpath.cache.layout import NOBODY
from ownpath.cache.rank_books import RankNumbers, rank_pools
from ownpath.config import EngineConfig, Parallel
from ownpath.engine.data_decoder import DataDecoder, FollowingDataDecoder, LeadingDataDecoder
from ownpath.engine.data_leading import DataLeader, DataLeadingModel
from ownpath.engine.data_steps import DataFollower, RankRows, coded_flags, flag_codes
from ownpath.engine.decoding_ranks import DECODE, REDRAW
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.rank_memory import RankPrefixes, RanksMemory
from ownpath.engine.request import ROOM_AHEAD, Request, SamplingParams, StepOutput
from ownpath.engine.scheduler import Scheduler
from ownpath.loading import load_model
from ownpath.model.model import Model
from ownpath.ranks.control import DATA
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.splits import AttentionSplit, ExpertSplit

VOCAB, MAX_ROWS = 96, 3
SETTINGS = PrefixSettings(4, 256, num_tails=2)
ENGINE = EngineConfig(dtype=torch.float64, max_model_len=512, max_num_seqs=MAX_ROWS, max_prefill_tokens=64)
SMALL: dict[str, Any] = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "moe_intermediate_size": 64}
PLACES = SETTINGS.num_snapshots, SETTINGS.num_tails
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"repetition_penalty": 1.6, "temperature": 0.7},
    {"logit_bias": ((7, 4.0), (VOCAB - 1, 3.0)), "temperature": 0.0},
    {"temperature": 1.0, "num_logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 1},
)
SHARED = torch.randint(2, 90, (300,), generator=torch.Generator().manual_seed(4)).tolist()


@dataclass
class Asked:
    """A request, what it heard, and after how many tokens it is dropped."""

    request: Request
    aborts_at: int | None
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def hear(self, engine: Engine, output: StepOutput) -> None:
        assert output.error is None or self.ended.is_set(), output.error
        self.scores += [one.logprob for one in output.prompt if one.logprob is not None]
        if output.token is not None:
            self.tokens.append(output.token.token_id)
        if len(self.tokens) == self.aborts_at:
            engine.abort(self.request)
            self.ended.set()
        if output.finish_reason is not None:
            self.ended.set()


def ask(engine: Engine, number: int) -> Asked:
    """Submits one of many kinds of requests; the last ones share the beginning of their prompts."""
    prompt = SHARED[: 262 + number] if number >= 8 else [1 + number, *SHARED[: (90, 3, 40)[number % 3] + number]]
    params = SamplingParams(3 + 5 * number % 9, seed=number, ignore_eos=True, **KINDS[number % len(KINDS)])
    asked = Asked(Request(prompt, params, lambda _: None), 2 if number == 4 else None)
    asked.request.sink = lambda output: asked.hear(engine, output)
    asked.request.matcher = Every(3, VOCAB) if number in (2, 6) else None
    engine.submit([asked.request])
    return asked


def answers(engine: Engine) -> list[Asked]:
    """Answers of more requests than there is room for, many at a time, then of three of one beginning, one by one."""
    engine.start()
    try:
        together = [ask(engine, number) for number in range(8)]
        assert all(one.ended.wait(20) for one in together), engine.failure
        later = []
        for number in range(8, 11):
            later.append(ask(engine, number))
            assert later[-1].ended.wait(20), engine.failure
        return [*together, *later]
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random_checkpoint(folder, "full-nvfp4", seed=3, **SMALL)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Asked]:
    """The answers of one rank."""
    model = load_model(folder, ENGINE)
    return answers(Engine(model, ENGINE, VOCAB, end_token_ids=(), prefix=PrefixCache(model.caches, SETTINGS)))


def engine_of(rank: int, size: int) -> EngineConfig:
    parallel = Parallel(rank, size, AttentionSplit.DATA, ExpertSplit.IDS, is_even=True)
    return replace(ENGINE, parallel=parallel)


def on_ranks(
    folder: Path, size: int, lead: Callable[[DataLeadingModel, Model], None], *, decodes: bool = False
) -> Told:
    """Runs ``lead`` on rank 0, and followers on the others. decodes: with decoders."""
    told = Told(size - 1)

    def work(peers: VirtualPeers) -> None:
        model = load_model(folder, engine_of(peers.rank, size), peers=peers)
        own = DataFollower(model, peers.rank, size, PLACES)
        with torch.inference_mode():
            if peers.rank and decodes:
                decoder = FollowingDataDecoder(model, MAX_ROWS, VOCAB, peers.rank, size)
                decoder.warm_up(lambda *_: None)
                own = DataFollower(model, peers.rank, size, PLACES, decoder)
            if peers.rank:
                own.follow(told.messages[peers.rank - 1].get)
                return
            try:
                lead(DataLeadingModel(model, DataLeader(told, own)), model)  # type: ignore[arg-type]
            finally:
                told.end()

    run_virtual(size, work)
    return told


def same_answers(found: list[Asked], wanted: list[Asked]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens[: one.aborts_at] == other.tokens[: other.aborts_at], other.request.params
        assert one.scores == pytest.approx(other.scores, abs=1e-9)


@pytest.mark.parametrize("size", [4])
def test_ranks_with_their_own_requests_answer_as_one(size: int, folder: Path, alone: list[Asked]) -> None:
    """Prompts of several lengths in chunks beside answers, grammars, penalties, scored prompts, hits, and steps in
    which ranks have nothing to do."""
    found, ranks = list[Asked](), set[int]()

    def lead(leading: DataLeadingModel, model: Model) -> None:
        prefixes = leading.prefixes(SETTINGS)
        engine = Engine(leading, engine_of(0, size), VOCAB, end_token_ids=(), prefix=prefixes)
        found.extend(answers(engine))
        ranks.update(one.request.rank for one in found)
        assert prefixes.counts.num_prefix_hits > 0
        assert [*prefixes.faults(), *leading.caches.slots.faults()] == []
        assert engine.load().slots.used == 0
        assert engine.load().slots.total == size * MAX_ROWS

    told = on_ranks(folder, size, lead)
    assert ranks == {*range(size)}
    assert {"step", "save", "load"} <= {message["kind"] for message in told.heard}
    same_answers(found, alone)


def test_decoders_of_ranks_with_their_own_requests_answer_as_one(
    folder: Path, alone: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As graphs would run: steps ahead of the host, rows that come and go on either rank, tokens drawn again."""
    monkeypatch.setattr(DataDecoder, "has_graph", lambda decoder, num_rows: True)
    found = list[Asked]()

    def lead(leading: DataLeadingModel, model: Model) -> None:
        leader: Any = leading.leader.leader
        decoder = LeadingDataDecoder(model, MAX_ROWS, VOCAB, leader, leading.caches)
        decoder.warm_up(lambda *_: None)
        prefixes, config = leading.prefixes(SETTINGS), engine_of(0, 2)
        found.extend(answers(Engine(leading, config, VOCAB, end_token_ids=(), decoder=decoder, prefix=prefixes)))
        assert [*prefixes.faults(), *leading.caches.slots.faults()] == []

    told = on_ranks(folder, 2, lead, decodes=True)
    steps = [message for message in told.heard if message["kind"] == DECODE]
    assert len({message["rows"] for message in steps}) >= 2
    assert any(DATA not in message for message in steps)
    assert any(message["kind"] == REDRAW for message in told.heard)
    assert {one.request.rank for one in found} == {0, 1}
    same_answers(found, alone)


def test_rows_are_padded_and_put_in_the_order_of_ranks() -> None:
    """The example of ``data_steps``: rows of 3 and 1 tokens on rank 0 and of 2 on rank 1, the last of each wanted."""
    rows = RankRows([0, 0, 0, 1, 1, 0], [2, 4, 5], 2)
    assert (rows.rows, rows.wanted_of) == ([[0, 1, 2, 5], [3, 4]], [[2, 3], [1]])
    assert (rows.most_rows, rows.most_wanted) == (4, 2)
    assert rows.places() == [0, 1, 2, 4, 5, 3]
    assert rows.wanted_places() == [0, 2, 1]


def test_the_first_flag_of_a_row_survives_its_code() -> None:
    flags_LT = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.int32)
    codes_T = flag_codes(flags_LT)
    assert codes_T.tolist() == [0, 2, 3, 1]
    first = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    assert torch.equal(coded_flags(codes_T, flags_LT), first)


def test_numbers_go_on_from_rank_to_rank(folder: Path) -> None:
    """Each rank's slots and blocks are its own numbers 1 to n, and nobody's stays nobody's."""
    numbers = RankNumbers(3, 6)
    assert [numbers.rank_of(slot) for slot in (1, 3, 4, 9)] == [0, 0, 1, 2]
    assert [numbers.own_slot(slot) for slot in (1, 3, 4, 9)] == [1, 3, 1, 3]
    assert [numbers.own_block(block) for block in (NOBODY, 1, 6, 7, 18)] == [NOBODY, 1, 6, 1, 6]
    model = load_model(folder, ENGINE)
    whole, (first, second) = rank_pools(model.cache_spec, 2)
    caches = [first.new_sequence(300), second.new_sequence(300), second.new_sequence(20)]
    assert [(cache.slot, cache.blocks) for cache in caches] == [(1, (1, 2)), (4, (7, 8)), (5, (9,))]
    caches[2].num_tokens = 17
    caches[2].grow(257)
    assert caches[2].blocks == (9, 10)
    assert (whole.slots.lengths[5], whole.slots.num_free_slots, whole.slots.num_free_blocks) == (17, 3, 6)
    assert whole.slots.faults() == []
    for cache in caches:
        cache.release()
    assert whole.slots.faults() == []
    assert whole.slots.num_free_blocks == 12


def release_cache(request: Request) -> None:
    request.caches.release()
    request.cache = None


def request_of(num_tokens: int) -> Request:
    return Request([3] * num_tokens, SamplingParams(400), lambda _: None)


def test_room_is_made_and_prompts_are_read_rank_by_rank(folder: Path) -> None:
    """Two ranks of 3 slots and 4 blocks. Requests go where the fewest tokens are; a rank's prompts have a limit of
    their own; and whoever needs a block makes the last of its own rank yield, which begins there again."""
    spec = replace(load_model(folder, ENGINE).cache_spec, cache_blocks=4)
    whole, pools = rank_pools(spec, 2)
    memory = RanksMemory(whole.slots, pools, release_cache, None, ROOM_AHEAD)
    scheduler = Scheduler(6, 300, memory)
    first, second, third = (request_of(n) for n in (500, 240, 245))
    scheduler.add(first, second, third)
    assert {(one.request, one.num_tokens) for one in scheduler.schedule()} == {(first, 300), (second, 240), (third, 60)}
    assert [one.rank for one in (first, second, third)] == [0, 1, 1]
    for one in (first, second, third):
        one.num_computed = len(one.prompt_ids)
        one.output_ids += [5] * 10
        one.num_computed += 9
    second.output_ids += [5] * 280
    second.num_computed += 280
    third.output_ids += [5] * 280
    third.num_computed += 280
    scheduler.schedule()
    assert scheduler.running == [first, second]
    assert (third.num_computed, third.rank, scheduler.num_preempted) == (0, 1, 1)
    scheduler.remove(second)
    scheduler.schedule()
    assert third in scheduler.running
    assert third.rank == 1
    assert whole.slots.faults() == []


@pytest.mark.parametrize(("num_running", "rank"), [(100, 1), (400, 0)])
def test_a_request_goes_where_its_beginning_is_known_unless_others_crowd_there(
    num_running: int, rank: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 knows 256 of its 300 tokens: with 100 that run there it would have 144, with 400 it would have 444."""
    whole, pools = rank_pools(load_model(folder, ENGINE).cache_spec, 2)
    prefixes = RankPrefixes([PrefixCache(pool, PrefixSettings(2, num_tails=1)) for pool in pools])
    memory = RanksMemory(whole.slots, pools, release_cache, prefixes, ROOM_AHEAD)
    busy, asked = request_of(num_running), request_of(300)
    with monkeypatch.context() as patched:
        patched.setattr(prefixes.caches[0], "num_known", lambda _: -1)  # one token more than on rank 1
        assert memory.begin(busy, 0)
    assert busy.rank == 1
    monkeypatch.setattr(prefixes.caches[1], "num_known", lambda _: 256)
    assert memory.begin(asked, 0)
    assert asked.rank == rank
