"""The implementations behind the kernel names of the plan's catalogue, imported when one is first asked for."""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

Kernel = Callable[..., Any]


class Registry(Mapping[str, Kernel]):
    """Kernel name -> implementation. A name whose module needs an extra does not need it until it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Kernel:
        module, _, attribute = self._places[name].partition(":")
        kernel: Kernel = attrgetter(attribute)(import_module(f"ownpath.kernels.{module}"))
        return kernel

    def place(self, name: str) -> str:
        """Where an implementation is, as ``module:attribute`` in ``ownpath.kernels``."""
        return self._places[name]

    def name_of(self, kernel: Kernel) -> str | None:
        """The name that an implementation goes by; ``None`` for one that is not here."""
        for name, place in self._places.items():
            # Whoever holds an implementation has imported its module; the others may need what is not installed.
            module, _, attribute = place.partition(":")
            loaded = sys.modules.get(f"ownpath.kernels.{module}")
            if loaded is not None and attrgetter(attribute)(loaded) is kernel:
                return name
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


KERNELS = Registry(
    {
        "cute.nvfp4_linear": "cute.linear:nvfp4_linear",
        "cute.nvfp4_linear_invariant": "cute.linear:nvfp4_linear_invariant",
        "cute.nvfp4_moe": "cute.moe:nvfp4_moe",
        "cute.nvfp4_moe_invariant": "cute.moe:nvfp4_moe_invariant",
        "ref.nvfp4_linear": "ref.linear:nvfp4_linear",
        "triton.nvfp4_linear_w4a4_sm100": "triton.w4a4_sm100:nvfp4_linear_w4a4",
        "triton.nvfp4_linear_w4a4_sm100_invariant": "triton.w4a4_sm100:nvfp4_linear_w4a4_invariant",
        "triton.nvfp4_moe_w4a4_sm100": "triton.w4a4_sm100:nvfp4_moe_w4a4",
        "triton.nvfp4_moe_w4a4_sm100_invariant": "triton.w4a4_sm100:nvfp4_moe_w4a4_invariant",
        "cute.fp8_linear_sm90": "cute.fp8_launch:fp8_linear",
        "cute.fp8_linear_w8a16_sm90_invariant": "cute.fp8_launch:fp8_linear_invariant",
        "ref.fp8_linear": "ref.linear:fp8_linear",
        "torch.plain_linear": "cublas:plain_linear",
        "triton.plain_linear_invariant": "triton.plain:plain_linear_invariant",
        "ref.plain_linear": "ref.linear:plain_linear",
        "ref.grouped_linear": "ref.small:rope_grouped_linear",
        "ref.nvfp4_moe": "ref.moe:nvfp4_moe",
        "ref.fp8_moe": "ref.moe:fp8_moe",
        "ref.plain_moe": "ref.moe:plain_moe",
        "ref.moe_quantized_inputs": "ref.official:moe_quantized_inputs",
        "ref.moe_weight_first": "ref.official:moe_weight_first",
        "ref.moe_official": "ref.official:moe_official",
        "ref.rms_norm_stepwise": "ref.official:rms_norm_stepwise",
        "ref.fp8_keys": "ref.official:fp8_keys",
        "ref.fp4_index": "ref.official:fp4_index",
        "ref.hyper_boundary": "ref.hyper:hyper_boundary",
        "ref.rms_norm": "ref.small:rms_norm",
        "ref.router": "ref.small:router",
        "ref.swiglu": "ref.small:swiglu",
        "ref.attention": "ref.attention:attend",
        "triton.hyper_boundary": "triton.hyper:hyper_boundary",
        "triton.hyper_boundary_invariant": "triton.hyper:hyper_boundary_invariant",
        "triton.rms_norm": "triton.small:rms_norm",
        "triton.router": "triton.small:router",
        "triton.swiglu": "triton.small:swiglu",
        "triton.grouped_linear": "triton.grouped:rope_grouped_linear",
        "triton.grouped_linear_invariant": "triton.grouped:rope_grouped_linear_invariant",
    }
)

VARIANTS = Registry(
    {
        "cute.nvfp4_linear": "cute.linear:nvfp4_linear.variant",
        "cute.nvfp4_linear_invariant": "cute.linear:nvfp4_linear_invariant.variant",
        "cute.nvfp4_moe": "cute.moe:nvfp4_moe.variant",
        "cute.nvfp4_moe_invariant": "cute.moe:nvfp4_moe_invariant.variant",
        "cute.fp8_linear_sm90": "cute.fp8_launch:fp8_linear.variant",
        "cute.fp8_linear_w8a16_sm90_invariant": "cute.fp8_launch:fp8_linear_invariant.variant",
        "triton.nvfp4_linear_w4a4_sm100": "triton.variants:linear_w4a4",
        "triton.nvfp4_linear_w4a4_sm100_invariant": "triton.variants:linear_w4a4_invariant",
        "triton.nvfp4_moe_w4a4_sm100": "triton.variants:moe_w4a4",
        "triton.nvfp4_moe_w4a4_sm100_invariant": "triton.variants:moe_w4a4_invariant",
        "triton.plain_linear_invariant": "triton.variants:plain_linear",
        "triton.hyper_boundary": "triton.variants:hyper_boundary",
        "triton.hyper_boundary_invariant": "triton.variants:hyper_boundary_invariant",
        "triton.rms_norm": "triton.variants:rms_norm",
        "triton.router": "triton.variants:router",
        "triton.swiglu": "triton.variants:swiglu",
        "triton.grouped_linear": "triton.variants:grouped_linear",
        "triton.grouped_linear_invariant": "triton.variants:grouped_linear_invariant",
    }
)
"""Kernel name -> which of its compiled configurations a call launches, by name, from the call's arguments without
those that results are written to. A kernel that is not here has one form only."""
