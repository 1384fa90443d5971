"""How fast weights are loaded, beside reading the same files: on a synthetic checkpoint of full-size V4-Flash layers.

    PYTHONPATH=src python tools/load_rate.py --folder /tmp/synthetic --layers 2
    PYTHONPATH=src python tools/load_rate.py --folder /tmp/synthetic --device cuda

The folder is written if it is not there (3.9 GB a layer) and kept. Files are read once before anything is timed: what
fits the page cache is measured from there, and the table says how many bytes that were.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from layer.synthetic import COMMON, FLASH, Values, headers

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.writer import write_checkpoint
from ownpath.config import EngineConfig, ModelConfig
from ownpath.loading import device_caps
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.weights.load import load_weights

SHARD_BYTES = 2 * 10**9
READ_BYTES = 8 * 2**20


def write_synthetic(folder: Path, num_layers: int) -> None:
    """Random weights of so many CSA layers, as NVIDIA exports them."""
    fields = COMMON | FLASH | {"num_hidden_layers": num_layers, "compress_ratios": [4] * num_layers}
    config = ModelConfig.from_dict(fields | {"num_hash_layers": 0})
    index = headers(config, "nvidia")
    plan = make_plan(config, index, Caps("cpu", "CPU"), Demands("float32"))
    values = Values.seeded(torch.device("cpu"), 0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from values.params(config).items()
        for operand in values.operands(plan, index):
            for slot in operand.slots:
                yield slot.key, slot.target.clone()

    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors(), SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(fields | {"num_hash_layers": 0}), encoding="utf-8")


def read_files(index: CheckpointIndex) -> None:
    """Every byte of the shards once, in large reads."""
    buffer = memoryview(bytearray(READ_BYTES))
    for path in sorted({info.file for info in index.tensors.values()}):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call; its result is dropped."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not args.folder.exists():
        write_synthetic(args.folder, args.layers)
    config, index = ModelConfig.from_file(args.folder / "config.json"), CheckpointIndex.open(args.folder)
    engine = EngineConfig.for_device(args.device)
    plan: Plan = make_plan(config, index, device_caps(args.device), Demands(str(engine.dtype).removeprefix("torch.")))
    num_bytes = sum(info.num_bytes for info in index.tensors.values())
    read_files(index)
    read_s = seconds(lambda: read_files(index))
    load_s = seconds(lambda: load_weights(plan, index, torch.device(args.device)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{num_bytes / 1e9:.2f} GB: read {num_bytes / read_s / 1e9:.2f} GB/s, "
          f"loaded {num_bytes / load_s / 1e9:.2f} GB/s ({100 * read_s / load_s:.0f}%), "
          f"peak resident {peak / 1e9:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
