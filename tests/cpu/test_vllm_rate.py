"""The parts of tools/vllm_rate.py that need no device: a record's steps, and what of a step is the experts'."""

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from ownpath.trace.launches import DeviceLaunch, MarkedTime, launches_of, marks_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from vllm_cases import CHUNK, LONG, SHORT, Case, all_cases, num_steps, prompt_groups, steps_of_a_prompt
from vllm_host import HostTime, Turns, collected, host_calls
from vllm_rate import Measurement, TimedCase, table
from vllm_record import Timed, experts_of, experts_record, kernels_record, split_steps, summed

MARLIN, CLAMP, ALIGN = (
    "void marlin_moe_wna16::Marlin<1>()",
    "silu_and_mul_with_clamp_kernel",
    "moe_align_block_size_kernel",
)
REDUCE = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()"
OURS = (
    "kernel_cutlass_kernel_ownpathkernelsnvfp4moe_sliced_sm90S_object",
    "..nvfp4moe_sliced_sum_sm90SlicedSum_object",
)


def launches(*names: tuple[str, int], start_us: float = 0.0, slot: str | None = None) -> list[DeviceLaunch]:
    """Kernels of 10 us, each 12 us behind the one before."""
    return [DeviceLaunch(slot, name, start_us + 12 * at, 10.0, ctas) for at, (name, ctas) in enumerate(names)]


STOCK = (
    ("mhc_fused_tilelang_kernel", 8),
    (ALIGN, 2),
    (MARLIN, 132),
    (CLAMP, 1),  # the shared expert's, on another stream
    (CLAMP, 6),
    (MARLIN, 132),
    (REDUCE, 4),
    (REDUCE, 4),  # the sampler's
)


def test_experts_of_stock_are_named_ones_the_wider_activation_and_the_first_sum() -> None:
    found = list(experts_of(launches(*STOCK)))
    assert [(one.kernel, one.num_ctas) for one in found] == [
        (ALIGN, 2), (MARLIN, 132), (CLAMP, 6), (MARLIN, 132), (REDUCE, 4)
    ]  # fmt: skip


def test_experts_of_ours_are_named_ones_alone() -> None:
    step = launches(("spread_few", 1), (OURS[0], 132), (OURS[1], 4), (CLAMP, 6), (REDUCE, 4))
    assert [one.kernel for one in experts_of(step)] == list(OURS)


def test_steps_are_told_apart_by_what_the_host_launched() -> None:
    """Kernels of one step far from each other, two steps without a gap; one launch not seen, one kernel of no step."""
    late = [
        replace(one, start_us=one.start_us + 5e4 * (at > 3)) for at, one in enumerate(launches(*STOCK, slot="step 0"))
    ]
    second = launches(*STOCK, start_us=late[-1].start_us + 10, slot="step 1")
    between = late[-1].start_us + 5
    marks = [MarkedTime("step 0", -9.0, between), MarkedTime("step 1", between, between + 500)]
    unseen = launches(("unseen", 1), start_us=2e4)
    steps, num_others = split_steps([*second, *late, *unseen, *launches(("before", 1), start_us=-20.0)], marks)
    assert [[one.slot for one in step] for step in steps] == [["step 0"] * 4 + [None] + ["step 0"] * 4, ["step 1"] * 8]
    assert num_others == 1


def test_a_replayed_graph_belongs_to_the_step_that_launched_it() -> None:
    """A trace: two steps, in each a graph of two kernels with one launch, the second graph's kernels late."""
    events = [{"name": "somebody's", "cat": "user_annotation", "ts": 0, "dur": 99, "tid": 1}]
    for step, (ts, ran) in enumerate([(10.0, (12.0, 14.0)), (20.0, (26.0, 29.0))]):
        args = {"correlation": step}
        events += [
            {"name": f"slot step {step}", "cat": "user_annotation", "ts": ts, "dur": 10.0, "tid": 1},
            {"name": "cudaGraphLaunch", "cat": "cuda_runtime", "ts": ts + 1, "dur": 1, "tid": 1, "args": args},
        ]
        events += [{"name": "k", "cat": "kernel", "ts": at, "dur": 1, "tid": 7, "args": args} for at in ran]
    steps, num_others = split_steps(launches_of(events), marks_of(events))
    assert ([[one.start_us for one in step] for step in steps], num_others) == ([[12.0, 14.0], [26.0, 29.0]], 0)


