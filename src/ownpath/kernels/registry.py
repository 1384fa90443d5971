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
        "cute.nvfp4_linear": "nvfp4.linear:nvfp4_linear",
        "cute.nvfp4_linear_invariant": "nvfp4.linear:nvfp4_linear_invariant",
        "cute.nvfp4_moe": "nvfp4.moe:nvfp4_moe",
        "cute.nvfp4_moe_invariant": "nvfp4.moe:nvfp4_moe_invariant",
        "ref.nvfp4_linear": "nvfp4.ref:nvfp4_linear",
        "triton.nvfp4_linear_w4a4_sm100": "nvfp4_sm100.launch:nvfp4_linear_w4a4",
        "triton.nvfp4_linear_w4a4_sm100_invariant": "nvfp4_sm100.launch:nvfp4_linear_w4a4_invariant",
        "triton.nvfp4_moe_w4a4_sm100": "nvfp4_sm100.launch:nvfp4_moe_w4a4",
        "triton.nvfp4_moe_w4a4_sm100_invariant": "nvfp4_sm100.launch:nvfp4_moe_w4a4_invariant",
        "cute.fp8_linear_sm90": "fp8.launch:fp8_linear",
        "cute.fp8_linear_w8a16_sm90_invariant": "fp8.launch:fp8_linear_invariant",
        "ref.fp8_linear": "fp8.ref:fp8_linear",
        "torch.plain_linear": "plain.cublas:plain_linear",
        "triton.plain_linear_invariant": "plain.invariant:plain_linear_invariant",
        "ref.plain_linear": "plain.ref:plain_linear",
        "ref.grouped_linear": "grouped.ref:rope_grouped_linear",
        "ref.nvfp4_moe": "nvfp4.ref:nvfp4_moe",
        "ref.fp8_moe": "fp8.ref:fp8_moe",
        "ref.plain_moe": "plain.ref:plain_moe",
        "ref.moe_quantized_inputs": "official_experts.ref:moe_quantized_inputs",
        "ref.moe_weight_first": "official_experts.ref:moe_weight_first",
        "ref.moe_official": "official_experts.ref:moe_official",
        "ref.rms_norm_stepwise": "norms.ref:rms_norm_stepwise",
        "ref.fp8_keys": "cache_formats.ref:fp8_keys",
        "ref.fp4_index": "cache_formats.ref:fp4_index",
        "ref.hyper_boundary": "hyper.ref:hyper_boundary",
        "ref.rms_norm": "norms.ref:rms_norm",
        "ref.router": "router.ref:router",
        "ref.swiglu": "swiglu.ref:swiglu",
        "ref.attention": "attention.ref:attend",
        "triton.hyper_boundary": "hyper.launch:hyper_boundary",
        "triton.hyper_boundary_invariant": "hyper.launch:hyper_boundary_invariant",
        "triton.rms_norm": "norms.launch:rms_norm",
        "triton.router": "router.launch:router",
        "triton.swiglu": "swiglu.launch:swiglu",
        "triton.grouped_linear": "grouped.launch:rope_grouped_linear",
        "triton.grouped_linear_invariant": "grouped.launch:rope_grouped_linear_invariant",
    }
)

VARIANTS = Registry(
    {
        "cute.nvfp4_linear": "nvfp4.linear:nvfp4_linear.variant",
        "cute.nvfp4_linear_invariant": "nvfp4.linear:nvfp4_linear_invariant.variant",
        "cute.nvfp4_moe": "nvfp4.moe:nvfp4_moe.variant",
        "cute.nvfp4_moe_invariant": "nvfp4.moe:nvfp4_moe_invariant.variant",
        "cute.fp8_linear_sm90": "fp8.launch:fp8_linear.variant",
        "cute.fp8_linear_w8a16_sm90_invariant": "fp8.launch:fp8_linear_invariant.variant",
        "triton.nvfp4_linear_w4a4_sm100": "variants:linear_w4a4",
        "triton.nvfp4_linear_w4a4_sm100_invariant": "variants:linear_w4a4_invariant",
        "triton.nvfp4_moe_w4a4_sm100": "variants:moe_w4a4",
        "triton.nvfp4_moe_w4a4_sm100_invariant": "variants:moe_w4a4_invariant",
        "triton.plain_linear_invariant": "variants:plain_linear",
        "triton.hyper_boundary": "variants:hyper_boundary",
        "triton.hyper_boundary_invariant": "variants:hyper_boundary_invariant",
        "triton.rms_norm": "variants:rms_norm",
        "triton.router": "variants:router",
        "triton.swiglu": "variants:swiglu",
        "triton.grouped_linear": "variants:grouped_linear",
        "triton.grouped_linear_invariant": "variants:grouped_linear_invariant",
    }
)
"""Kernel name -> which of its compiled configurations a call launches, by name, from the call's arguments without
those that results are written to. A kernel that is not here has one form only."""
