"""Changes to a finished shard of an interrupted ``quantize``, or to its note."""

import json
import os
from pathlib import Path


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def change_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    times = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither size nor time tells


def exchange(shard: Path) -> None:
    """Two finished shards change places, notes and all: each pair is whole, and in the wrong place."""
    for suffix in (".safetensors", ".json"):
        one, other = shard.with_suffix(suffix), shard.with_name(f"1{suffix}")
        one.rename(shard.with_name("spare"))
        other.rename(one)
        shard.with_name("spare").rename(other)


def take_away(shard: Path) -> None:
    shard.unlink()


def put_a_link(shard: Path) -> None:
    shard.rename(shard.with_name("elsewhere"))
    shard.symlink_to(shard.with_name("elsewhere"))


def put_a_pipe(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def spoil_the_note(shard: Path) -> None:
    shard.with_suffix(".json").write_text('{"run": "x", "tensors": [], "counts": 7}')


def nest_the_note(shard: Path) -> None:
    shard.with_suffix(".json").write_text("[" * 100_000)


def note_of_another_run(shard: Path) -> None:
    note = json.loads(shard.with_suffix(".json").read_text())
    shard.with_suffix(".json").write_text(json.dumps(note | {"run": "0" * 64}))


CHANGES = [truncate, change_a_byte, exchange, take_away, put_a_link, put_a_pipe]
CHANGES += [spoil_the_note, nest_the_note, note_of_another_run]
