"""The prefix cache with V4: greedy answers of random models, which a wrong key changes at once or soon after.

test_prefix_cache has every other case, with a model that costs nothing; ``tools/prefix_sweep.py`` runs this one over
every length of a range.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.engine.served import Served
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.engine.prefix import PrefixSettings
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.model import Model

LAYERS = {"num_hidden_layers": 2, "compress_ratios": [4, 128]}
WIDE = LAYERS | {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""Sizes for which caches have pages."""
BASE, PLACES = [n * n % 89 for n in range(800)], PrefixSettings(8)


def loaded(folder: Path, sizes: dict[str, Any], **engine: Any) -> Model:
    random_checkpoint(folder, "full-nvfp4", seed=21, **sizes)
    return load_model(folder, EngineConfig(max_model_len=1024, max_num_seqs=3, **engine))


def cold(model: Model, *prompts: Sequence[int], num_tokens: int = 4) -> list[list[int]]:
    """Answers of an engine without a prefix cache."""
    with Served(model, None) as served:
        return [served.answer(ids, num_tokens)[0] for ids in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hit_gives_the_tokens_of_a_cold_run(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same prompt, one that parts from it, and the conversation that goes on."""
    model = loaded(tmp_path, LAYERS, dtype=dtype)
    first = cold(model, BASE[:507], num_tokens=8)[0]
    prompts = [BASE[:507], [*BASE[:259], 7], [*BASE[:507], *first, 9]]
    expected = cold(model, *prompts)
    with Served(model, PLACES) as served:
        assert served.answer(BASE[:507], 8) == (first, 0)
        assert [served.answer(ids) for ids in prompts] == list(zip(expected, (256, 256, 512), strict=True))


@pytest.mark.parametrize("cache_format", [CacheFormat.FP8, CacheFormat.FP4_INDEX])
def test_pages_give_the_tokens_of_a_cold_run(cache_format: CacheFormat, tmp_path: Path) -> None:
    """Keys are rounded when they are written, so a hit reads the same bytes."""
    model = loaded(tmp_path, WIDE, cache_format=cache_format, rows_per_request=2)
    prompts = [BASE[:259], [*BASE[:258], 7]]
    expected = cold(model, *prompts)
    with Served(model, PLACES) as served:
        served.answer(prompts[0])
        assert [served.answer(ids) for ids in prompts] == [(tokens, 256) for tokens in expected]


@pytest.mark.parametrize(
    ("sizes", "engine"),
    [(LAYERS, {"dtype": torch.float64}), (WIDE, {"cache_format": CacheFormat.FP8, "rows_per_request": 2})],
    ids=["float64", "fp8"],
)
def test_tails_give_the_tokens_of_a_cold_run(sizes: dict[str, Any], engine: dict[str, Any], tmp_path: Path) -> None:
    """The same prompt, another last token, and the conversation that goes on; cut before the last token or not, by
    ``forward`` or a decoder."""
    model = loaded(tmp_path, sizes, **engine)
    prompts = [BASE[:100], [*BASE[:99], 7], [*BASE[:100], 9, 8], BASE[:299]]
    expected = cold(model, *prompts)
    for cuts, decodes in ((False, False), (True, True)):
        with Served(model, PrefixSettings(8, num_tails=4), decodes=decodes) as served:
            assert served.prefix is not None
            served.prefix.cuts = cuts
            found = [served.answer(ids) for ids in (*prompts, prompts[-1])]
        assert found == list(zip((*expected, expected[-1]), (0, 99, 99, 99, 298), strict=True))


def test_a_decoder_takes_snapshots_between_its_steps(tmp_path: Path) -> None:
    """Rows on the device: the copy is launched between the step that fills a block and the next one's."""
    model = loaded(tmp_path, LAYERS)
    first = cold(model, BASE[:250], num_tokens=12)[0]
    later = [*BASE[:250], *first, 3]
    second = cold(model, later)[0]
    with Served(model, PLACES, decodes=True) as served:
        assert served.answer(BASE[:250], 12) == (first, 0)
        assert served.answer(later) == (second, 256)
