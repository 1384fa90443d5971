"""Pages, the form in which published caches keep keys: all codes of a page first, then all scales.

A page holds the R keys of one block, or of one slot's ring. KEY_PAGES: R * 576 bytes, of each key 448 E4M3 and 64 BF16
channels, the rotary ones; then R * 8 bytes, of each key 7 E8M0 scales of 64 channels and a pad byte. INDEX_PAGES: R *
128 bytes of E4M3, then R float32 scales, powers of two. FP4_INDEX_PAGES: R * 64 bytes, of each key 128 E2M1 codes, an
even channel in the low half of a byte and the odd one behind it in the high half; then R * 4 bytes, of each key 4 E8M0
scales of 32 channels. No published cache has this form; its values are those that published code rounds index keys to.

Legend: E keys, H channels of a key, P pages, R keys of a page.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.formats import FP8_INDEX_DIM, FP8_KEY_DIM, FP8_KEY_ROTARY, KeyFormat
from ownpath.numerics.e2m1 import E2M1_MAX, decode_packed_e2m1, pack_e2m1, round_to_e2m1_code
from ownpath.numerics.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0, encode_e8m0_ceil
from ownpath.numerics.fake_quant import FP8_AMAX_FLOOR

KEY_BLOCK = 64
"""Channels that share a scale."""
INDEX_BLOCK = 32
"""The same, of an index key in FP4 pages."""
PLAIN = FP8_KEY_DIM - FP8_KEY_ROTARY
"""Channels of a key that are E4M3."""


@dataclass(frozen=True)
class PageForm:
    """One form of pages. num_channels, num_code_bytes, num_scale_bytes: of a key.

    encode: keys [E, H] -> codes uint8 [E, num_code_bytes] and scales uint8 [E, num_scale_bytes]. decode: the inverse,
    in a dtype.
    """

    num_channels: int
    num_code_bytes: int
    num_scale_bytes: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor]

    @property
    def key_bytes(self) -> int:
        return self.num_code_bytes + self.num_scale_bytes

    def read(self, pages: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Decodes the keys of some rows, int64 [...], of pages uint8 [P, R * key_bytes]: [..., H]. Reads no others."""
        codes, scales, page, row = self._split(pages, rows.reshape(-1))
        keys: Tensor = self.decode(codes[page, row], scales[page, row], dtype).unflatten(0, rows.shape)
        return keys

    def write(self, pages: Tensor, rows_E: Tensor, keys_EH: Tensor) -> None:
        """Encodes keys into rows of pages."""
        codes, scales, page_E, row_E = self._split(pages, rows_E)
        codes[page_E, row_E], scales[page_E, row_E] = self.encode(keys_EH)

    def bytes_of_rows(self, pages: Tensor) -> Tensor:
        """Returns the bytes of every key, uint8 [P * R, key_bytes]."""
        num_keys = pages.shape[1] // self.key_bytes
        codes, scales = pages.split((num_keys * self.num_code_bytes, num_keys * self.num_scale_bytes), dim=1)
        per_key = (codes.reshape(-1, self.num_code_bytes), scales.reshape(-1, self.num_scale_bytes))
        return torch.cat(per_key, 1)

    def rounded(self, keys_EH: Tensor) -> Tensor:
        """Returns what would be read of keys once they were written, in their dtype."""
        return self.decode(*self.encode(keys_EH), keys_EH.dtype)

    def _split(self, pages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns codes and scales as views [P, R, bytes], and the place of each row in them."""
        num_keys = pages.shape[1] // self.key_bytes
        parts = pages.split((num_keys * self.num_code_bytes, num_keys * self.num_scale_bytes), dim=1)
        codes, scales = (part.unflatten(1, (num_keys, -1)) for part in parts)
        return codes, scales, rows // num_keys, rows % num_keys


def encode_keys(keys_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes keys of 512 channels: codes and rotary channels uint8 [E, 576], scales and a pad byte [E, 8].

    A block of 64 channels has the scale of ``fake_quantize_fp8``; E8M0 255 where a channel is not finite.
    """
    plain = keys_EH[:, :PLAIN].float().unflatten(1, (-1, KEY_BLOCK))
    rotary = keys_EH[:, PLAIN:].bfloat16().contiguous()
    scales = encode_e8m0_ceil(plain.abs().amax(-1).clamp(min=FP8_AMAX_FLOOR), E4M3_MAX)
    codes = encode_e4m3(plain / decode_e8m0(scales)[..., None]).flatten(1)
    tail = torch.nn.functional.pad(scales.view(torch.uint8), (0, 1))
    return torch.cat((codes.view(torch.uint8), rotary.view(torch.uint8)), 1), tail


def decode_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decodes keys [E, 512]; exact in bfloat16 and wider."""
    wide = torch.promote_types(dtype, torch.float32)
    factors = decode_e8m0(scales[:, : PLAIN // KEY_BLOCK].contiguous(), wide)[:, :, None]
    plain = decode_e4m3(codes[:, :PLAIN].contiguous(), wide).unflatten(1, (-1, KEY_BLOCK)) * factors
    rotary = codes[:, PLAIN:].contiguous().view(torch.bfloat16)
    return torch.cat((plain.flatten(1).to(dtype), rotary.to(dtype)), dim=1)


def encode_index_keys(keys_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes index keys: E4M3 as uint8 [E, H], and a power-of-two float32 scale as uint8 [E, 4].

    Exact for keys rounded to E2M1, unless the scales of a key's blocks span more than 2^14.
    """
    wide = keys_EH.float()
    scales_E1 = decode_e8m0(encode_e8m0_ceil(wide.abs().amax(-1, keepdim=True), E4M3_MAX))
    codes, own = encode_e4m3(wide / scales_E1), scales_E1.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.uint8), own.view(torch.uint8)


