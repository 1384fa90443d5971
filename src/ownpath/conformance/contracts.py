"""Checks contracts (K10): meaningless calls are refused, unusual but meaningful ones give the same result, and results
are as wide as the activations."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ownpath.conformance.call import KernelCall, tensors_of
from ownpath.ops import OpKind

NEAR = 2.0**-6
"""Relative tolerance for other strides: a library may sum in another order, which moves BF16 results by 2^-8 at
most; elements read from the wrong place are off by their own size."""


def contract_problems(call: KernelCall) -> Iterator[str]:
    """Yields one string per possible violation: a description, or empty where there is none."""
    for wrong, args in invalid_calls(call):
        yield "" if _is_refused(call.with_args(*args)) else f"{wrong}: not refused"
    for strange, args in strided_calls(call):
        is_fine = _is_same_or_refused(call, call.with_args(*args))
        yield "" if is_fine else f"{strange}: neither refused nor computed as it is"
    yield from (f"a result in {dtype}, of activations in {call.args[0].dtype}" for dtype in _narrow_results(call))


def _narrow_results(call: KernelCall) -> Iterator[torch.dtype]:
    """Yields dtypes of results that hold less than the activations do; a mix within a result is K08's."""
    try:
        result = call()
    except Exception:  # K02 reports it
        return
    parts = result if isinstance(result, tuple) else (result,)
    floats = (part.dtype for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point())
    yield from (dtype for dtype in floats if dtype.itemsize < call.args[0].dtype.itemsize)


def _is_refused(call: KernelCall) -> bool:
    try:
        call()
    except Exception:  # a refusal may be any error, as long as it is one
        return True
    return False


def _is_same_or_refused(call: KernelCall, strange: KernelCall) -> bool:
    """True if a call with unusual strides is refused or gives the same result as without them."""
    try:
        found = list(tensors_of(strange()))
    except Exception:  # refused
        return True
    return all(_same(a, b) for a, b in zip(found, tensors_of(call()), strict=True))


def _same(found: torch.Tensor, usual: torch.Tensor) -> bool:
    if not usual.is_floating_point():
        return torch.equal(found, usual)
    return bool((found.double() - usual.double()).norm() <= NEAR * usual.double().norm())


def invalid_calls(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields (fault, arguments) of calls without a meaning."""
    x, *rest = call.args
    if call.is_product:
        yield "integer activations", (x.to(torch.int32), *rest)
        yield "activations on another device", (torch.empty_like(x, device="meta"), *rest)
        yield "one feature too few", (x[..., :-1].contiguous(), *rest)
    yield from _MORE.get(call.kind, _nothing)(call)


def strided_calls(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields activations whose rows, or whose features, are not contiguous."""
    x, *rest = call.args
    apart = x.new_zeros(len(x), 2, *x.shape[1:])
    apart[:, 0] = x
    yield "rows with gaps between them", (apart[:, 0], *rest)
    yield "features with gaps between them", (torch.stack((x, x), dim=-1)[..., 0], *rest)


def _nothing(_call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    return iter(())


def _experts(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, ids, weights = call.args
    yield "expert ids as floats", (x, ids.float(), weights)
    yield "expert ids of another number of tokens", (x, torch.cat((ids, ids[:1])), weights)
    yield "weights of another number of slots", (x, ids, torch.cat((weights, weights[:, :1]), 1))
    yield "weights as float16", (x, ids, weights.half())


def _hyper(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x_TSD, y_TD, mix = call.args
    yield "an output without its mix", (x_TSD, y_TD, None)
    yield "a stream too few", (x_TSD[:, :-1].contiguous(), y_TD, mix)
    yield "an output of another width", (x_TSD, y_TD[:, :-1].contiguous(), mix)
    yield "a second part of another width", (x_TSD, y_TD, mix, y_TD[:, :-1].contiguous())
    yield "a second part of no output", (x_TSD, None, None, y_TD)


def _norm(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    (x,) = call.args
    if getattr(call.run, "weight", None) is not None:
        yield "one feature too few", (x[..., :-1].contiguous(),)


def _router(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, token_ids = call.args
    yield "one feature too few", (x[..., :-1].contiguous(), token_ids)
    if getattr(call.run, "tid2eid_VK", None) is not None:
        yield "token ids of another number of tokens", (x, token_ids[:-1])


def _attention(call: KernelCall) -> Iterator[tuple[str, tuple[Any, ...]]]:
    q_tNH, keys_KH, visible_tK = call.args
    yield "keys of another width", (q_tNH, keys_KH[:, :-1].contiguous(), visible_tK)
    yield "a mask of another number of keys", (q_tNH, keys_KH, visible_tK[:, :-1])


_MORE: dict[OpKind, Callable[[KernelCall], Iterator[tuple[str, tuple[Any, ...]]]]] = {
    OpKind.MOE: _experts,
    OpKind.HYPER: _hyper,
    OpKind.NORM: _norm,
    OpKind.ROUTER: _router,
    OpKind.ATTENTION: _attention,
}