def test_a_kernel_counts_by_the_time_that_it_adds() -> None:
    """The second waits 8 us for the first, which it was launched beside; the third runs beside the second only."""
    step = [
        DeviceLaunch("step 0", "mhc_fused_tilelang_kernel", 0.0, 10.0, 8),
        DeviceLaunch("step 0", OURS[0], 2.0, 28.0, 132),  # ends at 30, adds 20
        DeviceLaunch("step 0", "other", 12.0, 8.0, 1),  # ends at 20, adds nothing
        DeviceLaunch("step 0", OURS[1], 35.0, 5.0, 4),
    ]
    assert summed([step], 250.04) == Timed(250.0, 40.0, 35.0, 25.0, 10.0, 51.0, 33.0, 10.0, 4)
    assert list(experts_record(step)) == [
        {"kernel": "mhc_fused_tilelang_kernel", "is_expert": False, "start": 0.0, "end": 10.0, "added": 10.0},
        {"kernel": OURS[0], "is_expert": True, "start": 2.0, "end": 30.0, "added": 20.0},
        {"kernel": "other", "is_expert": False, "start": 12.0, "end": 20.0, "added": 0.0},
        {"kernel": OURS[1], "is_expert": True, "start": 35.0, "end": 40.0, "added": 5.0},
    ]
    assert kernels_record([*step, DeviceLaunch("step 0", OURS[1], 41.0, 7.0, 4)]) == [
        {"kernel": OURS[0], "launches": 1, "added": 20.0},
        {"kernel": OURS[1], "launches": 2, "added": 12.0},
        {"kernel": "mhc_fused_tilelang_kernel", "launches": 1, "added": 10.0},
        {"kernel": "other", "launches": 1, "added": 0.0},
    ]


@pytest.mark.parametrize("num_requests", [1, 8, 64, 65, 200, 256])
@pytest.mark.parametrize("context", [SHORT, LONG, 300, 4096])
def test_prompts_are_read_in_steps_of_one_size(num_requests: int, context: int) -> None:
    """An engine that fills each step: rows of those that decode, then of prompts, oldest first."""
    groups, sizes = prompt_groups(num_requests, context), set[int]()
    left, num_decoding, read = list[int](), 0, list[int]()
    for group in groups:
        left += group
        for _ in range(steps_of_a_prompt(context)):
            room, rows = CHUNK - num_decoding, 0
            decoding = num_decoding
            while left and room:
                part = min(left[0], room)
                left[0], room, rows = left[0] - part, room - part, rows + part
                if not left[0]:
                    left.pop(0)
                    num_decoding += 1
            sizes.add(decoding + rows)
        assert not left
        read += group
    assert num_decoding == len(read) == num_requests
    assert len(sizes) == 1
    assert max(sizes) <= min(CHUNK, num_requests * context)
    assert max(read) + num_steps(num_requests, context) <= max(CHUNK, context + num_steps(num_requests, context)) + 1
    later = len(groups) * steps_of_a_prompt(context) / 2  # half of what they have answered when all are read
    assert abs(sum(read) / num_requests + later - context) <= 0.1 * context + 1
    if context != 300 and num_requests in (1, 8, 64, 256) and num_requests * context >= CHUNK:
        assert sizes == {CHUNK}


def test_the_table_says_how_many_times_faster() -> None:
    sides = {
        "stock": Timed(200, 180, 150, 100, 20, 160, 110, 20, 40),
        "ours": Timed(100, 90, 75, 40, 0, 80, 55, 0, 30),
    }
    *_, last = table({("decode", 8, 16): sides})
    assert last == "| decode | 8 | 16 | faster | 2.00x | 2.00x | 2.00x | 2.50x |  | 2.00x | 2.00x |  | |"


