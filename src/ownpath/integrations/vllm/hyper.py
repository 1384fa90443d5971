"""Our hyper-connections in place of vLLM's: one guarded patch of the names that a file of vLLM's V4 model calls.

The seam. V4's model file for NVIDIA imports five functions, that for CPUs four classes, and calls them by these names;
nothing else calls them through this file, so replacing the names there changes V4 and no other model. All of them come
down to three operations: ``boundary`` (post of one sublayer, pre and norm of the next), ``post`` and ``head``.

On Hopper ``boundary`` is our Triton kernel, and ``post`` and ``head``, one call of each a step, are torch; elsewhere,
and if torch is asked for, all three are the reference, whose mixing is float32 as in our own model.

Legend: T tokens, S streams, D hidden, M = (2 + S) * S. Mixes are vLLM's: post [T, S, 1], comb [T, S, S].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ownpath.integrations.vllm.versions import VllmRefusal
from ownpath.kernels.hyper.ref import HyperWeights, Mix, hyper_post, hyper_pre
from ownpath.runners.companions import HyperBoundary

CHOICE = "OWNPATH_VLLM_HYPER"
"""The variable that asks for the torch reference of our hyper-connections on every device: ``torch``."""
REFERENCE, HOPPER, HOPPER_INVARIANT = "ref.hyper_boundary", "triton.hyper_boundary", "triton.hyper_boundary_invariant"
POST_ALPHA = 2.0
MIXING = ("fn", "hc_scale", "hc_base", "rms_eps", "hc_pre_eps", "hc_sinkhorn_eps", "hc_post_mult_value",
          "sinkhorn_repeat")  # fmt: skip
"""The arguments behind the streams, in vLLM's order."""
PRE = (*MIXING, "n_splits", "norm_weight", "norm_eps")
BROADCAST = (*PRE, "fn_broadcast")
FUSED = (*MIXING, "n_splits", "tile_n", "norm_weight", "norm_eps")
Passed: TypeAlias = Any
"""A tensor, a number or ``None``: what vLLM passes."""


def choose_kernel(environment: Mapping[str, str], sm: int | None, is_batch_invariant: bool = False) -> str:
    """Returns the kernel of the boundary.

    sm: compute capability times ten, ``None`` without CUDA. Errors: VllmRefusal for a choice that is none.
    """
    asked = environment.get(CHOICE, "")
    if asked not in ("", "ours", "torch"):
        raise VllmRefusal(
            f"{CHOICE} is {asked!r}: it can be 'ours' or 'torch'; OWNPATH_VLLM without hyper is vLLM's own"
        )
    if asked == "torch" or sm != 90:
        return REFERENCE
    return HOPPER_INVARIANT if is_batch_invariant else HOPPER


