"""Before the first request: what is compiled, in which sizes steps are tried, and what people see of it."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from support.checkpoints import random_checkpoint
from support.terminals import Terminal

from ownpath import startup
from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.config import EngineConfig
from ownpath.kernels.dsl import cache
from ownpath.kernels.dsl.compilations import COMPILATIONS, Compilations
from ownpath.kernels.scores.types import CSA_PAGES
from ownpath.kernels.select.launch import plan_tree
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.runners import ConcatLinear, PlainLinear, WideLinear
from ownpath.runners.make import compile_configs
from ownpath.runners.runner import KernelRunner
from ownpath.startup import compile_kernels, warm_up, warm_up_contexts, warm_up_sizes
from ownpath.terminal.progress import Progress


@dataclass(frozen=True)
class Config:
    name: str


class Runner(KernelRunner):
    """A runner whose kernel comes in several compiled variants."""

    in_features = out_features = 8

    def __init__(self, *names: str) -> None:
        self.names = names

    def compile_configs(self) -> list[Config]:
        return [Config(name) for name in self.names]

    def variant(self, *args: object) -> None: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_every_variant_is_asked_for_once() -> None:
    plain = PlainLinear(torch.zeros(8, 8))
    runners = [Runner("a", "b"), WideLinear(Runner("c")), ConcatLinear([Runner("b"), WideLinear(Runner("d"))]), plain]
    assert [config.name for config in compile_configs(runners)] == ["a", "b", "c", "d"]


def test_what_is_missing_is_compiled_under_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_missing(configs: list[Config], progress: Progress) -> int:
        for done, config in enumerate(configs, start=1):
            progress(done, len(configs), config.name)
        return len(configs)

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(startup, "compile_missing", compile_missing)
    assert compile_kernels([Runner("first", "second")]) == 2
    assert re.search(r"compiling kernels .* 2 of 2  second", terminal.getvalue())


def test_a_terminal_sees_the_embedded_model_load(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("loading", in_bytes=True) as progress:
        load_model(default_model_dir(), EngineConfig(max_model_len=16), progress)
    assert re.search(r"loading .* 14\.\d MB of 14\.\d MB", terminal.getvalue())


@pytest.mark.parametrize(
    ("max_prefill_tokens", "max_model_len", "expected"),
    [(512, 4096, [1, 2, 4, 8, 16, 32, 64, 128, 512, 528]), (512, 100, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_steps_are_tried_up_to_the_largest(max_prefill_tokens: int, max_model_len: int, expected: list[int]) -> None:
    engine = EngineConfig(max_prefill_tokens=max_prefill_tokens, max_num_seqs=16, max_model_len=max_model_len)
    assert warm_up_sizes(engine) == expected


@pytest.mark.parametrize(
    ("most", "ends"), [(200, []), (256, []), (300, [300]), (512, [512]), (2176, [512, 1024, 2048, 2176])]
)
def test_a_step_is_tried_in_contexts_of_every_form(most: int, ends: list[int]) -> None:
    """By the definition of the forms: every number of blocks has the tree of a context that was tried, or of one
    block."""
    assert warm_up_contexts(most) == [end - 2 for end in ends]
    tried = {plan_tree(-(-end // BLOCK_TOKENS) * CSA_PAGES.per_block, 512).size for end in (1, *ends)}
    for num_blocks in range(1, -(-most // BLOCK_TOKENS) + 1):
        assert plan_tree(num_blocks * CSA_PAGES.per_block, 512).size in tried


def test_what_is_compiled_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and Triton's; the hook of somebody else stays."""
    counter = Compilations()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    counter.watch_triton()
    hook = triton.knobs.runtime.jit_post_compile_hook
    assert hook is not None
    hook(key="k", repr="r", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert counter.count == 1
    Compilations().watch_triton()
    assert triton.knobs.runtime.jit_post_compile_hook == hook
    before = COMPILATIONS.count
    monkeypatch.setattr(cache, "is_cached", lambda config: False)
    monkeypatch.setattr(cache, "require_own", lambda folder: None)
    monkeypatch.setattr(cache, "_compile", lambda queue, count: queue.clear() or "")
    cache.compile_missing([Config("a"), Config("b")])  # type: ignore[list-item]
    assert COMPILATIONS.count == before + 2


def test_a_warm_up_scores_prompts_of_every_form_too(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last boundary and the head have forms of their own rows, which are one unless a prompt is scored."""
    random_checkpoint(tmp_path)
    engine = EngineConfig.for_device(str(device), 300)
    model, forward = load_model(tmp_path, engine), Model.forward
    sizes: dict[int, int] = {}

    def noted(model: Model, batch: ForwardBatch) -> torch.Tensor:
        sizes[len(batch.token_ids_T)] = len(batch.logits_ids)
        return forward(model, batch)

    monkeypatch.setattr(Model, "forward", noted)
    warm_up(model, engine)
    largest = max(sizes)
    assert largest > 257
    assert sizes == {size: size for size in (1, 2, 4, 8, 16, 32, 64, 128)} | {largest: 257}


def test_a_warm_up_leaves_no_trace_in_the_ledger(tmp_path: Path, device: torch.device) -> None:
    random_checkpoint(tmp_path)
    engine = EngineConfig.for_device(str(device), 40)
    model = load_model(tmp_path, engine)
    warm_up(model, engine)
    assert not model.ledger.calls
