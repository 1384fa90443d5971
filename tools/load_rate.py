"""Measures the rates of loading weights and of reading the same files, on synthetic full-size V4-Flash layers.

    PYTHONPATH=src python tools/load_rate.py --folder /tmp/synthetic --layers 5 --devices cpu,cuda --out rates.jsonl
    PYTHONPATH=src torchrun --nproc-per-node 2 tools/load_rate.py --folder /dev/shm/synthetic --layers 11 --devices cuda

The folder is written if it is not there (2.1 GB, and 3.8 GB a layer) and kept. Files are read once before anything is
timed: what fits the page cache is measured from there. Reading is plain ``readinto``, each byte once into a small
buffer, by one thread and by as many as load. Every load is a row; the first on a device also pays for its memory.

Under torchrun the ranks load their parts at the same time, each to a device of its own, and nothing is read before.
A row has the slowest rank's seconds, the rate of the checkpoint's bytes, and the time of 164 GB at this rate:
V4-Flash's, of which this is a slice.
"""

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from layer.shards import write_shards

from ownpath.bench.published import SHAPES
from ownpath.bench.record import append_lines, provenance
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig, ModelConfig, Parallel
from ownpath.loading import device_caps
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Demands
from ownpath.ranks.group import Group, join, leave
from ownpath.ranks.start import swap_text
from ownpath.ranks.started import is_rank
from ownpath.splits import ExpertSplit
from ownpath.weights.load import load_weights
from ownpath.weights.operands import reserve
from ownpath.weights.readers import ReadOptions

READ_BYTES = 8 * 2**20
WHOLE_GB = 164.0
"""V4-Flash's published NVFP4 checkpoint."""
STATUS = Path("/proc/self/status")