def decode_index_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decodes index keys [E, H]; exact in bfloat16 and wider for scales that are powers of two."""
    wide = torch.promote_types(dtype, torch.float32)
    return (decode_e4m3(codes.contiguous(), wide) * scales.contiguous().view(torch.float32).to(wide)).to(dtype)


def encode_fp4_index_keys(keys_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes index keys: E2M1, two to a byte, uint8 [E, H / 2], and an E8M0 scale per 32 channels [E, H / 32].

    Rounds as ``fake_quantize_fp4``, so it is exact for what that has rounded. The scale is 255 where a channel is not
    finite.
    """
    blocks = keys_EH.float().unflatten(1, (-1, INDEX_BLOCK))
    scales = encode_e8m0_ceil(blocks.abs().amax(-1), E2M1_MAX)
    codes = round_to_e2m1_code(blocks / decode_e8m0(scales)[..., None]).flatten(1)
    return pack_e2m1(codes), scales.view(torch.uint8)


def decode_fp4_index_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decodes index keys [E, H]; exact in bfloat16 and wider."""
    wide = torch.promote_types(dtype, torch.float32)
    blocks = decode_packed_e2m1(codes.contiguous(), wide).unflatten(1, (-1, INDEX_BLOCK))
    keys: Tensor = blocks * decode_e8m0(scales.contiguous(), wide)[..., None]
    return keys.flatten(1).to(dtype)


KEY_PAGES = PageForm(FP8_KEY_DIM, PLAIN + 2 * FP8_KEY_ROTARY, PLAIN // KEY_BLOCK + 1, encode_keys, decode_keys)
INDEX_PAGES = PageForm(FP8_INDEX_DIM, FP8_INDEX_DIM, 4, encode_index_keys, decode_index_keys)
FP4_INDEX_PAGES = PageForm(
    FP8_INDEX_DIM, FP8_INDEX_DIM // 2, FP8_INDEX_DIM // INDEX_BLOCK, encode_fp4_index_keys, decode_fp4_index_keys
)
INDEX_FORMS = {KeyFormat.FP8: INDEX_PAGES, KeyFormat.FP4: FP4_INDEX_PAGES}
"""The pages that index keys may have."""


def index_form(pages: Tensor, num_keys: int) -> PageForm:
    """Returns the form of pages uint8 [P, num_keys * key_bytes] of index keys. Errors: ValueError naming the bytes."""
    key_bytes = pages.shape[1] // num_keys
    for form in INDEX_FORMS.values():
        if form.key_bytes == key_bytes and pages.shape[1] == num_keys * key_bytes:
            return form
    forms = " or ".join(str(form.key_bytes) for form in INDEX_FORMS.values())
    raise ValueError(f"a page of {num_keys} index keys has {forms} bytes a key, found {pages.shape[1]} in all")
