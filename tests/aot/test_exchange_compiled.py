"""Pushed exchanges compile for sm_90 and sm_100 as they are launched: no stack, and stores, fences and flags in the
order that the protocol needs. Nothing is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_aot import Compiled, Launch, compile_launch, recorded_launches

from ownpath.kernels.exchange import gather, scatter
from ownpath.kernels.exchange import launch as exchange
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import virtual_windows

CPU = torch.device("cpu")


def launches_of(size: int, num_tokens: int, *, pushes: bool = True, sums: bool = True) -> list[Launch]:
    layout = WindowLayout(size, 64 * 4096)
    window = virtual_windows(layout, CPU)[1]
    part = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16)
    with recorded_launches() as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "launch", lambda f, grid, args, options, moving: f[grid](*args, **options))
        exchange.start_exchange(window, part, None, part, pushes, sums)
    return launches


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Compiled]:
    """By ranks, tokens and compute capability."""
    folder: Path = tmp_path_factory.mktemp("cubins")
    wanted = [(2, 1, 90), (2, 64, 90), (8, 64, 90), (2, 64, 100)]
    return {one: compile_launch(launches_of(one[0], one[1])[0], one[2], folder) for one in wanted}


def test_nothing_spills(compiled: dict[tuple[int, int, int], Compiled]) -> None:
    assert {one.stack_bytes for one in compiled.values()} == {0}
    assert max(one.registers for one in compiled.values()) <= 128


def test_rows_are_in_front_of_flags(compiled: dict[tuple[int, int, int], Compiled]) -> None:
    """Stores of rows, a barrier of all threads, one release; acquires, a barrier, loads of rows. The epoch is counted
    by an atomic, which gives all threads the same."""
    for one in compiled.values():
        release, acquire = one.ptx.index("atom.global.sys.release.exch"), one.ptx.index("atom.global.sys.acquire.or")
        rows, behind = one.ptx[:release], one.ptx[acquire:]
        assert rows.index("griddepcontrol.wait") < rows.index("atom.global.gpu.relaxed.add") < rows.index("st.global")
        assert rows.rindex("bar.sync") > rows.rindex("st.global")
        assert behind.index("bar.sync") < behind.index("ld.global.cg")
        assert "ld.global.nc" not in one.ptx


def test_rows_move_sixteen_bytes_at_a_time(compiled: dict[tuple[int, int, int], Compiled]) -> None:
    for (size, num_tokens, _), one in compiled.items():
        if num_tokens > 1:
            assert one.ptx.count("st.global.v4.b32") >= size + 1


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Sums of few rows by tagged words: 2 ranks, 1 and 16 tokens, 8 ranks; one for Blackwell."""
    folder, found = tmp_path_factory.mktemp("tagged"), []
    for size, num_tokens, sm in ((2, 1, 90), (2, 16, 90), (8, 16, 90), (2, 1, 100)):
        window = virtual_windows(WindowLayout(size, 64 * 4096), CPU)[1]
        part = torch.zeros(num_tokens, 4096, dtype=torch.bfloat16)
        with recorded_launches() as launches, pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange, "launch", lambda f, grid, args, options, moving: f[grid](*args, **options))
            exchange.start_tagged(window, part, None, part)
        found.append(compile_launch(launches[0], sm, folder))
    return found


def test_a_tagged_word_is_one_store_and_one_load(tagged: list[Compiled]) -> None:
    """64 bits, or two words in one; nothing is released or acquired, and the epoch is written behind a barrier."""
    for one in tagged:
        assert_tagged(one)


def assert_tagged(one: Compiled) -> None:
    assert one.stack_bytes == 0
    assert one.registers <= 168
    assert "release" not in one.ptx
    assert "acquire" not in one.ptx
    assert "st.global.v2.b64" in one.ptx
    assert "ld.volatile.global.v2.b64" in one.ptx
    last = one.ptx.rindex("st.global.b32")
    assert one.ptx.rindex("bar", 0, last) > one.ptx.rindex("ld.volatile.global")


