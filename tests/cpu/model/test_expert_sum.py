"""Routed and shared experts are added by the boundary behind them, with the bits of a sum that is stored."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.model.moe import MoE


def hidden_and_logits(model: Model) -> list[torch.Tensor]:
    """Of a prompt, of two decode steps behind it, and of the draft's module at each."""
    cache, found = model.new_cache(), []
    for token_ids in ([5, 6, 7, 8, 9, 10], [11], [12]):
        batch = ForwardBatch.of([(token_ids, cache)], torch.device("cpu"))
        hidden = model.hidden(batch)
        drafted = model.drafts[0].hidden(hidden, batch.token_ids_T + 1, batch)
        found += [hidden.streams_TSD, hidden.h_TD, model.logits(hidden, batch.logits_ids), drafted.h_TD]
    cache = model.new_cache()
    return [*found, model.forward(ForwardBatch.of([([1, 2, 3], cache)], torch.device("cpu")))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_bit_is_other(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path, "bf16", draft="bf16")
    model = load_model(tmp_path, EngineConfig(dtype=dtype, max_model_len=64, loads_draft=True))
    apart = hidden_and_logits(model)
    run, sums = MoE.__call__, list[bool]()

    def added(*args: object) -> tuple[torch.Tensor, None]:
        routed_TD, shared_TD = run(*args)  # type: ignore[arg-type]
        sums.append(bool(shared_TD.any()))
        return routed_TD + shared_TD, None

    monkeypatch.setattr(MoE, "__call__", added)
    together = hidden_and_logits(model)
    assert sums
    assert all(sums)
    assert all(torch.equal(one, two) for one, two in zip(apart, together, strict=True))
