"""A weight as stored: codes, block scales and a global scale, with the format that gives them meaning."""

from dataclasses import dataclass

import torch

from ownpath.formats import Format


@dataclass(frozen=True)
class QuantTensor:
    """A (possibly quantised) weight. ``value = qdata * scale * global_scale`` wherever the parts exist.

    Shapes (logical weight [..., N, K]; leading dimensions are experts):
        qdata: uint8 [..., N, K/2] for 4-bit formats (low nibble = even k); float8_e4m3fn [..., N, K];
            bfloat16 or float32 [..., N, K] for the plain formats.
        scale: NVFP4 float8_e4m3fn [..., N, K/16]; MXFP4 and MXFP8 float8_e8m0fnu [..., N, K/32];
            FP8_BLOCK float8_e8m0fnu or float32 [..., ceil(N/128), ceil(K/128)]; else ``None``.
        global_scale: NVFP4 float32 [...] (0-d for one matrix), a multiplier; else ``None``.
    layout: how the parts lie in memory; "row_major" is the checkpoint's own order.
    """

    qdata: torch.Tensor
    scale: torch.Tensor | None
    global_scale: torch.Tensor | None
    format: Format
    layout: str = "row_major"

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., N, K]."""
        *lead, k = self.qdata.shape
        return torch.Size([*lead, k * self.format.packed_per_byte])

    def of_expert(self, expert: int) -> "QuantTensor":
        """Returns one expert's matrix of a stack."""
        scale = None if self.scale is None else self.scale[expert]
        global_scale = None if self.global_scale is None else self.global_scale[expert]
        return QuantTensor(self.qdata[expert], scale, global_scale, self.format, self.layout)
