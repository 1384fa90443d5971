"""Several ranks compute what one does: of every layer type, in float64, where only the order of sums differs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig, Parallel
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.plan.sharding import ShardingError
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.splits import AttentionSplit, ExpertSplit

TOLERANCE = 1e-9
"""2^-52 grown through 3 layers of sums of some thousand terms, with a margin of 1e3; routers choose alike."""
SIZES = {
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 64,
    "o_groups": 8,
    "o_lora_rank": 16,
    "moe_intermediate_size": 128,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "index_head_dim": 16,
    "index_topk": 8,
}
"""V4's heads and groups at small widths. A part of F is a block of 16 with 8 ranks."""
LENGTHS = (135, 7, 40)
"""The first is past the window, past an HCA block and past the indexer's top-k."""
ENGINE = EngineConfig(dtype=torch.float64, max_model_len=256, max_num_seqs=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    random_checkpoint(folder, "full-nvfp4", seed=3, draft="bf16", **SIZES)
    return folder


@lru_cache
def requests(vocab: int = 96) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(9)
    return tuple(tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()) for n in LENGTHS)


def read(model: Model, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of all rows of each prompt: a long chunk, then one row each twice, which are decode steps."""
    caches = [model.new_cache() for _ in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for cut in (slice(None, -2), slice(-2, -1), slice(-1, None)):
        chunks = [prompt[cut] for prompt in prompts]
        batch = ForwardBatch.of(list(zip(chunks, caches, strict=True)), "cpu", all_logits=True)
        for part, logits in zip(parts, model.forward(batch).split([len(chunk) for chunk in chunks]), strict=True):
            part.append(logits)
    return [torch.cat(part) for part in parts]


def own_prompts(size: int) -> list[tuple[int, ...]]:
    """A prompt for each rank; the last is long."""
    long, count = requests()[0], size - 1
    return [*(long[rank : 2 * rank + 5] for rank in range(count)), long]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Model:
    return load_model(folder, ENGINE)


@pytest.fixture(scope="module")
def alone(whole: Model) -> list[torch.Tensor]:
    return read(whole, requests())


def of_ranks(folder: Path, size: int, **splits: Any) -> list[list[torch.Tensor]]:
    """Every rank's logits, where each rank reads all prompts."""

    def work(peers: VirtualPeers) -> list[torch.Tensor]:
        engine = replace(ENGINE, parallel=Parallel(peers.rank, size, **splits))
        return read(load_model(folder, engine, peers=peers), requests())

    return run_virtual(size, work)


@pytest.mark.parametrize(("size", "experts"), [(2, ExpertSplit.IDS), *((n, ExpertSplit.WIDTH) for n in (2, 4, 8))])
def test_heads_divided_equal_one_rank(size: int, experts: ExpertSplit, folder: Path, alone: list[torch.Tensor]) -> None:
    ranks = of_ranks(folder, size, experts=experts)
    for rank in ranks:
        for found, first, wanted in zip(rank, ranks[0], alone, strict=True):
            assert torch.equal(found, first), "not the same bits on all ranks"
            assert (found - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("size", "experts"), [(2, ExpertSplit.WIDTH), *((n, ExpertSplit.IDS) for n in (2, 4, 8))])
def test_tokens_divided_equal_one_rank(size: int, experts: ExpertSplit, folder: Path, whole: Model) -> None:
    """Each rank reads a prompt of its own; while the others' are short, and decode, the last one's is long."""
    prompts = own_prompts(size)
    wanted = [read(whole, [prompt])[0] for prompt in prompts]

    def work(peers: VirtualPeers) -> torch.Tensor:
        parallel = Parallel(peers.rank, size, AttentionSplit.DATA, experts)
        model = load_model(folder, replace(ENGINE, parallel=parallel), peers=peers)
        return read(model, [prompts[peers.rank]])[0]

    for found, one in zip(run_virtual(size, work), wanted, strict=True):
        assert (found - one).abs().max() <= TOLERANCE


def test_the_embedded_model_runs_on_two_ranks_and_refuses_four() -> None:
    folder = default_model_dir()
    prompt = requests(2000)[2]

    def work(peers: VirtualPeers) -> torch.Tensor:
        engine = EngineConfig(dtype=torch.float64, max_model_len=256, parallel=Parallel(peers.rank, 2))
        return read(load_model(folder, engine, peers=peers), [prompt])[0]

    engine = EngineConfig(dtype=torch.float64, max_model_len=256)
    wanted = read(load_model(folder, engine), [prompt])[0]
    first, second = run_virtual(2, work)
    assert torch.equal(first, second)
    assert (first - wanted).abs().max() <= TOLERANCE
    words = r"layers.0.attn.wo_a: 256 rows do not divide into 4 ranks of whole 128s"

    def refuse(peers: VirtualPeers) -> Model:
        return load_model(folder, replace(engine, parallel=Parallel(peers.rank, 4)), peers=peers)

    with pytest.raises(ShardingError, match=words):
        run_virtual(4, refuse)


def test_a_draft_layer_is_divided_as_the_backbone(folder: Path) -> None:
    def work(peers: VirtualPeers | None) -> torch.Tensor:
        parallel = Parallel() if peers is None else Parallel(peers.rank, 4)
        model = load_model(folder, replace(ENGINE, loads_draft=True, parallel=parallel), peers=peers)
        ids = list(requests()[2])
        batch = ForwardBatch.of([(ids[:-1], model.new_cache())], "cpu", all_logits=True)
        hidden = model.drafts[0].hidden(model.hidden(batch), torch.tensor(ids[1:]), batch)
        return model.logits(hidden, batch.logits_ids)

    wanted = work(None)
    for found in run_virtual(4, work):
        assert (found - wanted).abs().max() <= TOLERANCE


def test_ranks_call_each_exchange_as_often_as_the_plan_names(folder: Path) -> None:
    """The ledger counts exchanges under the plan's names, on every rank alike."""

    def work(peers: VirtualPeers) -> dict[str, int]:
        model = load_model(folder, replace(ENGINE, parallel=Parallel(peers.rank, 2)), peers=peers)
        read(model, requests()[1:2])
        return {slot: count for slot, count in model.ledger.calls.items() if slot.endswith((".reduce", ".gather"))}

    first, second = run_virtual(2, work)
    assert first == second
    assert first == {f"layers.{n}.{part}.reduce": 3 for n in range(3) for part in ("attn", "ffn")} | {"head.gather": 3}
