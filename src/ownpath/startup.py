"""Compiles everything before the first request on CUDA, so that no step waits for a compiler.

It compiles the kernels that the cache on disk lacks. Then it runs a few steps on scratch caches, with the numbers of
tokens at which kernels change their tiles: this compiles what is compiled at its first call, and lets the libraries
choose kernels and allocate memory. Progress is one line on a terminal; where stderr is no terminal, nothing is printed.
"""

import sys
import time
from collections.abc import Iterable

import torch

from ownpath.config import EngineConfig
from ownpath.kernels.dsl.cache import compile_missing
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.runners import Runner
from ownpath.runners.make import compile_configs

WARM_UP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def compile_kernels(runners: Iterable[Runner]) -> int:
    """Compiles the kernels that the runners may launch and the cache on disk lacks; returns their number.

    Errors: CompileError naming the compiler.
    """
    show = CountingBar("compiling kernels")
    count = compile_missing(compile_configs(runners), show)
    show.end()
    return count


def warm_up(model: Model, engine: EngineConfig) -> None:
    """Runs a step of each of ``warm_up_sizes``, so that no later step compiles anything; then clears the ledger."""
    show = CountingBar("warming up")
    sizes = warm_up_sizes(engine)
    for done, num_tokens in enumerate(sizes, start=1):
        _step(model, engine, num_tokens)
        show(done, len(sizes), f"{num_tokens} tokens")
    if torch.device(engine.device).type == "cuda":
        torch.cuda.synchronize()
    model.ledger.clear()
    show.end()


def warm_up_sizes(engine: EngineConfig) -> list[int]:
    """Returns the numbers of tokens to run: powers of two up to the largest step, and the largest step."""
    largest = min(engine.max_prefill_tokens + engine.max_num_seqs, engine.max_model_len)
    return sorted({size for size in WARM_UP_TOKENS if size < largest} | {largest})


def _step(model: Model, engine: EngineConfig, num_tokens: int) -> None:
    token_ids = [idx % model.config.vocab_size for idx in range(num_tokens)]
    model.forward(ForwardBatch.of([(token_ids, model.new_cache())], engine.device))


class _TerminalLine:
    """A line on stderr that is rewritten in place; prints nothing where stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._start = time.perf_counter()
        self._is_shown = False

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _show(self, done: int, total: int, text: str) -> None:
        if not sys.stderr.isatty():
            return
        self._is_shown = True
        bar = "#" * (24 * done // total)
        print(f"\r{self.title} [{bar:24}] {text}\x1b[K", end="", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """Moves to the next line, if anything was shown."""
        if self._is_shown:
            print(file=sys.stderr)
        self._is_shown = False


class CountingBar(_TerminalLine):
    """Shows a count of finished items, their total and the elapsed seconds."""

    def __call__(self, done: int, total: int, name: str) -> None:
        """Shows that ``done`` of ``total`` items are ready, the last of them ``name``."""
        self._show(done, total, f"{done}/{total} {self._seconds():5.1f} s  {name:.48}")


class LoadingBar(_TerminalLine):
    """Shows bytes loaded, their total, the average rate and the time left; ends its line when all are loaded."""

    def __init__(self) -> None:
        super().__init__("loading")
        self._is_open = True

    def __call__(self, num_bytes: int, total_bytes: int) -> None:
        """Shows that ``num_bytes`` of ``total_bytes`` are loaded. The clock starts at the call with 0."""
        if num_bytes == 0:
            self._start = time.perf_counter()
        if not self._is_open:
            return
        bytes_per_s = num_bytes / max(self._seconds(), 1e-9)
        left = f"{(total_bytes - num_bytes) / bytes_per_s:.0f} s left" if num_bytes else "..."
        amounts = f"{num_bytes / 1e9:.1f}/{total_bytes / 1e9:.1f} GB  {bytes_per_s / 1e9:.2f} GB/s"
        self._show(num_bytes, total_bytes, f"{amounts}  {left}")
        self._is_open = num_bytes < total_bytes
        if not self._is_open:
            self.end()
