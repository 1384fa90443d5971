"""Graphs launched before the tokens of the one before are read: the same answers, whole books, a device that is fed."""

import queue
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_configs import model_configs
from support.matchers import Every

from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import overlap_rate  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

MAX_ROWS = 8
WAIT_S = 60
Wanted = tuple[list[int], SamplingParams]
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.7, "num_logprobs": 0},
    {"temperature": 0.8, "num_logprobs": 3},
    {"temperature": 0.9, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 1.0, "min_tokens": 6, "logit_bias": ((9, 2.0),)},
)


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module", params=[False, True], ids=["default", "batch-invariant"])
def config(cuda: torch.device, request: pytest.FixtureRequest) -> EngineConfig:
    return EngineConfig(
        str(cuda), torch.bfloat16, 1024, MAX_ROWS, max_prefill_tokens=128, is_batch_invariant=request.param
    )


@pytest.fixture(scope="module")
def model(config: EngineConfig) -> Model:
    return load_model(default_model_dir(), config)


class Counted(Decoder):
    """A decoder that counts the steps launched while another one was unread; ``flies`` False reads each at once."""

    flies, num_behind = True, 0

    def has_graph(self, num_rows: int) -> bool:
        return self.flies and super().has_graph(num_rows)

    def _take_turn(self) -> int:
        self.num_behind += self._num_unread
        return super()._take_turn()


@pytest.fixture(scope="module")
def decoder(model: Model) -> Counted:
    made = Counted(model, MAX_ROWS, model.config.vocab_size)
    with torch.inference_mode():
        made.capture(lambda *_: None)
    return made


def answers(
    model: Model,
    config: EngineConfig,
    decoder: Counted,
    wanted: Sequence[Wanted],
    pauses: Sequence[float] = (),
    num_bound: int = 0,
) -> list[list[StepOutput]]:
    """Returns what requests hear, submitted together, or with pauses between them. Books are whole afterwards.
    num_bound: of the first, whose token at place p of the answer is p modulo 3, 4, 5, ..."""
    engine = Engine(model, config, model.config.vocab_size, end_token_ids=(5,), decoder=decoder)
    engine.start()
    heard: list[queue.SimpleQueue[StepOutput]] = [queue.SimpleQueue() for _ in wanted]
    requests = [Request(list(ids), params, one.put) for (ids, params), one in zip(wanted, heard, strict=True)]
    for n, request in enumerate(requests[:num_bound]):
        request.matcher = Every(3 + n, model.config.vocab_size)
    if pauses:
        for request, pause in zip(requests, pauses, strict=True):
            engine.submit([request])
            time.sleep(pause)
    else:
        engine.submit(requests)
    found = [list(outputs_of(one)) for one in heard]
    engine.stop()
    assert engine.num_open == 0
    check_books(model)
    return found


def outputs_of(heard: "queue.SimpleQueue[StepOutput]") -> Iterator[StepOutput]:
    while True:
        output = heard.get(timeout=WAIT_S)
        assert output.finish_reason is not FinishReason.ERROR, output.error
        yield output
        if output.finish_reason is not None:
            return


def check_books(model: Model) -> None:
    pool: CachePool = model.caches
    assert pool.slots.faults() == []
    assert not pool.slots.owned


def test_rows_that_stay_have_the_tokens_of_steps_one_by_one(
    model: Model, config: EngineConfig, decoder: Counted
) -> None:
    """Requests that begin and end together: both ways run the same steps, so any plan gives the same bits."""
    kinds = KINDS[:3]
    wanted = [
        ([3 + n, *range(9, 9 + 20 * n)], SamplingParams(90, seed=n, ignore_eos=True, **kinds[n % 3])) for n in range(5)
    ]
    decoder.flies = False
    expected = answers(model, config, decoder, wanted)
    decoder.flies, decoder.num_behind = True, 0
    assert answers(model, config, decoder, wanted) == expected
    assert decoder.num_behind > 80, "nearly every step was launched before the one before was read"


