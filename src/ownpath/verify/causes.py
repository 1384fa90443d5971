"""Guesses the cause of a difference between file and kernel; a guess is made only where it explains all of it."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ownpath.checkpoint.errors import CheckpointError
from ownpath.verify.file_tensors import FileTensors
from ownpath.verify.readback import TensorPair

_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(w[123])\.(.+)")


def likely_cause(pair: TensorPair, raw: FileTensors) -> str:
    """Returns a likely cause as a sentence, or an empty string."""
    kernel, file = pair.kernel, pair.file
    if kernel.numel() and not kernel.any():
        return "they are all zero"
    if pair.role == "factors":
        return _factor(kernel, file)
    if pair.role == "scales" and file.shape[1] > 1:
        for direction, word in ((1, "on"), (-1, "back")):
            rows = (kernel[:, 1:], file[:, :-1]) if direction == 1 else (kernel[:, :-1], file[:, 1:])
            if torch.equal(*rows):
                return f"they are the file's, moved {word} by one block"
    if pair.role == "codes":
        if torch.equal(kernel << 4 | kernel >> 4, file):
            return "the two codes of each byte are exchanged"
        for other in _neighbours(pair.key):
            if _holds(kernel, other, raw):
                return f"they are those of {other!r}"
    return ""


def _factor(kernel: Tensor, file: Tensor) -> str:
    """Finds one factor that explains the difference within two float32 roundings."""
    guesses = {"its square": file * file, "its reciprocal": 1 / file, "1: it was left out": torch.ones_like(file)}
    for word, guess in guesses.items():
        if bool(((kernel / guess - 1).abs() <= 2.0**-22).all()):
            return f"the kernel has {word}"
    return ""


def _neighbours(key: str) -> Iterator[str]:
    """Yields the same tensor of the expert's other projections, and of the experts beside it."""
    match = _EXPERT.fullmatch(key)
    if match is None:
        return
    stem, expert, projection, leaf = match[1], int(match[2]), match[3], match[4]
    yield from (f"{stem}{expert}.{other}.{leaf}" for other in ("w1", "w3", "w2") if other != projection)
    yield from (f"{stem}{other}.{projection}.{leaf}" for other in (expert - 1, expert + 1) if other >= 0)


def _holds(kernel: Tensor, key: str, raw: FileTensors) -> bool:
    try:
        return torch.equal(kernel, raw(key))
    except CheckpointError:
        return False