@pytest.fixture(scope="module")
def tagged_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Tokens, columns of logits and sums by tagged words, of 2 and 8 ranks; one for Blackwell."""
    folder = tmp_path_factory.mktemp("tagged_rows")
    start_rows, start_columns = gather.start_tagged_rows, gather.start_tagged_gather
    start_sums = scatter.start_tagged_scatter
    launches = [
        rows_of(2, 1, start_rows),
        rows_of(8, 60, start_rows),
        columns_of(2, 1, 64640, start_columns),
        sums_of(8, 64, start_sums),
        rows_of(2, 1, start_rows),
    ]
    return [compile_launch(one, sm, folder) for one, sm in zip(launches, (*(90,) * 4, 100), strict=True)]


def test_tagged_rows_are_whole_words(tagged_rows: list[Compiled]) -> None:
    """As those of sums: 64 bits, or two words in one, and the epoch behind a barrier."""
    for one in tagged_rows:
        assert_tagged(one)


def launch_of(start: Callable[..., object], *args: Any) -> Launch:
    """The launch that a function of rows makes for rank 1."""
    window = virtual_windows(WindowLayout(args[0], 512 * 4096, row_elements=512 * 4224), CPU)[1]
    with recorded_launches() as launches, pytest.MonkeyPatch.context() as patch:
        for module in (gather, scatter):
            patch.setattr(module, "launch", lambda f, grid, args, options, moving: f[grid](*args, **options))
        start(window, *args[1:], True, True)
    return launches[0]


def columns_of(size: int, num_rows: int, width: int, start: Callable[..., object] = gather.start_gather) -> Launch:
    x = torch.zeros(num_rows, width)
    return launch_of(start, size, x, x.new_empty(num_rows, size * width), True)


def rows_of(size: int, num_tokens: int, start: Callable[..., object] = gather.start_rows) -> Launch:
    """V4-Flash's tokens with ids and weights."""
    ids, weights = torch.zeros(num_tokens, 6, dtype=torch.int32), torch.zeros(num_tokens, 6)
    return launch_of(start, size, (torch.zeros(num_tokens, 4096, dtype=torch.bfloat16), ids, weights))


def sums_of(size: int, num_tokens: int, start: Callable[..., object] = scatter.start_scatter) -> Launch:
    part = torch.zeros(size * num_tokens, 4096, dtype=torch.bfloat16)
    return launch_of(start, size, part, None, part[:num_tokens].clone())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Tokens and sums, one and many, of 2 and 8 ranks; the columns of V4-Flash's logits."""
    folder: Path = tmp_path_factory.mktemp("rows")
    launches = [columns_of(2, 8, 64640), rows_of(8, 64), sums_of(2, 512), rows_of(2, 1), sums_of(8, 1), sums_of(2, 512)]
    sms = (90, 90, 90, 90, 90, 100)
    return [compile_launch(one, sm, folder) for one, sm in zip(launches, sms, strict=True)]


def test_rows_do_not_spill(rows: list[Compiled]) -> None:
    assert {one.stack_bytes for one in rows} == {0}
    assert max(one.registers for one in rows) <= 128


def test_rows_are_pushed_in_front_of_flags(rows: list[Compiled]) -> None:
    """And read behind them, where they are read by the same launch."""
    for one in rows:
        release, acquire = one.ptx.index("atom.global.sys.release.exch"), one.ptx.index("atom.global.sys.acquire.or")
        pushed, behind = one.ptx[:release], one.ptx[acquire:]
        assert pushed.index("griddepcontrol.wait") < pushed.index("atom.global.gpu.relaxed.add")
        assert pushed.rindex("bar.sync") > pushed.rindex("st.global")
        if one.launch.name != "place_rows":
            assert behind.index("bar.sync") < behind.index("ld.global.cg")
        assert "ld.global.nc" not in one.ptx


def test_many_rows_move_sixteen_bytes_at_a_time(rows: list[Compiled]) -> None:
    """To the other ranks, and out of the inbox."""
    for one, size in zip(rows[:3], (2, 8, 2), strict=True):
        assert one.ptx.count("st.global.v4.b32") >= size
    for one in (rows[0], rows[2]):
        assert "ld.global.cg.v4.b32" in one.ptx


def test_ranks_share_one_compilation() -> None:
    """But for rank 1, Triton would make one of its own: a number 1 is otherwise a constant."""
    signature = dict(launches_of(2, 1)[0].signature)
    assert signature["rank"] == "i32"
