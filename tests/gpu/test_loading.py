"""Loading to a CUDA device through pinned buffers: the bits are those in host memory, and so are the errors."""

from pathlib import Path

import pytest
import torch
from support.broken import Tensors, change_tensors
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.loading import plan_model
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.readers import ReadOptions

pytestmark = pytest.mark.gpu

READINGS = [ReadOptions(1, 64), ReadOptions(4, 1000), ReadOptions(8, 2**20)]


def load(folder: Path, device: torch.device, read_options: ReadOptions | None = None) -> LoadedWeights:
    return load_weights(plan_model(folder, "cpu"), CheckpointIndex.open(folder), device, read_options=read_options)


def tensors_of(loaded: LoadedWeights) -> list[torch.Tensor]:
    buffers = [buffer for operand in loaded.operands for parts in operand.buffers.values() for buffer in parts]
    return buffers + [loaded.params[key] for key in sorted(loaded.params)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_load_gives_the_bits_of_the_cpus(layout: str, cuda: torch.device, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, layout)
    expected = tensors_of(load(tmp_path, torch.device("cpu")))
    for read_options in (None, *READINGS):
        found = tensors_of(load(tmp_path, cuda, read_options))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.device.type == "cuda"
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.cpu().reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def test_tensors_larger_than_the_ring_arrive_whole(cuda: torch.device, tmp_path: Path) -> None:
    """Each buffer is filled again many times while copies out of it are under way."""
    random_checkpoint(tmp_path, vocab_size=60_000)
    expected = load(tmp_path, torch.device("cpu")).params["embed.weight"]
    assert expected.nbytes > 100 * 2**16
    for num_threads in (1, 4):
        found = load(tmp_path, cuda, ReadOptions(num_threads, 2**14)).params["embed.weight"]
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("read_options", READINGS, ids=str)
def test_a_fault_is_named_as_on_the_cpu(read_options: ReadOptions, cuda: torch.device, tmp_path: Path) -> None:
    key = "layers.1.ffn.shared_experts.w2.weight_scale"
    random_checkpoint(tmp_path)

    def change(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8)[63, 2] = 0xFF

    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"{key!r} .*block scale \[63, 2\] is NaN or negative"):
        load(tmp_path, cuda, read_options)


def test_a_load_in_inference_mode(cuda: torch.device, tmp_path: Path) -> None:
    """Tensors made in it can be written in it alone: the threads that write them are in it too."""
    random_checkpoint(tmp_path)
    expected = tensors_of(load(tmp_path, torch.device("cpu")))
    with torch.inference_mode():
        found = tensors_of(load(tmp_path, cuda, ReadOptions(4, 1000)))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.cpu().reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
