"""Steps of prompts in fixed shapes, on a CPU without graphs: logits as of ``forward``, and which steps have a shape."""

from collections.abc import Sequence

import pytest
import torch
from cpu.engine.served import VOCAB, Served
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.cache.fixed_chunks import ChunkShape
from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.snapshot import PassedSnapshot
from ownpath.cache.tables import StepTables
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.prefix import PrefixSettings
from ownpath.engine.prompt_graphs import PromptGraphs
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.plan.planner import Planner

FLOAT64_TOLERANCE = 1e-9
"""As of ``attention.test_chunks``."""
LENGTHS = (530, 141, 70)
STEPS = ((128, 1, 0), (172, 0, 0), (1, 127, 69), (100, 1, 1), (129, 12, 0))
"""Rows of each request: the first step fills its shape but for nothing, the others have padded rows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("prompts")
    random_checkpoint(folder, "full-nvfp4", seed=9, **THREE_LAYERS)
    engine = EngineConfig(dtype=torch.float64, max_model_len=600, max_num_seqs=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "no_chunks", "")
        return load_model(folder, engine)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Model, reader: Model | PromptGraphs, fill: int = 0) -> list[torch.Tensor]:
    """Each request's logits at every position, in the steps of ``STEPS``, from caches full of a byte."""
    for tensor in model.caches.tensors.values():
        tensor.view(torch.uint8).fill_(fill)
    caches, found = [model.new_cache() for _ in LENGTHS], [list[torch.Tensor]() for _ in LENGTHS]
    texts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    for counts in STEPS:
        rows = [(texts[r][caches[r].num_tokens :][:count], caches[r]) for r, count in enumerate(counts) if count]
        batch = ForwardBatch.of(rows, "cpu", all_logits=True)
        logits = reader.forward(batch)
        assert not batch.tables.flags_LT.any()
        parts = iter(logits.split([len(part) for part, _ in rows]))
        for of_request, count in zip(found, counts, strict=True):
            of_request += [next(parts)] if count else []
    for cache in caches:
        cache.release()
    return [torch.cat(parts) for parts in found]


def test_padded_steps_equal_forward(model: Model) -> None:
    """In caches of which everything is NaN that no row of a request has written."""
    graphs = PromptGraphs(model, 200, (128, 256))
    assert {shape.num_rows for shape in graphs.shapes} == {128, 200}
    expected = run(model, model)
    for one, other in zip(run(model, graphs, NAN_BYTE), expected, strict=True):
        assert (one - other).abs().max() < FLOAT64_TOLERANCE


def test_a_step_leaves_the_caches_of_others_alone(model: Model) -> None:
    """Bit for bit, but for nobody's slot and block."""
    graphs, pool = PromptGraphs(model, 256), model.caches
    other, own = model.new_cache(300), model.new_cache(300)
    model.forward(ForwardBatch.of([(ids(290, 5), other)], "cpu"))
    before = [view.view(torch.uint8).clone() for view in other.views()]
    graphs.forward(ForwardBatch.of([(ids(130, 6), own)], "cpu"))
    assert (own.num_tokens, other.num_tokens) == (130, 290)
    assert all(torch.equal(one, view.view(torch.uint8)) for one, view in zip(before, other.views(), strict=True))
    other.release()
    own.release()
    assert pool.slots.num_free_slots == pool.slots.num_slots


def test_the_module_of_drafts_reads_what_forward_reads(model: Model) -> None:
    graphs, caches = PromptGraphs(model, 256), [model.new_cache(300) for _ in range(2)]
    batches = [ForwardBatch.of([(ids(140, 7), cache)], "cpu") for cache in caches]
    found, expected = graphs.forward_drafting(batches[0]), model.forward_drafting(batches[1])
    pairs = [(part[0], part[1].streams_TSD, part[1].h_TD) for part in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        assert (one - other).abs().max() < FLOAT64_TOLERANCE
    for cache in caches:
        cache.release()


def tables_of(pool: CachePool, parts: Sequence[tuple[int, int]], passed: bool = False) -> StepTables:
    """Tables of a step of requests that have some tokens and bring others."""
    caches = list[SequenceCache]()
    for start, _ in parts:
        caches.append(pool.new_sequence(0))
        pool.slots.owned[caches[-1].slot] = (1,) * pool.blocks_per_sequence
        pool.slots.lengths[caches[-1].slot] = start
    taken = [PassedSnapshot(pool, caches[0].slot, 256)] if passed else []
    tables = StepTables.of(caches, [count for _, count in parts], taken)
    for cache in caches:
        pool.slots.owned[cache.slot] = ()
        cache.release()
    return tables


class Shapes:
    """The model as far as the choice of shapes goes: contexts of 100,000 tokens."""

    def __init__(self, model: Model) -> None:
        spec = model.cache_spec
        settings = {"max_tokens": 100_000, "max_sequences": 20, "cache_blocks": 2}
        self.caches = CachePool(type(spec)(**vars(spec) | settings))


def test_which_steps_have_a_shape(model: Model) -> None:
    graphs = PromptGraphs(Shapes(model), 8192)  # type: ignore[arg-type]  # nothing runs

    def shape(*parts: tuple[int, int], passed: bool = False) -> tuple[int, int] | None:
        found = graphs.shape_of(tables_of(graphs.caches, parts, passed))
        assert found is None or isinstance(found, ChunkShape)
        return None if found is None else (found.num_rows, found.num_blocks)

    assert shape((0, 2)) == (128, 32)
    assert shape((0, 512)) == (512, 32)
    assert shape((0, 513)) == (1024, 32)
    assert shape((0, 600), (9000, 1)) == (1024, 128)
    assert shape((8192 - 512, 512)) == (512, 32)
    assert shape((8192 - 511, 512)) == (512, 128)
    assert shape((90_000, 512)) == (512, 391)
    assert shape((0, 8192)) == (8192, 32)
    assert shape((0, 4096 + 1500)) == (6144, 32)
    assert shape((0, 4096 + 100)) is None, "padded rows would cost more than launches"
    assert shape((0, 8193)) is None
    assert shape((5, 1)) is None, "a decode step's kernels run it"
    assert shape((0, 300), passed=True) is None, "it takes a snapshot on its way"
    assert shape(*[(0, 20)] * 16) == (512, 32)
    assert shape(*[(0, 20)] * 17) is None


def test_an_engine_answers_as_without(model: Model) -> None:
    """Prompts together, one aborted in the middle, and sent again: hits. Nothing of them is left."""
    prompts, graphs = [ids(count, count) for count in (270, 40, 130)], PromptGraphs(model, 128)
    steps, answers = list[bool](), list[list[list[int]]]()

    def noted(tables: StepTables) -> ChunkShape | None:
        found = PromptGraphs.shape_of(graphs, tables)
        steps.append(found is not None)
        return found

    graphs.shape_of = noted  # type: ignore[method-assign]
    for reader in (graphs, model):
        decoder = Decoder(model, 4, VOCAB)
        with Served(reader, PrefixSettings(8, num_tails=2), 128, decoder=decoder) as served:
            assert served.prefix is not None
            served.prefix.cuts = True
            dropped = served.submit(ids(400, 1), 8)
            asked = [served.submit(prompt, 3) for prompt in prompts]
            asked[0].next()
            served.engine.abort(dropped.request)
            answers.append([one.tokens() for one in asked])
            answers.append([served.answer(prompt, 3)[0] for prompt in prompts])
    assert answers[:2] == answers[2:]
    assert any(steps)
