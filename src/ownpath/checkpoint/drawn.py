"""The tensors of a checkpoint whose weights are drawn at random and stored nowhere.

Every 64 bits of a tensor are mixed from its name, the row and the place in the row, in integers alone: any part of it,
on any rank and any device, is that part of the same tensor. Values are valid and of sensible size: a product keeps
about the size of its input, block scales are near one, fused matrices differ in their global scales, norms are near
one, and a token's experts in the routers' tables are distinct and each as likely as the others.

Legend: M tensors alike, R rows, C columns, W words of 64 bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.tensor_info import TensorInfo

E2M1_RMS, BLOCK_RMS = 2.926, 1.153
"""Of the 16 codes, and of the 16 block scales from 0.5 to 1.875, each as likely as the others."""
INPUT_SCALE = 0.01
_WORD_BYTES = 8
_ROW_STEP, _PLACE_STEP = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))
"""Shifts and factors of the finaliser of splitmix64."""
_NOISE_PARTS, _PART_BITS = 4, 16
_NOISE_MEAN, _NOISE_STD = 2 * (2**16 - 1), 2 * 2**16 / 12**0.5
"""Of the sum of four numbers of 16 bits, which is nearly normal."""
_CODES = {"U8": (0xFF, 0), "I8": (0xFF, 0), "F8_E4M3": (0x8F, 0x30)}
"""dtype -> random bits to keep, and bits to set. E4M3: from 0.5 to 1.875, signed."""
_BLOCK_SCALES = (0x0F, 0x30)
_EMBEDDING = "embed.weight"
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class DrawnValues:
    """The source of one model's tensors. widths: module -> columns of its weight. num_experts: of each layer."""

    widths: Mapping[str, int]
    num_experts: int
    seed: int = 0
    _seeds: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def whole(self, info: TensorInfo, device: torch.device) -> Tensor:
        """Returns a tensor as it would be stored."""
        return self.rows(info, 0, info.shape[0] if info.shape else 1, device)

    def rows(self, info: TensorInfo, start: int, stop: int, device: torch.device) -> Tensor:
        """Returns rows [start, stop) of a tensor as it would be stored."""
        drawn: Tensor = self.parts([info], range(start, stop), range(_shape2(info)[1]), device)[0]
        return drawn.reshape((stop - start, *info.shape[1:]) if info.shape else ())

    def parts(self, infos: Sequence[TensorInfo], rows: range, columns: range, device: torch.device) -> Tensor:
        """Returns the same part of several tensors that have dtype, shape and kind in common: [M, R, C] in their dtype.

        rows, columns: of the whole tensor; one of one dimension has one column, a scalar one row too.
        """
        first, dtype = infos[0], TORCH_DTYPES[infos[0].dtype]
        seeds = _integers([self._seed(info.name) for info in infos], device)
        if first.dtype == "I64":
            return self._table(seeds, rows, columns)
        if not _is_of_bits(first):
            noise = _noise(_words(seeds, rows, columns))
            return torch.stack([self._value(info, part) for info, part in zip(infos, noise, strict=True)]).to(dtype)
        per_word = _WORD_BYTES // dtype.itemsize
        places = range(columns.start // per_word, -(-columns.stop // per_word))
        words = _words(seeds, rows, places)
        skipped = columns.start - places.start * per_word
        keep, put = self._bits(first)
        bits = words.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
        bits = bits[..., skipped : skipped + len(columns)]
        return bits.bitwise_and(keep).add_(put).view(dtype)

    def scalars(self, infos: Sequence[TensorInfo]) -> Tensor:
        """Returns float32 of tensors that hold one number each: a model has 10^5 of them."""
        noise = _noise(
            _words(_integers([self._seed(info.name) for info in infos], _HOST), range(1), range(1))
        ).flatten()
        is_input = torch.tensor([info.name.endswith("input_scale") for info in infos], dtype=torch.bool)
        sizes = [self._global_size(info.name.rpartition(".")[0]) for info in infos]
        values = torch.tensor(sizes, dtype=torch.float64) * (1 + noise / 8)
        return values.masked_fill_(is_input, INPUT_SCALE).float()

    def _global_size(self, module: str) -> float:
        """Returns the size of a global scale by which a product keeps that of its input."""
        return 1 / (math.sqrt(self.widths[module]) * E2M1_RMS * BLOCK_RMS)

    def _seed(self, name: str) -> int:
        if name not in self._seeds:
            digest = blake2b(name.encode(), digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
            self._seeds[name] = int.from_bytes(digest, "little", signed=True)
        return self._seeds[name]

    def _bits(self, info: TensorInfo) -> tuple[int, int]:
        """Returns the random bits of an element to keep, and what to add: as integers of its size, signed for two
        bytes."""
        module, _, leaf = info.name.rpartition(".")
        if info.dtype == "BF16":  # between one and two times a power of two, signed
            exponent = -1 if info.name == _EMBEDDING else -1 - _half_log(self.widths[module])
            return 0x807F - 0x10000, (127 + exponent) << 7
        if info.dtype == "F8_E8M0":
            return 1, 127 - 1 - _half_log(self.widths[module])
        return _BLOCK_SCALES if leaf == "weight_scale" else _CODES[info.dtype]

    def _value(self, info: TensorInfo, noise_RC: Tensor) -> Tensor:
        """Returns a parameter or a scalar made of noise, float64."""
        module, _, leaf = info.name.rpartition(".")
        if leaf == "weight_scale_2":
            return self._global_size(module) * (1 + noise_RC / 8)
        if leaf == "input_scale":
            return torch.full_like(noise_RC, INPUT_SCALE)
        if info.name.endswith("norm.weight"):
            return 1 + 0.1 * noise_RC
        if leaf.endswith("_fn"):
            return noise_RC / math.sqrt(info.shape[-1])
        return 0.3 * noise_RC + float(leaf.endswith("_scale"))

    def _table(self, seeds_M: Tensor, rows: range, columns: range) -> Tensor:
        """Returns ids of experts: a row goes from any one in steps of the same length, and never around."""
        words = _words(seeds_M, rows, range(2))
        first, step = _shifted(words, 33).unbind(-1)
        longest = max(1, (self.num_experts - 1) // max(1, columns.stop - 1))
        place = torch.arange(columns.start, columns.stop, device=words.device)
        return (first[..., None] + (1 + step % longest)[..., None] * place) % self.num_experts


def _shape2(info: TensorInfo) -> tuple[int, int]:
    """Returns rows and columns of a tensor of at most two dimensions."""
    return info.shape[0] if info.shape else 1, math.prod(info.shape[1:])


def _is_of_bits(info: TensorInfo) -> bool:
    """Returns True for a matrix whose elements are random bits, False for parameters and scalars."""
    is_norm = info.dtype == "BF16" and info.name.endswith("norm.weight")
    return info.dtype != "F32" and not is_norm


def _half_log(width: int) -> int:
    """Returns log2 of the square root of a width, rounded down."""
    return (width.bit_length() - 1) // 2


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Returns int64 of integers that may have 64 bits without a sign."""
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64, device=device)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def _words(seeds_M: Tensor, rows: range, places: range) -> Tensor:
    """Mixes random words: int64 [M, R, W]."""
    device = seeds_M.device
    row_R = torch.arange(rows.start, rows.stop, device=device) * _signed(_ROW_STEP)
    place_W = torch.arange(places.start, places.stop, device=device) * _signed(_PLACE_STEP)
    words = seeds_M[:, None, None] + row_R[:, None] + place_W
    for shift, factor in _MIXES:
        words ^= _shifted(words, shift)
        if factor is not None:
            words *= _signed(factor)
    return words


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Shifts right and fills with zeros, where int64 would fill with the sign."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _noise(words: Tensor) -> Tensor:
    """Returns numbers of mean 0 and standard deviation 1, float64, from a word each."""
    total = sum((words >> (_PART_BITS * part)) & 0xFFFF for part in range(_NOISE_PARTS))
    assert isinstance(total, Tensor)
    return (total - _NOISE_MEAN).double() / _NOISE_STD
