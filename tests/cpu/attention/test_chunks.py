"""Steps with chunks on their line of kernels, here the twins, against the reference: one request or several, in chunks
of any size, beside rows that decode."""

from collections.abc import Sequence

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.attention.interface import ChunkStep, DecodeStep
from ownpath.cache import chunks
from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.official import Step
from ownpath.plan.planner import Planner

FLOAT64_TOLERANCE = 1e-9
"""As in ``test_incremental``: 2^-52 grown through 5 layers of sums of some 500 terms, with a margin of 1e3."""
LENGTHS = (530, 141, 70)
STEPS = ((300, 1, 0), (1, 127, 69), (100, 1, 1), (129, 12, 0))
"""Rows of each request in each step: chunks past the window and the ends of blocks, beside single rows and none."""


def load(folder: object, **settings: object) -> Model:
    engine = EngineConfig(dtype=torch.float64, max_model_len=600, max_num_seqs=4, **settings)  # type: ignore[arg-type]
    return load_model(folder, engine)  # type: ignore[arg-type]


class Models:
    """The same checkpoint on the reference, and with its chunks on the line."""

    def __init__(self, folder: object, **settings: object) -> None:
        self.reference = load(folder, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Planner, "no_chunks", "")
            self.line = load(folder, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    made = tmp_path_factory.mktemp("chunks")
    random_checkpoint(made, "full-nvfp4", seed=9)
    return made


@pytest.fixture(scope="module")
def models(folder: object) -> Models:
    return Models(folder)


@pytest.fixture(scope="module")
def found(models: Models) -> list[torch.Tensor]:
    """Logits of the line, in the steps of ``STEPS``."""
    return run(models.line, STEPS)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Model, steps: Sequence[Sequence[int]], fill: int = 0) -> list[torch.Tensor]:
    """Each request's logits at every position, in steps of these rows, from caches full of a byte."""
    pool = CachePool(model.cache_spec)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(fill)
    caches, found = [pool.new_sequence() for _ in LENGTHS], [[] for _ in LENGTHS]  # type: ignore[var-annotated]
    texts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    for counts in steps:
        rows = [(texts[r][caches[r].num_tokens :][:count], caches[r]) for r, count in enumerate(counts) if count]
        logits = model.forward(ForwardBatch.of(rows, pool.spec.device, all_logits=True))
        for r, part in zip((r for r, count in enumerate(counts) if count), logits.split([len(i) for i, _ in rows]),
                           strict=True):  # fmt: skip
            found[r].append(part)
    return [torch.cat(parts) for parts in found]


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < FLOAT64_TOLERANCE


def test_the_line_is_planned_and_prepared(models: Models) -> None:
    cache = models.line.new_cache()
    step = models.line.blocks[0].prepare(ForwardBatch.of([([1, 2], cache)], torch.device("cpu")).tables)
    assert isinstance(step, ChunkStep)
    one = models.line.blocks[0].prepare(ForwardBatch.of([([1], cache)], torch.device("cpu")).tables)
    assert isinstance(one, DecodeStep)


def test_the_line_equals_the_reference(models: Models, found: list[torch.Tensor]) -> None:
    assert_close(found, run(models.reference, STEPS))


def test_other_memory_and_pieces_of_scores_change_no_bit(
    models: Models, found: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches full of NaN but for what rows own; and scores of 48 rows at a time."""
    monkeypatch.setattr(chunks, "SCORE_BYTES", 4 * 192 * 48)
    for one, other in zip(run(models.line, STEPS, NAN_BYTE), found, strict=True):
        assert torch.equal(one, other)


def test_chunks_of_any_size_are_one_text(models: Models, found: list[torch.Tensor]) -> None:
    for sizes in ([LENGTHS], [(1, 1, 1), (2, 100, 3), *[(127, 8, 8)] * 4, (19, 8, 34)]):
        assert_close(run(models.line, sizes), found)


def test_the_line_reads_pages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys in FP8, index keys in FP4; K12's test has both in FP8."""
    folder = tmp_path_factory.mktemp("pages")
    random_checkpoint(folder, "full-nvfp4", seed=9, head_dim=512, qk_rope_head_dim=64, index_head_dim=128)
    models = Models(folder, cache_format=CacheFormat.FP4_INDEX)
    steps = (130, 1, 0), (1, 7, 5)
    assert_close(run(models.line, steps), run(models.reference, steps))


def test_official_numerics_of_attention_have_the_line_too(folder: object) -> None:
    official = frozenset({Step.KV, Step.INDEXER, Step.Q_HEAD_NORM})
    models = Models(folder, official=official)
    assert_close(run(models.line, STEPS[:2]), run(models.reference, STEPS[:2]))
