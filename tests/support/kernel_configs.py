"""The compiled kernels that a device test launches, read from its tables, so that all are compiled before it runs.

A test module names them in a function ``kernel_configs()``. Before the first test of a run on Hopper those of every
collected module are compiled, one process per core; inside tests each would wait for a process of its own, which takes
longer to start than to compile. What is compiled inside a test all the same is listed at the end of the run.
"""

import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.conformance.quant_weights import draw_weights
from ownpath.kernels.dsl.cache import CompileError, Config, cache_dir, compile_missing
from ownpath.kernels.fp8 import linear as fp8_linear
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.fp8.choose import WeightKey, quantize_configs, w8a8_config, w8a16_config
from ownpath.kernels.fp8.launch import weight_key
from ownpath.kernels.fp8.layout import PackedFp8, pack_fp8
from ownpath.kernels.nvfp4.choose import choose_linear, choose_moe
from ownpath.kernels.nvfp4.config import CombineConfig, PermuteConfig
from ownpath.kernels.nvfp4.launch import align_config
from ownpath.kernels.nvfp4.moe_sliced import sliced_configs
from ownpath.plan.plan import Plan
from ownpath.verify.launch_configs import configs_of
from support.hopper_layouts import subject_on

HOPPER = (9, 0)
SHOW_EVERY_S = 2.0


def linear_configs(shape: tuple[int, int], counts: Iterable[int], is_invariant: bool = False) -> Iterator[Config]:
    """Of ``Nvfp4Linear`` with a weight [rows, columns] and these numbers of tokens."""
    for count in counts:
        yield choose_linear(count, *shape, is_invariant).gemm


def moe_configs(
    dims: tuple[int, int, int],
    pairs: Iterable[int],
    *,
    is_invariant: bool = False,
    num_shared: int = 0,
    wide_ids: bool = False,
    mapped: bool = False,
) -> Iterator[Config]:
    """Of ``Nvfp4MoE``. dims: experts held (or ids of an expert map), hidden, width. pairs: numbers of
    (token, slot) pairs, shared slots too."""
    for count in pairs:
        choice = choose_moe(count, *dims, is_invariant)
        if choice.sliced:
            yield from sliced_configs(choice.sliced, wide_ids, mapped, num_shared)
            continue
        yield align_config(wide_ids, mapped, num_shared, count)
        yield choice.gate_up
        yield choice.down
        yield CombineConfig(num_shared, choice.is_wide)
        if not choice.gate_up.gather:
            yield PermuteConfig()


def w8a16_configs(case: Fp8Case, counts: Iterable[int], is_invariant: bool = False) -> Iterator[Config]:
    """Of the FP8 linear for few rows."""
    for count in counts:
        yield w8a16_config(count, _weight_key(case), fp8_linear.num_sms(0), is_invariant)


def w8a8_configs(case: Fp8Case, counts: Iterable[int]) -> Iterator[Config]:
    """Of the FP8 linear for many rows."""
    yield from quantize_configs(packed(case).power_of_two)
    for count in counts:
        yield w8a8_config(count, _weight_key(case), fp8_linear.num_sms(0))


def fp8_configs(case: Fp8Case, counts: Iterable[int]) -> Iterator[Config]:
    """Of ``Fp8Linear``, which takes either kernel."""
    for count in counts:
        is_few = count < (fp8_linear.fp8_linear.prefill_from or count + 1)
        yield from w8a16_configs(case, [count]) if is_few else w8a8_configs(case, [count])


@lru_cache(maxsize=32)
def packed(case: Fp8Case) -> PackedFp8:
    """A weight of the case; all of its weights have the same kernels."""
    return pack_fp8(*draw_weights(case, 0, torch.device("cpu")))


def _weight_key(case: Fp8Case) -> WeightKey:
    return weight_key(packed(case))


def model_configs(folder: Path, **demands: object) -> Iterator[Config]:
    """Of a checkpoint's model on Hopper. demands: fields of ``EngineConfig``."""
    subject = subject_on(folder, "sm_90", **demands)
    yield from plan_configs(subject.plan, subject.index)


def plan_configs(plan: Plan, index: CheckpointIndex) -> Iterator[Config]:
    """Of a plan's products."""
    for configs in configs_of(plan, index).values():
        yield from configs


def declared(modules: Iterable[ModuleType]) -> dict[str, Config]:
    """Returns the kernels that the modules may launch, by name. Errors: UsageError naming a module without a table."""
    found: dict[str, Config] = {}
    for module in modules:
        try:
            found |= {config.name: config for config in getattr(module, "kernel_configs", tuple)()}
        except Exception as error:
            raise pytest.UsageError(f"{module.__name__}.kernel_configs: {type(error).__name__}: {error}") from error
    return found


class CompiledAhead:
    """A plugin: compiles kernels before the first test, and tells at the end which ones were compiled after that."""

    def __init__(self, config: pytest.Config, capability: tuple[int, int]) -> None:
        self._config, self._capability = config, capability
        self._start = self._shown = time.perf_counter()
        self._cached = _cached()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Errors: UsageError naming a module whose kernels are unknown, or a kernel that does not compile."""
        if self._config.option.collectonly:
            return
        self._start = time.perf_counter()
        configs = declared({item.module for item in session.items}) if self._capability == HOPPER else {}
        try:
            count = compile_missing(configs.values(), self._show)
        except CompileError as error:
            raise pytest.UsageError(str(error)) from error
        self._say(f"kernels: {len(configs)} ready, {count} compiled now in {time.perf_counter() - self._start:.0f} s")
        self._cached = _cached()
        if self._config.option.compile_only:
            pytest.exit("compiled, and nothing run", returncode=0)

    def pytest_terminal_summary(self) -> None:
        """Lists what a module should have named."""
        if late := sorted(_cached() - self._cached):
            self._say(f"compiled inside tests, one by one: {', '.join(late)}")

    def _show(self, done: int, total: int, name: str) -> None:
        now = time.perf_counter()
        if now - self._shown >= SHOW_EVERY_S or done == total:
            self._shown = now
            self._say(f"compiling kernels: {done}/{total} {now - self._start:5.1f} s  {name}")

    def _say(self, line: str) -> None:
        self._config.get_terminal_writer().line(line, flush=True)


def _cached() -> set[str]:
    return {path.stem for path in cache_dir().glob("*.json")}
