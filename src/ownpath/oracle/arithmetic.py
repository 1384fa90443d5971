"""The oracle's arithmetic and its shared parts: products, norms, and a record of every slot's result.

In float64 without ``narrow``, it is the forward's definition. With ``narrow``, every result is rounded where an engine
of that dtype rounds: once for each slot. The difference between the two is the effect of rounding alone, from which
budgets are made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ownpath.checkpoint.schema import Encoding
from ownpath.config import ModelConfig
from ownpath.formats import FP8_BLOCK, FP32, NVFP4, CacheFormat
from ownpath.official import PLAIN, Step
from ownpath.oracle.formats import fp8, nvfp4_without_global
from ownpath.oracle.formulas import Mixing, collapse, rms
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.plan import Plan

_INPUT_BLOCK = 128


@dataclass(frozen=True)
class Arithmetic:
    """dtype: float64 or float32, in which everything is computed (the checkpoint must be ``StoredWeights`` in it).

    narrow: the dtype that results are rounded to. official: steps that round as published. w4a4: inputs of NVFP4
    weights are rounded to NVFP4. w8a8: inputs of FP8 linears (experts and ``wo_a`` are none) are rounded to E4M3 as the
    engine's W8A8 kernels do. cache_format: of keys, which rounds them.

    float32 on CUDA means IEEE float32: torch's default. With TF32 products allowed, it would be another reference.
    """

    dtype: torch.dtype = torch.float64
    narrow: torch.dtype | None = None
    w4a4: bool = False
    official: frozenset[Step] = PLAIN
    w8a8: bool = False
    cache_format: CacheFormat = CacheFormat.BF16

    @property
    def has_nvfp4_inputs(self) -> bool:
        return self.w4a4 or Step.NVFP4_INPUTS in self.official

    def round(self, x: Tensor) -> Tensor:
        """Rounds a result as an engine stores it."""
        return x if self.narrow is None else x.to(self.narrow).to(self.dtype)


@dataclass(frozen=True)
class OracleRun:
    """One forward of the oracle. encodings: how each matrix is stored, by module. values: each slot's result."""

    config: ModelConfig
    stored: StoredWeights
    encodings: Mapping[str, Encoding]
    arithmetic: Arithmetic
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: StoredWeights, plan: Plan, arithmetic: Arithmetic, prefix: str = "") -> "OracleRun":
        """Starts a forward. prefix: of the modules that it will read."""
        assert stored.dtype is arithmetic.dtype, "weights and sums have one dtype"
        modules = ((module.name, op.encoding) for op in plan.ops for module in (*op.spec.modules, *op.elsewhere))
        encodings = {name: encoding for name, encoding in modules if name.startswith(prefix)}
        return cls(plan.config, stored, encodings, arithmetic)

    def record(self, name: str, value: Tensor) -> Tensor:
        """Records ``value`` as an engine would store it, and returns it."""
        self.values[name] = kept = self.arithmetic.round(value)
        return kept

    def record_wide(self, name: str, value: Tensor) -> Tensor:
        """As ``record``, for a value that an engine stores in at least float32."""
        self.values[name] = value
        return value

    def linear(self, slot: str, x: Tensor, *modules: str) -> Tensor:
        """Multiplies x with matrices that share it, side by side, as one slot's result."""
        of_fp8 = [module for module in modules if self.encodings[module].format is FP8_BLOCK]
        if not (self.arithmetic.w8a8 and of_fp8):
            return self.record(slot, self.products(x, *modules))
        is_e8m0 = all(self._has_e8m0_scales(module) for module in of_fp8)
        rounded = fp8(x, _INPUT_BLOCK, is_e8m0).to(x.dtype)
        parts = [self.products(rounded if module in of_fp8 else x, module) for module in modules]
        return self.record(slot, torch.cat(parts, -1))

    def wide_linear(self, slot: str, x: Tensor, *modules: str) -> Tensor:
        """As ``linear``, for a slot whose result stays at least float32."""
        return self.record_wide(slot, self._side_by_side(x, modules, is_wide=True))

    def products(self, x: Tensor, *modules: str) -> Tensor:
        """Computes x Wᵀ for each W side by side, not rounded."""
        return self._side_by_side(x, modules, is_wide=False)

    def matrix(self, module: str) -> Tensor:
        """Returns a whole matrix as an engine that decodes it at load holds it."""
        return self.arithmetic.round(self.stored.matrix(module, self.encodings[module]).float().to(self.stored.dtype))

    def _side_by_side(self, x: Tensor, modules: tuple[str, ...], is_wide: bool) -> Tensor:
        """Quantises the inputs once, for all matrices, where they are quantised at all."""
        input_scale = self._input_scale(modules) if self.arithmetic.has_nvfp4_inputs else None
        return torch.cat([self._product(x, module, input_scale, is_wide) for module in modules], -1)

    def _has_e8m0_scales(self, module: str) -> bool:
        return self.stored.index[self.encodings[module].key(module, "scale")].dtype == "F8_E8M0"

    def _input_scale(self, modules: tuple[str, ...]) -> Tensor | None:
        """Returns the largest input scale of several matrices that share their input, so that none saturates more than
        alone."""
        found = [self.stored.input_scale(module, self.encodings[module]) for module in modules]
        scales = [scale for scale in found if scale is not None]
        return torch.stack(scales).max() if scales else None

    def _product(self, x: Tensor, module: str, input_scale: Tensor | None, is_wide: bool) -> Tensor:
        encoding = self.encodings[module]
        weight, global_scale = self.stored.factors(module, encoding)
        if encoding.format is NVFP4:
            assert global_scale is not None
            if input_scale is None:
                if Step.FP8_EXPERTS in self.arithmetic.official and ".experts." in module:
                    x = fp8(x, _INPUT_BLOCK).to(x.dtype)
                return (x @ weight.T) * global_scale.to(x.dtype)
            codes = nvfp4_without_global(x.flatten(0, -2), input_scale).to(x.dtype)
            y = (codes @ weight.T) * (input_scale * global_scale).to(x.dtype)
            return y.view(*x.shape[:-1], -1)
        if encoding.format.block is not None and Step.FP8_INPUTS in self.arithmetic.official:
            x = fp8(x, _INPUT_BLOCK).to(x.dtype)
        elif encoding.format is FP32 and not is_wide:
            weight = self.arithmetic.round(weight)
        return x @ weight.T

    def norm(self, slot: str, x: Tensor, weight_key: str) -> Tensor:
        """Applies an RMS norm with a weight, as one slot's result."""
        return self.record(slot, rms(x, self.config.rms_norm_eps) * self.stored.param(weight_key))

    def mixing(self, slot: str) -> Mixing:
        """Reads the weights of a boundary."""
        config = self.config
        fn, scale, base = (self.stored.param(f"{slot}_{name}") for name in ("fn", "scale", "base"))
        return Mixing(fn, scale, base, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)

    def read_streams(self, slot: str, norm_key: str, x_TSD: Tensor, pre_TS: Tensor) -> Tensor:
        """Computes a sublayer's normed input [T, D]; rounded before and after the norm."""
        return self.norm(f"{slot}.h", self.arithmetic.round(collapse(x_TSD, pre_TS)), norm_key)