def read_part(path: Path, part_idx: int, num_parts: int) -> None:
    """Reads one thread's part of a file; all parts have the same length."""
    buffer = memoryview(bytearray(READ_BYTES))
    num_bytes = path.stat().st_size
    start, stop = (num_bytes * idx // num_parts for idx in (part_idx, part_idx + 1))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            start += file.readinto(buffer[: stop - start])


def read_files(index: CheckpointIndex, num_threads: int) -> None:
    """Reads every byte of the shards once, in large reads, shard by shard."""
    with ThreadPoolExecutor(num_threads) as pool:
        for path in sorted({info.file for info in index.tensors.values()}):
            list(pool.map(read_part, repeat(path), range(num_threads), repeat(num_threads)))


def seconds(run: Callable[[], object]) -> float:
    """Returns the wall time of a call; its result is dropped."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def status_bytes(field: str) -> int:
    """Returns the operating system's size of this process: VmRSS, or VmHWM, the peak since ``forget_peak``."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Resets VmHWM, the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def touch_rates(num_bytes: int, num_threads: int) -> dict[str, float]:
    """Measures the GB/s of fresh memory, writing a byte of each page: as operands get it, and in small pages."""
    rates = {}
    for kind, allocate in (("operand", reserve), ("small pages", torch.empty)):
        pages = allocate((num_bytes,), dtype=torch.uint8, device=torch.device("cpu")).numpy()
        rates[kind] = num_bytes / 1e9 / seconds(partial(_touch, pages, num_threads))
    return rates


def _touch(pages: Any, num_threads: int) -> None:
    def touch(idx: int) -> None:
        pages[len(pages) * idx // num_threads : len(pages) * (idx + 1) // num_threads : 4096] = 1

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(touch, range(num_threads)))


def load_row(plan: Plan, index: CheckpointIndex, device: torch.device, read_options: ReadOptions) -> dict[str, object]:
    """Measures a load: seconds, and peak host memory without the weights that are in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    forget_peak()
    before_bytes = status_bytes("VmRSS")
    kept = []
    load_s = seconds(lambda: kept.append(load_weights(plan, index, device, read_options=read_options)))
    buffers = [buffer for operand in kept[0].operands for parts in operand.buffers.values() for buffer in parts]
    buffers += kept[0].params.values()
    weight_bytes = sum(buffer.nbytes for buffer in buffers if buffer.device.type == "cpu")
    extra_bytes = status_bytes("VmHWM") - before_bytes - weight_bytes
    return {"load_s": load_s, "extra_host_bytes": extra_bytes, "staging_bytes": read_options.staging_bytes(device)}


def measure(args: argparse.Namespace, device: str, index: CheckpointIndex, config: ModelConfig) -> None:
    """Prints and records a row for each load on a device."""
    dtype = str(EngineConfig.for_device(device).dtype).removeprefix("torch.")
    plan = make_plan(config, index, device_caps(device), Demands(dtype))
    default = ReadOptions.for_device(torch.device(device))
    read_options = ReadOptions(args.threads or default.num_threads, args.chunk_kib * 1024 or default.chunk_bytes)
    num_bytes = sum(info.num_bytes for info in index.tensors.values())
    torch.zeros(1, device=device)  # the context is not loading
    counts = (1, read_options.num_threads)
    rates = {n: num_bytes / 1e9 / min(seconds(partial(read_files, index, n)) for _ in range(2)) for n in counts}
    touched = touch_rates(min(num_bytes, 4 * 10**9), read_options.num_threads) if device == "cpu" else {}
    for kind, rate in touched.items():
        print(f"fresh memory ({kind}): {rate:.2f} GB/s by {read_options.num_threads} threads", flush=True)
    origin = provenance(device, args.commit, shlex.join(sys.argv), "wall clock")
    for run in range(args.repeat):
        row = load_row(plan, index, torch.device(device), read_options)
        rate = num_bytes / 1e9 / float(str(row["load_s"]))
        ratios = [rate / rates[num_threads] for num_threads in (1, read_options.num_threads)]
        print(f"{device} {num_bytes / 1e9:.2f} GB in {len(index.tensors)} tensors, run {run}: "
              f"loaded {rate:.2f} GB/s with {read_options.num_threads} threads of "
              f"{read_options.chunk_bytes >> 10} KiB; "
              f"read {rates[1]:.2f} GB/s by 1 thread ({ratios[0]:.0%}), "
              f"{rates[read_options.num_threads]:.2f} by {read_options.num_threads} ({ratios[1]:.0%}); "
              f"extra host memory {int(str(row['extra_host_bytes'])) / 2**20:.0f} MiB "
              f"(staging {int(str(row['staging_bytes'])) >> 20})", flush=True)  # fmt: skip
        row |= {"run": run, "shape": args.shape, "bytes": num_bytes, "tensors": len(index.tensors)}
        row |= {"threads": read_options.num_threads, "chunk_bytes": read_options.chunk_bytes, "touch_gb_per_s": touched}
        row |= {"load_gb_per_s": rate, "read_1_gb_per_s": rates[1], "read_n_gb_per_s": rates[read_options.num_threads]}
        row |= {"ratio_1": ratios[0], "ratio_n": ratios[1]}
        if args.out is not None:
            append_lines(args.out, [{"bench": "load", **row, **origin}])


def measure_ranks(
    args: argparse.Namespace, group: Group, device: torch.device, index: CheckpointIndex, config: ModelConfig
) -> None:
    """Prints and records, on the first rank, a row for each load by all ranks."""
    dtype = str(EngineConfig.for_device(device.type).dtype).removeprefix("torch.")
    parallel = Parallel(group.rank, group.size, experts=ExpertSplit(args.experts))
    plan = make_plan(config, index, device_caps(str(device)), Demands(dtype), parallel=parallel)
    default = ReadOptions.for_device(device, group.size)
    read_options = ReadOptions(args.threads or default.num_threads, args.chunk_kib * 1024 or default.chunk_bytes)
    num_bytes = sum(info.num_bytes for info in index.tensors.values())
    origin = provenance(str(device), args.commit, shlex.join(sys.argv), "wall clock")
    torch.zeros(1, device=device)  # the context is not loading
    for run in range(args.repeat):
        swap_text(group, "load_rate: begin", "")
        before_s = time.process_time()
        row = load_row(plan, index, device, read_options)
        row["cpu_s"] = time.process_time() - before_s
        rows = [json.loads(text) for text in swap_text(group, "load_rate: end", json.dumps(row))]
        rate = num_bytes / 1e9 / max(one["load_s"] for one in rows)
        shared = {"run": run, "shape": args.shape, "bytes": num_bytes, "ranks": group.size, "experts": args.experts}
        shared |= {"load_s": max(one["load_s"] for one in rows), "load_gb_per_s": rate, "threads": default.num_threads}
        shared |= {"cpu_s": sum(one["cpu_s"] for one in rows), "projected_s": WHOLE_GB / rate}
        if group.rank == 0:
            print(f"{device.type} {num_bytes / 1e9:.2f} GB by {group.size} ranks, run {run}: {shared['load_s']:.2f} s, "
                  f"{rate:.2f} GB/s, {shared['cpu_s']:.2f} s of processors; {WHOLE_GB:.0f} GB at this rate: "
                  f"{shared['projected_s']:.1f} s", flush=True)  # fmt: skip
            if args.out is not None:
                append_lines(args.out, [{"bench": "load_ranks", **shared, "of_ranks": rows, **origin}])


def load_by_ranks(args: argparse.Namespace) -> None:
    """Measures as one of the processes that torchrun has started; the first writes the folder if it is not there."""
    group = join(os.environ)
    if group.rank == 0:
        write_missing(args)
    swap_text(group, "load_rate: written", "")
    config, index = ModelConfig.from_file(args.folder / "config.json"), CheckpointIndex.open(args.folder)
    for name in args.devices.split(","):
        device = torch.device(name if name == "cpu" else f"{name}:{group.rank}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        measure_ranks(args, group, device, index, config)
    leave()


def write_missing(args: argparse.Namespace) -> None:
    """Writes the folder if it is not there."""
    if not args.folder.exists():
        start = time.perf_counter()
        num_bytes = write_shards(args.folder, args.shape, args.layers)
        print(f"written {num_bytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="flash")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--devices", default="cpu", help="comma-separated (default: cpu)")
    parser.add_argument("--experts", choices=list(ExpertSplit), default="width", help="what ranks divide of experts")
    parser.add_argument("--threads", type=int, default=0, help="default: as the loader chooses")
    parser.add_argument("--chunk-kib", type=int, default=0, help="default: as the loader chooses")
    parser.add_argument("--repeat", type=int, default=2, help="loads on each device (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line for each load")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with every row")
    args = parser.parse_args()
    if is_rank(os.environ):
        load_by_ranks(args)
        return
    write_missing(args)
    config, index = ModelConfig.from_file(args.folder / "config.json"), CheckpointIndex.open(args.folder)
    read_files(index, 8)
    for device in args.devices.split(","):
        measure(args, device, index, config)


if __name__ == "__main__":
    main()
