"""Several reader threads: the same bits and the same errors as one, whatever the chunks; none outlives its call."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.broken import Tensors, change_tensors
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.checkpoint.chunks import ChunkReader, FileChunk, file_chunks
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.loading import plan_model
from ownpath.weights import load as load_module
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.readers import MAX_STAGING_BYTES, THREAD_NAME, ReadOptions

CPU = torch.device("cpu")
READINGS = [ReadOptions(1, 64), ReadOptions(1, 2**20), ReadOptions(4, 64), ReadOptions(4, 1000), ReadOptions(4, 2**20)]
ids = [f"{read_options.num_threads}x{read_options.chunk_bytes}" for read_options in READINGS]


def load(folder: Path, read_options: ReadOptions, **options: object) -> LoadedWeights:
    return load_weights(
        plan_model(folder, "cpu"), CheckpointIndex.open(folder), CPU, read_options=read_options, **options
    )


def stored_in(folder: Path) -> Tensors:
    """The shards as safetensors' own reader sees them."""
    return {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}


def is_input_scale(key: str) -> bool:
    """Of a scale that no kernel of a CPU reads, because activations are not quantised there."""
    return key.endswith((".input_scale", ".input_global_scale"))


@pytest.mark.parametrize(
    ("read_options", "layout"),
    [
        pytest.param(READINGS[at], layout, id=f"{ids[at]}-{layout}", marks=pytest.mark.slow if (idx + at) % 3 else ())
        for idx, layout in enumerate(LAYOUTS)
        for at in (1, 2, 3)
    ],
)
def test_every_slot_holds_the_stored_bits(layout: str, read_options: ReadOptions, tmp_path: Path) -> None:
    """Multipliers are compared as numbers that a divisor means; all else byte by byte, where nothing is widened."""
    random_checkpoint(tmp_path, layout)
    stored = stored_in(tmp_path)
    loaded = load(tmp_path, read_options)
    slots = [slot for operand in loaded.operands for slot in operand.destinations]
    for slot in slots:
        value = stored[slot.key]
        if slot.role in ("global_scale", "input_scale"):
            meant = 1 / value if slot.part.is_divisor else value
            assert (slot.target == meant).all(), slot.key
        elif value.dtype == torch.bfloat16 and slot.target.dtype == torch.float32:
            assert torch.equal(slot.target, value.float()), slot.key
        else:
            assert torch.equal(slot.target.view(torch.uint8), value.view(torch.uint8)), slot.key
    for key, value in loaded.params.items():
        assert torch.equal(value, stored[key]), key
    assert len(slots) + len(loaded.params) == sum(not is_input_scale(key) for key in stored)


def test_token_tables_of_32_bits_are_widened(tmp_path: Path) -> None:
    key = "layers.0.ffn.gate.tid2eid"
    random_checkpoint(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].int()}))
    expected = stored_in(tmp_path)[key].long()
    for read_options in READINGS:
        assert torch.equal(load(tmp_path, read_options).params[key], expected)


SINK = "layers.0.attn.attn_sink"
SCALE, WEIGHT = "layers.1.ffn.shared_experts.w2.weight_scale", "layers.0.attn.wq_b"


def spoil(key: str, *where: int, bits: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8)[where] = bits

    return change


FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "block scale": (spoil(SCALE, 63, 2, bits=0xFF), rf"'{SCALE}' .*block scale \[63, 2\] is NaN or negative"),
    "multiplier": (lambda t: t.update({f"{WEIGHT}.weight_scale_2": torch.tensor(torch.nan)}), "finite and positive"),
    "divisor": (lambda t: t.update({f"{WEIGHT}.weight_scale_2": torch.tensor(2.0)}), "a divisor by its size"),
    "E8M0": (spoil("layers.1.attn.indexer.wq_b.scale", 1, 0, bits=0xFF), r"wq_b.scale' .*block scale \[1, 0\] is NaN"),
    "E4M3": (spoil("layers.1.attn.indexer.wq_b.weight", 100, 3, bits=0x7F), "wq_b.weight' .*NaN or infinity"),
    "-E4M3": (spoil("layers.1.attn.indexer.wq_b.weight", 0, 0, bits=0xFF), "wq_b.weight' .*NaN or infinity"),
    "infinity": (lambda t: t["head.weight"][95, 63:].fill_(torch.inf), "'head.weight' .*NaN or infinity"),
    "-infinity": (lambda t: t["head.weight"][50, 3:4].fill_(-torch.inf), "'head.weight' .*NaN or infinity"),
    "-NaN": (lambda t: t[SINK].view(torch.uint8)[4:].fill_(0xFF), f"'{SINK}' .*NaN or infinity"),
    "ids": (lambda t: t["layers.0.ffn.gate.tid2eid"][95, 2:].fill_(-1), "experts outside 0..7"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_same_error_for_any_reading(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    random_checkpoint(tmp_path, num_hidden_layers=2, compress_ratios=[0, 4])
    change_tensors(tmp_path, change)
    found = set()
    for read_options in READINGS:
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path, read_options)
        found.add(str(caught.value))
    assert len(found) == 1, found
    assert not own_threads()


def test_of_several_faults_the_first_in_the_files_is_told(tmp_path: Path) -> None:
    """Every matrix is spoiled: whichever thread is faster, the error is that of the lowest byte of the first shard."""
    random_checkpoint(tmp_path)

    def change(tensors: Tensors) -> None:
        for key in tensors:
            if key.endswith("weight_scale"):
                tensors[key].view(torch.uint8).fill_(0xFF)
            elif key.endswith("weight_scale_2"):
                tensors[key] = torch.tensor(0.0)

    change_tensors(tmp_path, change)
    infos = CheckpointIndex.open(tmp_path).tensors.values()
    spoiled = [info for info in infos if info.name.endswith(("weight_scale", "weight_scale_2"))]
    first = min(spoiled, key=lambda info: (info.file, info.start))
    for read_options in READINGS * 5:
        with pytest.raises(CheckpointError, match=f"tensor {first.name!r} "):
            load(tmp_path, read_options)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_shard_cut_short_while_loading_is_an_error(num_threads: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    plan, index = plan_model(tmp_path, "cpu"), CheckpointIndex.open(tmp_path)
    last = max(index.tensors.values(), key=lambda info: (info.file, info.start))
    with last.file.open("r+b") as shard:
        shard.truncate(last.start + last.num_bytes - 1)
    with pytest.raises(CheckpointError, match=rf"tensor '{last.name}' .*: the file ends inside it"):
        load_weights(plan, index, CPU, read_options=ReadOptions(num_threads, 1000))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_shard_that_went_away_is_an_error(num_threads: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    plan, index = plan_model(tmp_path, "cpu"), CheckpointIndex.open(tmp_path)
    gone = sorted({info.file for info in index.tensors.values()})[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"tensor .*{gone.name}\) cannot be read \(.*no such file"):
        load_weights(plan, index, CPU, read_options=ReadOptions(num_threads, 1000))


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_half_a_tensor_lost_or_read_twice_is_an_error(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path)
    info = CheckpointIndex.open(tmp_path)["layers.2.attn.wq_b.weight"]

    def wrong(infos: Iterable[TensorInfo], max_bytes: int) -> Iterator[FileChunk]:
        for chunk in file_chunks(infos, max_bytes):
            hit = tuple(piece for piece in chunk.pieces if piece.info == info and 2 * piece.first >= info.num_bytes)
            if change == "twice":
                yield chunk
                yield chunk._replace(pieces=hit)
            else:
                yield chunk._replace(pieces=tuple(piece for piece in chunk.pieces if piece not in hit))

    monkeypatch.setattr(load_module, "file_chunks", wrong)
    for num_threads in (1, 4):
        with pytest.raises(CheckpointError, match=f"'{info.name}': {info.shape[0] // 2} rows were not written exactly"):
            load(tmp_path, ReadOptions(num_threads, 64))


def test_chunks_hold_each_byte_once_in_the_order_of_the_files(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    infos = list(CheckpointIndex.open(tmp_path).tensors.values())
    unread = infos.pop(len(infos) // 2)  # leaves a gap
    content = {info.file: info.file.read_bytes() for info in infos}
    for max_bytes in (64, 1000, 2**14, 2**30):
        found = {info.name: bytearray(info.num_bytes) for info in infos}
        ends: list[tuple[Path, int]] = []
        for chunk in file_chunks(reversed(infos), max_bytes):
            assert 0 < chunk.num_bytes <= max_bytes
            ends += [(chunk.file, chunk.start), (chunk.file, chunk.start + chunk.num_bytes)]
            data = content[chunk.file][chunk.start : chunk.start + chunk.num_bytes]
            assert [piece.start for piece in chunk.pieces] == [0, *(piece.stop for piece in chunk.pieces[:-1])]
            assert chunk.pieces[-1].stop == chunk.num_bytes
            for info, first, start, stop in chunk.pieces:
                assert first % 64 == 0
                found[info.name][first : first + stop - start] = data[start:stop]
        assert ends == sorted(ends)
        assert unread.name not in found
        stored = {i.name: content[i.file][i.start : i.start + i.num_bytes] for i in infos}
        assert found == stored


def test_progress_counts_up_to_every_byte_in_the_callers_thread(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    infos = CheckpointIndex.open(tmp_path).tensors.items()
    total = sum(info.num_bytes for key, info in infos if not is_input_scale(key))
    for read_options in READINGS:
        seen: list[tuple[int, int]] = []
        here = threading.get_ident()

        def progress(num_bytes: int, total_bytes: int, seen: list[tuple[int, int]] = seen, here: int = here) -> None:
            assert threading.get_ident() == here
            seen.append((num_bytes, total_bytes))

        load(tmp_path, read_options, progress=progress)
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_every_thread(error: type[BaseException], tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    index = CheckpointIndex.open(tmp_path)

    def interrupt(num_bytes: int, _total_bytes: int) -> None:
        if num_bytes:
            raise error

    with pytest.raises(error):
        load_weights(plan_model(tmp_path, "cpu"), index, CPU, interrupt, ReadOptions(4, 64))
    assert not own_threads()


def own_threads() -> list[threading.Thread]:
    """Reader threads that are alive: other tests' threads, and pytest's, are not ours."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def test_an_interrupt_while_reading_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C reaches the thread that waits: no thread takes another chunk."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    random_checkpoint(tmp_path)
    taken: list[FileChunk] = []
    real = ChunkReader.read

    def read(self: ChunkReader, chunk: FileChunk, buffer: memoryview) -> None:
        taken.append(chunk)
        if len(taken) == 10:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        real(self, chunk, buffer)

    monkeypatch.setattr(ChunkReader, "read", read)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, ReadOptions(2, 64))
    num_taken = len(taken)
    assert num_taken < 10 + 2 * (2 + 0.2 / 0.02)  # what two threads take until the waiting thread wakes, twice over
    assert not own_threads()


@pytest.mark.parametrize(("num_threads", "chunk_bytes"), [(0, 1024), (1, 63), (64, 2**24), (1, 2**30)])
def test_buffers_without_a_bound_are_refused(num_threads: int, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at most {2**30}"):
        ReadOptions(num_threads, chunk_bytes)


def test_the_bound_holds_for_every_device() -> None:
    for device in ("cpu", "cuda"):
        read_options = ReadOptions.for_device(torch.device(device))
        assert 0 < read_options.staging_bytes(torch.device(device)) <= MAX_STAGING_BYTES < 2 * 2**30


PEAK = """
import resource, sys, torch
from pathlib import Path
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.loading import plan_model
from ownpath.weights.load import load_weights
from ownpath.weights.readers import ReadOptions

torch.set_num_threads(1)
folder = Path(sys.argv[1])
plan, index = plan_model(folder, "cpu"), CheckpointIndex.open(folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_weights(plan, index, torch.device("cpu"), read_options=ReadOptions(4, 2**20))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(after - before - sum(info.num_bytes for info in index.tensors.values()))
"""


def test_memory_beside_the_weights_does_not_grow_with_them(tmp_path: Path) -> None:
    """240 MB of weights by four threads of 1 MiB: less than 32 MB besides, where a copy of a tensor would take 100."""
    random_checkpoint(tmp_path)
    change_config_and_tables(tmp_path)
    options = {"capture_output": True, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], **options)
    assert int(found.stdout) < 32e6, found.stdout


def change_config_and_tables(folder: Path, vocab_size: int = 800_000) -> None:
    """A vocabulary whose embedding and head take 100 MB each."""
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": vocab_size}))

    def change(tensors: Tensors) -> None:
        for key in ("embed.weight", "head.weight", "layers.0.ffn.gate.tid2eid"):
            tensors[key] = torch.zeros(vocab_size, tensors[key].shape[1], dtype=tensors[key].dtype)

    change_tensors(folder, change)
