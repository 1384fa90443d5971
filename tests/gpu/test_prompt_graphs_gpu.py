"""Prompts read in captured graphs on a device: the bits of eager steps, other requests' memory, an engine around it."""

import queue
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.cache.layout import NAN_BYTE
from ownpath.config import EngineConfig
from ownpath.engine import steps
from ownpath.engine.decoder import make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.prompt_graphs import PromptGraphs, with_prompt_graphs
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

MAX_SEQS, LARGEST = 8, 512
STEPS = ((512,), (500,), (100, 1, 1), (257, 130), (3, 400, 90), (2, 2))
"""Rows of each request, each beside those that begin with it: full shapes, and padded ones."""


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module")
def model(cuda: torch.device) -> Model:
    return load_model(default_model_dir(), EngineConfig(str(cuda), torch.bfloat16, 16384, MAX_SEQS))


@pytest.fixture(scope="module")
def graphs(model: Model) -> PromptGraphs:
    made = PromptGraphs(model, LARGEST)
    with torch.inference_mode():
        made.capture(lambda *_: None)
    return made


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 2000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Model, reader: Model | PromptGraphs, steps: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of the last rows of each step, and all that the requests' caches then hold, as bytes; a request goes on
    from step to step. Nothing else in the caches is anything but NaN."""
    for tensor in model.caches.tensors.values():
        tensor.view(torch.uint8).fill_(NAN_BYTE)
    caches, found = [model.new_cache(4000) for _ in range(3)], list[torch.Tensor]()
    for at, counts in enumerate(steps):
        parts = [(ids(count, 10 * at + n), caches[n]) for n, count in enumerate(counts)]
        batch = ForwardBatch.of(parts, model.cache_spec.device)
        found += [reader.forward(batch), batch.tables.flags_LT.clone()]
        assert found[-2].isfinite().all(), counts
    found += [view.clone().view(torch.uint8) for cache in caches for view in cache.views()]
    for cache in caches:
        cache.release()
    return found


def assert_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_graph_has_the_bits_of_an_eager_step(model: Model, graphs: PromptGraphs) -> None:
    """On the same padded arrays, whatever the graph was replayed for before."""
    before = graphs.num_replays
    found = run(model, graphs, STEPS)
    assert graphs.num_replays == before + len(STEPS)
    assert_equal(found, run(model, PromptGraphs(model, LARGEST), STEPS))
    assert_equal(run(model, graphs, STEPS[1:]), run(model, PromptGraphs(model, LARGEST), STEPS[1:]))


def test_full_shapes_have_the_bits_of_forward(model: Model, graphs: PromptGraphs) -> None:
    full = [(512,), (256,), (512,), (200, 56), (1, 127)]
    assert_equal(run(model, graphs, full), run(model, model, full))


def test_a_long_context_has_another_graph(model: Model, graphs: PromptGraphs) -> None:
    """At 8,100 tokens the step's table passes the width of the first graphs."""
    cache, found = model.new_cache(), list[list[torch.Tensor]]()
    for reader in (graphs, model):
        for tensor in model.caches.tensors.values():
            tensor.view(torch.uint8).fill_(0)
        cache.num_tokens = 0
        for start in range(0, 8704, 512):
            logits_RV = reader.forward(ForwardBatch.of([(ids(512, start), cache)], model.cache_spec.device))
        found.append([logits_RV, *(view.clone().view(torch.uint8) for view in cache.views())])
    cache.release()
    assert_equal(*found)


def tokens_of(engine: Engine, requests: Sequence[tuple[list[int], int]], num_aborted: int = 0) -> list[list[int]]:
    """Greedy answers of requests submitted together; the first ones are aborted once they have begun."""
    heard: queue.SimpleQueue[tuple[int, StepOutput]] = queue.SimpleQueue()

    def tell(n: int, output: StepOutput) -> None:
        heard.put((n, output))

    made = [
        Request(prompt, SamplingParams(count, temperature=0.0), partial(tell, n))
        for n, (prompt, count) in enumerate(requests)
    ]
    engine.submit(made)
    for request in made[:num_aborted]:
        engine.abort(request)
    left = set(range(num_aborted, len(made)))
    while left:
        n, output = heard.get(timeout=60)
        assert output.finish_reason is not FinishReason.ERROR, output.error
        if output.finish_reason is not None:
            left.discard(n)
    return [list(request.output_ids) for request in made[num_aborted:]]


def test_an_engine_reads_prompts_in_graphs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths together, one aborted, and one by one, cold and sent again. One by one the tokens are
    those of the same padded steps without graphs; nothing leaks."""
    for name in ("MOST_ALONE", "MOST_BESIDE", "MOST_ALONE_OF_GRAPHS", "MOST_BESIDE_OF_GRAPHS"):
        monkeypatch.setattr(steps, name, 1)  # a decode step rounds otherwise
    engine = EngineConfig(str(model.cache_spec.device), torch.bfloat16, 16384, MAX_SEQS, LARGEST)
    decoder, prompts = make_decoder(model, engine, model.config.vocab_size), with_prompt_graphs(model, engine)
    assert isinstance(prompts, PromptGraphs)
    asked, answers = [(ids(count, count), 20) for count in (700, 3, 90, 1400, 260, 515)], list[list[list[int]]]()
    for reader in (prompts, PromptGraphs(model, LARGEST)):
        prefix = PrefixCache(model.caches, PrefixSettings(16, num_tails=4))
        runs = Engine(reader, engine, model.config.vocab_size, end_token_ids=(), decoder=decoder, prefix=prefix)
        runs.start()
        try:
            assert {len(one) for one in tokens_of(runs, [(ids(3000, 1), 50), *asked], num_aborted=1)} == {20}
            prefix.clear()
            answers.append([tokens_of(runs, [one])[0] for one in (*asked, *asked)])
            assert runs.load().num_captured == 0
        finally:
            runs.stop()
        assert prefix.faults() == []
        prefix.clear()
        assert model.caches.slots.num_free_slots == MAX_SEQS
        assert model.caches.slots.num_free_blocks == model.caches.slots.num_blocks
    assert prompts.num_replays > 2 * len(asked)
    assert answers[0] == answers[1]
