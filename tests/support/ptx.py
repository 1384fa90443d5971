"""Interprets a few instructions of PTX on arrays of words, for tests only: those that kernels write as assembly."""

import re
from collections.abc import Sequence

import numpy as np


def run(text: str, given: Sequence[np.ndarray], num_results: int) -> list[np.ndarray]:
    """Returns the words ``$0`` on that the instructions leave, having been given the ones behind them.

    Errors: NotImplementedError for any other instruction.
    """
    kept = {f"${num_results + number}": words for number, words in enumerate(given)}
    for line in (part.strip(" {}\n") for part in text.split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        into, *operands = (part.strip() for part in rest.split(","))
        if name not in OPERATIONS:
            raise NotImplementedError(f"{name} is not interpreted")
        kept[into] = OPERATIONS[name](*(_operand(kept, one, given[0]) for one in operands))
    return [kept[f"${number}"] for number in range(num_results)]


def _operand(kept: dict[str, np.ndarray], text: str, like: np.ndarray) -> np.ndarray:
    return (
        np.full_like(like, int(text, 0) & 0xFFFFFFFF)
        if re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+", text) and text not in kept
        else kept[text]
    )


def _permute(low: np.ndarray, high: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """Picks four bytes of eight, or a byte's sign eight times over."""
    both, chosen = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32), np.zeros_like(low)
    for number in range(4):
        selector = selectors.ravel()[0] >> 4 * number
        byte = (both >> np.uint64(8 * (int(selector) & 7))).astype(np.uint32) & np.uint32(255)
        if int(selector) & 8:
            byte = np.where(byte & 128, np.uint32(255), np.uint32(0))
        chosen |= byte << np.uint32(8 * number)
    return chosen


def _look_up(first: np.ndarray, second: np.ndarray, third: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Joins each bit of three words by a table of eight bits."""
    found = np.zeros_like(first)
    for number in range(8):
        if int(table.ravel()[0]) >> number & 1:
            bits = zip((first, second, third), (4, 2, 1), strict=True)
            found |= np.bitwise_and.reduce([word if number & bit else ~word for word, bit in bits])
    return found


def _multiply_halves(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiplies the two BF16 numbers of each word, rounded to the nearest even."""
    halves = []
    for shift in (0, 16):
        values = [(one >> np.uint32(shift) << np.uint32(16)).view(np.float32) for one in (left, right)]
        halves.append(_rounded((values[0] * values[1]).view(np.uint32)))
    return halves[0] | halves[1] << np.uint32(16)


def _rounded(bits: np.ndarray) -> np.ndarray:
    """Rounds FP32 numbers' bits to the nearest BF16, even ones where two are as near, in a word's lower half."""
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)


OPERATIONS = {
    "mov.b32": lambda value: value,
    "prmt.b32": _permute,
    "shl.b32": lambda value, count: value << count,
    "shr.u32": lambda value, count: value >> count,
    "and.b32": lambda left, right: left & right,
    "lop3.b32": _look_up,
    "mul.rn.bf16x2": _multiply_halves,
    "cvt.rn.bf16x2.f32": lambda upper, lower: _rounded(lower) | _rounded(upper) << np.uint32(16),
}
