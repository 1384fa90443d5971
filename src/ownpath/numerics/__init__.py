"""Definitions of the number formats, in plain torch on any device. Kernels are compared with these."""

from ownpath.numerics.dequantize import (
    decode_fp8_block,
    decode_mxfp4_blocks,
    decode_mxfp8_blocks,
    decode_nvfp4_blocks,
    dequantize,
)
from ownpath.numerics.e2m1 import (
    E2M1_MAGNITUDES,
    E2M1_MAX,
    decode_e2m1,
    decode_packed_e2m1,
    encode_e2m1,
    pack_e2m1,
    unpack_e2m1,
)
from ownpath.numerics.e4m3 import E4M3_MAX, decode_e4m3, encode_e4m3
from ownpath.numerics.e8m0 import decode_e8m0, e8m0_from_bytes, encode_e8m0_ceil
from ownpath.numerics.fake_quant import (
    FP8_AMAX_FLOOR,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard,
    nvfp4_codes_times_scales,
)
from ownpath.numerics.mxfp4 import ScaleSpanError, mxfp4_as_nvfp4, mxfp4_scale_as_nvfp4
from ownpath.numerics.pages import FP4_INDEX_PAGES, INDEX_FORMS, INDEX_PAGES, KEY_PAGES, PageForm, index_form
from ownpath.numerics.quantize import (
    nvfp4_global_scale,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_nvfp4_activation,
)
from ownpath.numerics.rotary import rotate_pairs, wide_dtype

__all__ = [
    "E2M1_MAGNITUDES",
    "E2M1_MAX",
    "E4M3_MAX",
    "FP4_INDEX_PAGES",
    "FP8_AMAX_FLOOR",
    "INDEX_FORMS",
    "INDEX_PAGES",
    "KEY_PAGES",
    "PageForm",
    "ScaleSpanError",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "decode_fp8_block",
    "decode_mxfp4_blocks",
    "decode_mxfp8_blocks",
    "decode_nvfp4_blocks",
    "decode_packed_e2m1",
    "dequantize",
    "e8m0_from_bytes",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e8m0_ceil",
    "fake_quantize_fp4",
    "fake_quantize_fp8",
    "hadamard",
    "index_form",
    "mxfp4_as_nvfp4",
    "mxfp4_scale_as_nvfp4",
    "nvfp4_codes_times_scales",
    "nvfp4_global_scale",
    "pack_e2m1",
    "quantize_fp8_block",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "quantize_nvfp4_activation",
    "rotate_pairs",
    "unpack_e2m1",
    "wide_dtype",
]
