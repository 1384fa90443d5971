"""Our own side of a comparison: what is no number is told, not compared."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.diff.local_model import LocalModel
from ownpath.diff.responses import SequenceReading
from ownpath.loading import load_model

NUM_IDS = 230
"""More entries than the indexer selects."""


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            lambda model: model.blocks[1].attn.core.runner.layer.index_compressor.ape,
            "indexer gives scores that are not",
        ),
        (lambda model: model.embed_VD, "gives logits that are not finite"),
    ],
    ids=["index keys", "embedding"],
)
def test_numbers_that_are_not_finite_are_told(
    part: Callable[[Any], torch.Tensor], message: str, tmp_path: Path
) -> None:
    """A NaN index key leaves the logits finite."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=5)
    model = load_model(tmp_path, EngineConfig(max_model_len=NUM_IDS))
    local = LocalModel(model, SimpleNamespace(num_tokens=96))  # type: ignore[arg-type]
    reading = SequenceReading(tuple(n % 90 for n in range(NUM_IDS)), NUM_IDS - 1, ())
    assert local.logprobs(reading).isfinite().all()
    with torch.inference_mode():
        part(model).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"our own model.*{message}"):
        local.logprobs(reading)