def test_processes_take_turns(tmp_path: Path) -> None:
    """Three, of which the last ends early: cases in order, one process at a time."""
    order, inside = list[tuple[int, int]](), list[int]()

    def work(place: int, count: int) -> None:
        turns = Turns(tmp_path, place, 3)
        for number in range(count):
            with turns.turn(number):
                inside.append(place)
                time.sleep(0.005)
                assert inside == [place]
                order.append((number, inside.pop()))
        turns.leave()

    threads = [Thread(target=work, args=(place, 1 if place == 2 else 3)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_what_the_host_calls_is_counted_for_a_step() -> None:
    def inner() -> None:
        time.sleep(0.002)

    def step() -> None:
        inner()
        inner()

    found = {str(row["function"]).rpartition(" ")[2]: row for row in host_calls(step, 4)}
    assert (found["inner"]["calls"], found["step"]["calls"]) == (2, 1)
    assert found["step"]["total_us"] >= found["inner"]["total_us"] >= 4000 > found["inner"]["own_us"]


def test_pauses_of_the_collector_are_a_step_s() -> None:
    with collected() as pauses:
        gc.collect()
    with_none = len(pauses)
    gc.collect()
    assert len(pauses) == with_none >= 1
    both = HostTime((1.0, 2.0, 3.0, 4.0, 5.0), 2.0) + HostTime((6.0, 7.0, 8.0, 9.0, 10.0, 11.0), 9.0)
    assert both.numbers == {"wall_us": 6.0, "wall_p10_us": 1.2, "wall_p90_us": 10.8, "gc_us": 1.0}


class FakeEngine:
    """An engine of three cases, which keeps what is done and when. long_s: what the long one takes."""

    def __init__(self, side: str, done: list[tuple[str, str, Case]], long_s: float) -> None:
        self.side, self.done, self.long_s = side, done, long_s
        self.cases = all_cases([8, 1], [SHORT, LONG], [])[:3]

    def time_host(self, case: Case) -> HostTime:
        self.done.append((self.side, "host", case))
        time.sleep(self.long_s if case[2] == LONG else 0.0)
        return HostTime((1.0, 2.0, 3.0), 0.0)

    def record(self, case: Case, wall_us: float) -> TimedCase:
        self.done.append((self.side, "device", case))
        return TimedCase(Timed(wall_us, 9.0), ["a fault"] * (case[1] == 8))


def measured(
    folder: Path, seconds: float, gate: Path | None = None, long_s: float = 0.0
) -> tuple[list[tuple[str, str, Case]], dict[str, list[str]]]:
    """Lets two sides measure; returns what they did, in order, and the faults of each."""
    done, faults = list[tuple[str, str, Case]](), dict[str, list[str]]()
    args = argparse.Namespace(visits=2, seconds=seconds, out=folder / "out", calls=None, gate=gate)

    def work(place: int, side: str) -> None:
        turns, rows = Turns(folder, place, 2), folder / f"rows.{side}"
        faults[side] = Measurement(args, side, FakeEngine(side, done, long_s), turns, {}, rows).run()

    threads = [Thread(target=work, args=pair) for pair in enumerate(["stock", "ours"])]
    for thread in threads:
        thread.start()
    if gate:
        time.sleep(0.3)
        assert not done
        gate.touch()
    for thread in threads:
        thread.join()
    return done, faults


def test_every_host_time_comes_before_any_record(tmp_path: Path) -> None:
    done, faults = measured(tmp_path, 60.0, tmp_path / "gate")
    cases = [("decode", 1, SHORT), ("decode", 8, SHORT), ("decode", 1, LONG)]
    parts = ["host", "host", "device"]
    assert done == [(side, part, case) for part in parts for case in cases for side in ("stock", "ours")]
    assert faults == {side: [f"{cases[1]}: a fault"] for side in ("stock", "ours")}
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["bench"] for row in rows] == ["vllm_host"] * 12 + ["vllm"] * 6
    assert (rows[-1]["wall_us"], rows[-1]["span_us"], rows[-1]["case"]) == (2.0, 9.0, "decode")


def test_nothing_begins_after_the_end(tmp_path: Path) -> None:
    done, faults = measured(tmp_path, -1.0)
    assert not done
    assert all("want of time" in one for side in faults.values() for one in side)
    assert [len(side) for side in faults.values()] == [3, 3]


def test_a_case_that_takes_long_is_not_visited_again_for_want_of_time(tmp_path: Path) -> None:
    done, _ = measured(tmp_path, 2.0, long_s=0.35)
    long = ("decode", 1, LONG)
    assert [done.count((side, "host", long)) for side in ("stock", "ours")] == [1, 1]
    assert done[-1] == ("ours", "device", long)


def test_cases_with_the_most_prompt_tokens_come_last() -> None:
    cases = all_cases([256, 1], [LONG, SHORT], [64])
    assert cases == [("chunk", 64, 0), ("decode", 1, SHORT), ("decode", 1, LONG), ("decode", 256, SHORT),
                     ("decode", 256, LONG)]  # fmt: skip