class Hyper:
    """The three operations with one kernel. Weights are vLLM's parameters, read where they lie."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._runners: dict[tuple[int, ...], HyperBoundary] = {}

    def boundary(self, x_TSD: Tensor, y_TD: Tensor | None, mix: Mix | None, weights: HyperWeights) -> list[Tensor]:
        """Returns new streams, the next sublayer's normed input [T, D], post [T, S] and comb [T, S, S]."""
        if torch.compiler.is_compiling():
            return self._opaque(x_TSD, y_TD, mix, weights)
        return self.run(x_TSD, y_TD, mix, weights)

    def run(self, x_TSD: Tensor, y_TD: Tensor | None, mix: Mix | None, weights: HyperWeights) -> list[Tensor]:
        """Computes ``boundary`` directly, also while torch compiles."""
        found = self._runner(weights).run(x_TSD, y_TD, mix)
        assert found.mix is not None
        return [found.x_TSD, found.h_TD, *found.mix]

    def _opaque(self, x: Tensor, y: Tensor | None, mix: Mix | None, weights: HyperWeights) -> list[Tensor]:
        """Computes ``boundary`` as one operation that a compiler does not look into."""
        post, comb = (None, None) if mix is None else mix
        tensors = [weights.fn, weights.base, weights.scale, weights.norm_weight]
        settings = [float(weights.num_iters), weights.eps, weights.mix_norm_eps, weights.norm_eps]
        return list(torch.ops.ownpath_vllm_hyper.boundary(x, y, post, comb, tensors, settings, self.kernel))

    def _runner(self, weights: HyperWeights) -> HyperBoundary:
        """Returns a boundary's runner, made at its first call. It keeps the parameters, so no address is reused."""
        tensors = weights.fn, weights.base, weights.scale, weights.norm_weight
        key = tuple(tensor.data_ptr() for tensor in tensors)
        found = self._runners.get(key)
        if found is None:
            found = self._runners[key] = HyperBoundary(weights, kernel=self.kernel)
        return found

    def pre(self, residual: Tensor, *given: Passed, **named: Passed) -> tuple[Tensor, Tensor, Tensor]:
        """Computes vLLM's ``mhc_pre``: streams [T, S, D] -> post, comb, layer input, normed if a norm is given."""
        _, post, comb, h = self._mixed(residual, None, None, _bind(PRE, given, named))
        return post, comb, h

    def pre_broadcast(self, residual: Tensor, *given: Passed, **named: Passed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes ``mhc_pre`` of the embedding [T, D], S times: -> streams, post, comb, layer input.

        vLLM's sum of fn over streams, ``fn_broadcast``, is not used: its products would be summed in another order.
        """
        bound = _bind(BROADCAST, given, named)
        num_streams = bound["fn"].shape[1] // residual.shape[-1]
        streams = residual.unsqueeze(-2).expand(*residual.shape[:-1], num_streams, -1).contiguous()
        return self._mixed(streams, None, None, bound)

    def fused(
        self, x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor, *given: Passed, **named: Passed
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes ``mhc_fused_post_pre``: a sublayer's output and its mix -> streams, post, comb, layer input."""
        bound = _bind(FUSED, given, named)
        return self._mixed(residual, x, Mix(post_layer_mix, comb_res_mix), bound)

    def _mixed(
        self, residual: Tensor, y: Tensor | None, mix: Mix | None, bound: Mapping[str, Passed]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns streams, post, comb and layer input."""
        x_TSD = residual.contiguous()
        y_TD = None if y is None else y.contiguous()
        flat = None if mix is None else Mix(mix.post_TS.flatten(-2), mix.comb_TSS)
        if bound.get("norm_weight") is None:
            streams, h, post, comb = self._unnormed(x_TSD, y_TD, flat, bound)
        else:
            streams, h, post, comb = self.boundary(x_TSD, y_TD, flat, _weights(bound, bound["norm_weight"]))
        return streams, post.unsqueeze(-1), comb, h

    def _unnormed(
        self, x_TSD: Tensor, y_TD: Tensor | None, mix: Mix | None, bound: Mapping[str, Passed]
    ) -> list[Tensor]:
        """Computes ``boundary`` without the norm, where vLLM's layer has a norm of its own; always the reference."""
        weights = _weights(bound, x_TSD.new_empty(0))
        if torch.compiler.is_compiling():
            return self._opaque(x_TSD, y_TD, mix, weights)
        return unnormed(x_TSD, y_TD, mix, weights)

    def post(self, x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
        """Computes vLLM's ``mhc_post``: a sublayer's output, streams and mix -> new streams."""
        compute = torch.ops.ownpath_vllm_hyper.post if torch.compiler.is_compiling() else _post
        streams: Tensor = compute(x, residual, post_layer_mix, comb_res_mix)
        return streams

    def head(self, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rms_eps: float, eps: float) -> Tensor:
        """Computes vLLM's ``hc_head``: the streams after the last sublayer -> [T, D], before the final norm."""
        compute = torch.ops.ownpath_vllm_hyper.head if torch.compiler.is_compiling() else _head
        h: Tensor = compute(streams, fn, scale, base, rms_eps, eps)
        return h


def unnormed(x_TSD: Tensor, y_TD: Tensor | None, mix: Mix | None, weights: HyperWeights) -> list[Tensor]:
    """Computes streams, layer input, post and comb of the reference, without the norm."""
    if y_TD is not None:
        assert mix is not None
        x_TSD = hyper_post(x_TSD, y_TD, mix)
    h_TD, new_mix = hyper_pre(x_TSD, weights)
    assert new_mix is not None
    return [x_TSD, h_TD, *new_mix]


def _bind(names: Sequence[str], given: Sequence[Passed], named: Mapping[str, Passed]) -> dict[str, Passed]:
    """Names vLLM's arguments. Errors: TypeError for one that is not among ``names``."""
    bound = {**dict(zip(names, given, strict=False)), **named}
    unknown = set(named) - set(names)
    if unknown or len(given) > len(names):
        raise TypeError(f"hyper-connections take no {sorted(unknown) or list(given[len(names) :])}")
    return bound


def _weights(bound: Mapping[str, Passed], norm_weight: Tensor) -> HyperWeights:
    """Makes a boundary's weights. Errors: ValueError naming a setting that V4 does not have."""
    if bound["hc_pre_eps"] != bound["hc_sinkhorn_eps"]:
        raise ValueError(f"hc_pre_eps {bound['hc_pre_eps']} and hc_sinkhorn_eps {bound['hc_sinkhorn_eps']} must be one")
    if bound["hc_post_mult_value"] != POST_ALPHA:
        raise ValueError(f"hc_post_mult_value must be {POST_ALPHA}, found {bound['hc_post_mult_value']}")
    return HyperWeights(
        bound["fn"],
        bound["hc_base"],
        bound["hc_scale"],
        norm_weight,
        bound["sinkhorn_repeat"],
        bound["hc_pre_eps"],
        bound["rms_eps"],
        bound.get("norm_eps", 0.0),
    )


class Hypers:
    """The operations of the model that was built last, by kernel: a compiled graph names the kernel."""

    def __init__(self) -> None:
        self._living: WeakValueDictionary[str, Hyper] = WeakValueDictionary()

    def new(self, kernel: str) -> Hyper:
        """Makes the operations of a model."""
        made = self._living[kernel] = Hyper(kernel)
        return made

    def find(self, kernel: str) -> Hyper:
        """Returns the operations with a kernel. Errors: ValueError where no living model has it."""
        found = self._living.get(kernel)
        if found is None:
            raise ValueError(f"no model in this process has hyper-connections with {kernel}")
        return found


HYPERS = Hypers()
LIBRARY = torch.library.Library("ownpath_vllm_hyper", "DEF")


def _boundary(
    x: Tensor, y: Tensor | None, post: Tensor | None, comb: Tensor | None, tensors: list[Tensor],
    settings: list[float], kernel: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes ``boundary``, or ``unnormed`` for a norm without elements; no result aliases an argument."""
    fn, base, scale, norm = tensors
    num_iters, *eps = settings
    weights = HyperWeights(fn, base, scale, norm, int(num_iters), *eps)
    mix = None if post is None or comb is None else Mix(post, comb)
    streams, *rest = HYPERS.find(kernel).run(x, y, mix, weights) if len(norm) else unnormed(x, y, mix, weights)
    return (streams.clone() if streams.data_ptr() == x.data_ptr() else streams), *rest


def _fake_boundary(
    x: Tensor, y: Tensor | None, post: Tensor | None, comb: Tensor | None, tensors: list[Tensor],
    settings: list[float], kernel: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    num_tokens, s, dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    mixes = x.new_empty((num_tokens, s), dtype=wide), x.new_empty((num_tokens, s, s), dtype=wide)
    return x.new_empty(x.shape), x.new_empty((num_tokens, dim)), *mixes


def _post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return hyper_post(residual, x, Mix(post.flatten(-2), comb))


def _fake_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rms_eps: float, eps: float) -> Tensor:
    return hyper_pre(streams, HyperWeights(fn, base, scale, base, 0, eps, rms_eps, 0.0))[0]


def _fake_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rms_eps: float, eps: float) -> Tensor:
    return streams.new_empty((streams.shape[0], streams.shape[2]))


def _define(schema: str, function: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)


_define(
    "boundary(Tensor x, Tensor? y, Tensor? post, Tensor? comb, Tensor[] weights, float[] settings, str kernel)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _boundary,
    _fake_boundary,
)
_define("post(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor", _post, _fake_post)
_define(
    "head(Tensor streams, Tensor fn, Tensor scale, Tensor base, float rms_eps, float eps) -> Tensor", _head, _fake_head
)