@pytest.mark.parametrize("num_bound", [0, 4])
def test_rows_that_are_drawn_again_do_not_wait(
    model: Model, config: EngineConfig, decoder: Counted, num_bound: int
) -> None:
    """Penalties, biases and grammars: the tokens of steps one by one, each launched before the one before is read."""
    if num_bound and not config.is_batch_invariant:
        pytest.skip("a bound answer may end early, and an ordinary plan may sum in another order beside other rows")
    kinds = enumerate((*KINDS[:3], *KINDS[4:]))
    wanted = [([3 + n], SamplingParams(60, seed=n, ignore_eos=True, **kind)) for n, kind in kinds]
    decoder.flies = False
    expected = answers(model, config, decoder, wanted, num_bound=num_bound)
    decoder.flies, decoder.num_behind = True, 0
    assert answers(model, config, decoder, wanted, num_bound=num_bound) == expected
    for n, outputs in enumerate(expected[:num_bound]):
        said = [output.token.token_id for output in outputs if output.token is not None]
        assert all(token_id % (3 + n) == place % (3 + n) for place, token_id in enumerate(said))
    assert decoder.num_behind > 50


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_kinds", [3, len(KINDS)], ids=["plain", "mixed"])
def test_joins_and_ends_change_no_answer(
    model: Model, config: EngineConfig, decoder: Counted, num_kinds: int, seed: int
) -> None:
    """More requests than rows, at random times; answers are those of requests one after the other.

    Prompts of one token begin in a graph: steps by ``forward`` have other roundings.
    """
    if not config.is_batch_invariant:
        pytest.skip("an ordinary plan may sum in another order beside other rows")
    chance = random.Random(seed)
    wanted: list[Wanted] = []
    for n in range(24):
        stops = frozenset(chance.sample(range(6, 200), 20))
        params = SamplingParams(chance.randint(1, 80), seed=n, stop_token_ids=stops, **chance.choice(KINDS[:num_kinds]))
        wanted.append(([chance.randrange(6, 200)], params))
    decoder.flies = False
    expected = [answers(model, config, decoder, [one])[0] for one in wanted]
    decoder.flies, decoder.num_behind = True, 0
    pauses = [chance.random() * 0.005 for _ in wanted]
    assert answers(model, config, decoder, wanted, pauses) == expected
    assert decoder.num_behind > 20


def test_aborted_requests_leave_others_alone(model: Model, config: EngineConfig, decoder: Counted) -> None:
    """Requests are dropped while graphs run; who stays hears what it hears alone under an invariant plan, and memory is
    whole under any."""
    stays = ([3], SamplingParams(300, temperature=0.0, ignore_eos=True))
    decoder.flies = True
    (expected,) = answers(model, config, decoder, [stays])
    engine = Engine(model, config, model.config.vocab_size, end_token_ids=(5,), decoder=decoder)
    engine.start()
    heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine.submit([Request(list(stays[0]), stays[1], heard.put)])
    for n in range(30):
        first: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        victim = Request([6 + n], SamplingParams(500, seed=n), first.put)
        engine.submit([victim])
        first.get(timeout=WAIT_S)
        engine.abort(victim)
    found = list(outputs_of(heard))
    engine.stop()
    assert len(found) == len(expected)
    assert found == expected or not config.is_batch_invariant
    check_books(model)


def test_a_step_may_end_at_the_last_place_of_its_memory(model: Model, config: EngineConfig, decoder: Counted) -> None:
    decoder.flies = True
    longest = ([7] * 900, SamplingParams(124, temperature=0.0, ignore_eos=True))
    (found,) = answers(model, config, decoder, [longest])
    assert len([output for output in found if output.token is not None]) == 124


@pytest.mark.bench
def test_how_the_device_is_fed_can_be_measured(cuda: torch.device) -> None:
    """Served throughput beside graphs back to back, and the gap between two graphs. What they should be, the tool says
    on a machine of its own: other tests run beside this one."""
    records = list(overlap_rate.measure(str(cuda), (1, 8), 300))
    assert [record["requests"] for record in records] == [1, 8]
    for record in records:
        assert 0 < record["served_share"] < 1.5, record  # type: ignore[operator]
        assert record["gap_us"] > 0, record  # type: ignore[operator]
