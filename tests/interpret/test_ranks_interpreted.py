"""A model of two virtual ranks with pushed exchanges, interpreted: the wiring from plan to kernels.

The interpreter runs one kernel at a time, so a rank's push and its wait are two launches here, and between them all
ranks meet.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

import ownpath.kernels.hyper.launch as hyper
from ownpath import loading
from ownpath.config import EngineConfig, Parallel
from ownpath.kernels.exchange.gather import PushedGather, start_gather
from ownpath.kernels.exchange.launch import PushedReduce, start_sum
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import Window, virtual_windows
from ownpath.kernels.registry import spec_of
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ops import OpKind
from ownpath.plan.plan import Plan
from ownpath.ranks.virtual import VirtualPeers, run_virtual

ENGINE = EngineConfig(dtype=torch.bfloat16, max_model_len=64, max_num_seqs=2, max_prefill_tokens=8)
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "compress_ratios": [0, 4],
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "hc_sinkhorn_iters": 2,  # interpreted, each takes long
}
ONE_AT_A_TIME = threading.RLock()
TOKENS = ([5, 6],)


def with_kernels(plan: Plan, exchanges: bool) -> Plan:
    """Returns the plan with the kernels of a GPU for boundaries, and for exchanges if they are wanted."""
    companions = []
    for one in plan.companions:
        kernel = one.choice.kernel
        if one.spec.kind is OpKind.HYPER:
            kernel = spec_of("triton.hyper_boundary")
        elif one.spec.kind is OpKind.REDUCE and exchanges:
            kernel = spec_of("triton.reduce")
        elif one.spec.kind is OpKind.GATHER and exchanges:
            kernel = spec_of("triton.gather")
        companions.append(replace(one, choice=replace(one.choice, kernel=kernel)))
    return replace(plan, companions=tuple(companions))


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take turns with the interpreter."""
    inner = hyper.launch

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with ONE_AT_A_TIME:
            return inner(*args, **kwargs)

    monkeypatch.setattr(hyper, "launch", guarded)


def meet_between(monkeypatch: pytest.MonkeyPatch, barrier: threading.Barrier) -> None:
    """Splits exchanges in two, and has ranks meet behind each push."""

    def reduce(kernel: object, x: torch.Tensor, operand: Any, other: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty_like(x)
        for pushes in (True, False):
            with ONE_AT_A_TIME:
                start_sum(operand.window, x, other, out, pushes=pushes, sums=not pushes)
            barrier.wait(60)
        return out

    def gather(kernel: object, x: torch.Tensor, operand: Any, *, dim: int, out: torch.Tensor) -> torch.Tensor:
        for pushes in (True, False):
            with ONE_AT_A_TIME:
                start_gather(operand.window, x, out, by_columns=dim != 0, pushes=pushes, takes=not pushes)
            barrier.wait(60)
        return out

    monkeypatch.setattr(PushedReduce, "run", reduce)
    monkeypatch.setattr(PushedGather, "run", gather)


def logits_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> tuple[list[list[torch.Tensor]], list[Model]]:
    """Runs a prompt on each rank, and returns the logits of its last two rows."""
    plan_of, windows = loading.planned, dict[int, Window]()
    made = threading.Lock()

    def planned(*args: Any) -> Any:
        plan, index = plan_of(*args)
        return with_kernels(plan, exchanges), index

    def work(peers: VirtualPeers) -> tuple[list[torch.Tensor], Model]:
        def open_window(layout: WindowLayout) -> Window:
            with made:
                if not windows:
                    small = replace(layout, num_programs=1)
                    windows.update(enumerate(virtual_windows(small, torch.device("cpu"))))
            return windows[peers.rank]

        engine = replace(ENGINE, parallel=Parallel(peers.rank, 2))
        model = load_model(folder, engine, peers=peers, open_window=open_window)
        cache, found = model.new_cache(), []
        for token_ids in TOKENS:
            batch = ForwardBatch.of([(token_ids, cache)], "cpu", all_logits=True)
            found.append(model.forward(replace(batch, logits_ids=batch.logits_ids[-2:])))
        return found, model

    with monkeypatch.context() as patched:
        patched.setattr(loading, "planned", planned)
        if exchanges:
            meet_between(patched, threading.Barrier(2))
        results = run_virtual(2, work)
    assert bool(windows) is exchanges
    return [logits for logits, _ in results], [model for _, model in results]


def test_pushed_exchanges_give_the_bits_of_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's sums, and the logits' columns."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=5, **SIZES)
    (first, second), (model, _) = logits_of(tmp_path, monkeypatch, exchanges=True)
    (wanted, _), _ = logits_of(tmp_path, monkeypatch, exchanges=False)
    for one, other, reference in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, reference)
    assert model.window is not None
    assert model.window.lost() is None
    slots = [model.window.order.slot_of(epoch) for epoch in range(1, 1 + model.window.order.count)]
    layers = [f"layers.{layer}.{what}.reduce" for layer in range(2) for what in ("attn", "ffn")]
    assert slots == [*layers, "head.gather"]
