"""Before the first request: what is compiled, in which sizes steps are tried, and what people see of it."""

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath import startup
from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.runners import ConcatLinear, PlainLinear, WideLinear
from ownpath.runners.make import compile_configs
from ownpath.runners.runner import KernelRunner
from ownpath.startup import CountingBar, LoadingBar, compile_kernels, warm_up, warm_up_sizes


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_missing_is_compiled_under_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_missing(configs: list[Config], progress: CountingBar) -> int:
        for done, config in enumerate(configs, start=1):
            progress(done, len(configs), config.name)
        return len(configs)

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(startup, "compile_missing", compile_missing)
    assert compile_kernels([Runner("first", "second")]) == 2
    shown = terminal.getvalue()
    assert shown.count("\r") == 2
    assert "compiling kernels [############            ] 1/2" in shown
    assert "compiling kernels [########################] 2/2" in shown
    assert shown.endswith("second\x1b[K\n")


def test_loading_shows_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB of 20 in 4 s: 2 GB/s, 6 s for the other 12."""
    terminal, clock = Terminal(), iter([0.0, 100.0, 100.0, 104.0, 110.0])
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(clock))
    bar = LoadingBar()
    for num_bytes in (0, 8 * 10**9, 20 * 10**9, 20 * 10**9):
        bar(num_bytes, 20 * 10**9)
    bar.end()
    started, midway, done = terminal.getvalue().removeprefix("\r").split("\r")
    assert started == "loading [                        ] 0.0/20.0 GB  0.00 GB/s  ...\x1b[K"
    assert midway == "loading [#########               ] 8.0/20.0 GB  2.00 GB/s  6 s left\x1b[K"
    assert done == "loading [########################] 20.0/20.0 GB  2.00 GB/s  0 s left\x1b[K\n"


def test_a_terminal_sees_the_embedded_model_load(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = LoadingBar()
    load_model(default_model_dir(), EngineConfig(max_model_len=16), bar)
    assert terminal.getvalue().startswith("\rloading [                        ] 0.0/")
    assert terminal.getvalue().endswith(" 0 s left\x1b[K\n")


def test_nothing_is_printed_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = CountingBar("compiling kernels")
    progress(1, 1, "kernel")
    progress.end()
    bar = LoadingBar()
    bar(0, 1)
    bar(1, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("max_prefill_tokens", "max_model_len", "expected"),
    [(512, 4096, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 528]), (512, 100, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_steps_are_tried_up_to_the_largest(max_prefill_tokens: int, max_model_len: int, expected: list[int]) -> None:
    engine = EngineConfig(max_prefill_tokens=max_prefill_tokens, max_num_seqs=16, max_model_len=max_model_len)
    assert warm_up_sizes(engine) == expected


def test_a_warm_up_leaves_no_trace_in_the_ledger(tmp_path: Path, device: torch.device) -> None:
    random_checkpoint(tmp_path)
    engine = EngineConfig.for_device(str(device), 40)
    model = load_model(tmp_path, engine)
    warm_up(model, engine)
    assert not model.ledger.calls
