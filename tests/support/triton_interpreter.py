"""Corrects the arithmetic of Triton 3.6's CPU interpreter, for tests only.

As shipped it truncates float32 to bfloat16, rounds to FP8 wrongly, multiplies bfloat16 by multiplying bit patterns
(``a * b`` and ``tl.dot`` alike) and cannot run ``tl.dot_scaled``. ``install`` replaces those parts: every conversion
goes through torch, bfloat16 arithmetic is float32 arithmetic rounded once, and ``tl.dot_scaled`` decodes its operands.

Four parts of it took two thirds of the tests' time and do the same at less expense: the language as kernels see it,
which was made anew at every call of every function; NumPy's names of types; types of tuples, which nearly nobody asks
for; and whether integers overflow, which was computed and never asserted.

It reaches into private names, so it belongs to the pinned Triton version. Interpretation and compilation cannot share
a process: ``TRITON_INTERPRET=1`` must be in the environment before triton is first imported.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TORCH_FLOATS = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
STORED = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16), 4: (np.uint32, torch.uint32)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def _to_torch(data: np.ndarray, name: str) -> torch.Tensor:
    """The values of an array whose Triton element type is ``name``; bf16 and fp8 are held as unsigned integers."""
    dtype, data = TORCH_FLOATS[name], np.ascontiguousarray(data)
    if data.dtype.kind == "f":
        return torch.from_numpy(data)
    return torch.from_numpy(data.view(STORED[data.itemsize][0])).view(dtype)


def _round_to(values: torch.Tensor, name: str) -> np.ndarray:
    """Rounds to nearest even; FP8 saturates at its largest value, as the cvt.satfinite instructions do."""
    dtype = TORCH_FLOATS[name]
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        values = values.float().clamp(-largest, largest)
    rounded = values.to(dtype).contiguous()
    if name in ("fp16", "fp32", "fp64"):
        return rounded.numpy()
    return rounded.view(STORED[dtype.itemsize][1]).numpy()


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar.name == "bf16" and handle.data.dtype == np.uint16


def _widen(handle: Any) -> Any:
    """A bf16 handle as float32 values; anything else as it is."""
    if not _is_bf16(handle):
        return handle.data
    return _to_torch(handle.data, "bf16").float().numpy()


def _wide_op(interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """An elementwise op that computes bf16 in float32 and rounds once; other operands take the original way."""

    def run(self: Any, *arguments: Any) -> Any:
        handles, op = arguments[:-1], arguments[-1]
        if not any(_is_bf16(handle) for handle in handles):
            return original(self, *arguments)
        result = op(*(_widen(handle) for handle in handles))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, interpreter.tl.int1)
        return interpreter.TensorHandle(_round_to(torch.from_numpy(result), "bf16"), handles[-1].dtype.scalar)

    return run


def _cast(interpreter: Any) -> Callable[..., Any]:
    def run(self: Any, source: Any, dst_type: Any, rounding: Any = None) -> Any:
        if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"rounding mode {rounding}")
        # A comparison's handle keeps the type of its operands; only its data says that it is a truth value.
        src = "int1" if source.data.dtype == np.bool_ else source.dtype.scalar.name
        dst = dst_type.scalar.name
        dtype = interpreter._get_np_dtype(dst_type)
        if dst in TORCH_FLOATS:
            values = _to_torch(source.data, src) if src in TORCH_FLOATS else torch.from_numpy(source.data * 1.0)
            data = _round_to(values, dst)
        else:
            data = _to_torch(source.data, src).double().numpy() if src in TORCH_FLOATS else source.data
        return interpreter.TensorHandle(data.astype(dtype, copy=False), dst_type.scalar)

    return run


def _dot(interpreter: Any) -> Callable[..., Any]:
    def wide(handle: Any) -> Any:
        name = handle.dtype.scalar.name
        return _to_torch(handle.data, name).float().numpy() if name in TORCH_FLOATS else handle.data

    def run(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        if a.dtype.scalar.name == "fp64":
            product = np.matmul(a.data, b.data)
        else:
            product = np.matmul(wide(a), wide(b), dtype=np.float32 if a.dtype.is_floating() else acc.data.dtype)
        return interpreter.TensorHandle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    return run


def _decode(handle: Any, fmt: str, packed_dim: int) -> np.ndarray:
    """Values of one dot_scaled operand. E2M1 comes two to a byte along ``packed_dim``, the low nibble first."""
    if fmt != "e2m1":
        return _to_torch(handle.data, {"e4m3": "fp8e4nv", "e5m2": "fp8e5"}.get(fmt, fmt)).float().numpy()
    codes = np.stack((handle.data & 15, handle.data >> 4), axis=-1).astype(np.int64)
    values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    if packed_dim == 0:
        return values.transpose(0, 2, 1).reshape(-1, handle.data.shape[1])
    return values.reshape(len(handle.data), -1)


def _spread_scale(handle: Any, num_k: int) -> np.ndarray:
    """Block scales [rows, K/group] as float32 [rows, K]: E4M3 as such, a plain byte as E8M0."""
    if handle.dtype.scalar.name == "fp8e4nv":
        scale = _to_torch(handle.data, "fp8e4nv").float().numpy()
    else:
        scale = torch.from_numpy(handle.data.view(np.uint8).copy()).view(torch.float8_e8m0fnu).float().numpy()
    return np.repeat(scale, num_k // scale.shape[-1], axis=-1)


def _dot_scaled(interpreter: Any) -> Callable[..., Any]:
    def run(self: Any, a: Any, a_scale: Any, a_format: str, b: Any, b_scale: Any, b_format: str, *rest: Any) -> Any:
        _, a_k_pack, b_k_pack, acc = rest
        a_MK = _decode(a, a_format, 1 if a_k_pack else 0)
        b_KN = _decode(b, b_format, 0 if b_k_pack else 1)
        if a_scale is not None:
            a_MK = a_MK * _spread_scale(a_scale, a_MK.shape[1])
        if b_scale is not None:
            b_KN = b_KN * _spread_scale(b_scale, b_KN.shape[0]).T
        return interpreter.TensorHandle(np.matmul(a_MK, b_KN) + acc.data, acc.dtype.scalar)

    return run


def _scaled_formats(semantic: type) -> None:
    """dot_scaled expects constexpr formats, which the interpreter has already unwrapped to strings."""
    original = semantic.dot_scaled

    def run(self: Any, a: Any, a_scale: Any, a_format: Any, b: Any, b_scale: Any, b_format: Any, *rest: Any) -> Any:
        named = [SimpleNamespace(value=getattr(fmt, "value", fmt)) for fmt in (a_format, b_format)]
        return original(self, a, a_scale, named[0], b, b_scale, named[1], *rest)

    semantic.dot_scaled = run
    semantic._str_to_fp_type = lambda self, name: name  # the builder below reads names, not MLIR enums


def _patch_once(interpreter: Any) -> Callable[[Callable[..., Any]], Any]:
    """Gives a function the interpreted language when it is first called, and leaves it: nothing here is compiled."""
    original, done = interpreter._patch_lang, set[Callable[..., Any]]()

    def run(fn: Callable[..., Any]) -> Any:
        if fn not in done:
            original(fn)
            done.add(fn)
        return interpreter._LangPatchScope()  # of no changes: its end restores nothing

    return run


def _remembered_dtypes(interpreter: Any) -> Callable[[Any], Any]:
    """NumPy's type of a Triton type's elements, by their name; pointers are 64 bits."""
    original, found = interpreter._get_np_dtype, dict[str, Any]()

    def run(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        if isinstance(scalar, interpreter.tl.pointer_type):
            return original(scalar)
        if scalar.name not in found:
            found[scalar.name] = original(scalar)
        return found[scalar.name]

    return run


def _lazy_tuples(core: Any) -> None:
    """A tuple makes its type when somebody asks for it: every tensor has a tuple, of its sizes."""

    def init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        self._type = type if type is None or isinstance(type, core.tuple_type) else core.tuple_type(type)

    def get(self: Any) -> Any:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    core.tuple.__init__ = init
    core.tuple.type = property(get, lambda self, type: setattr(self, "_type", type))


def install() -> None:
    """Replaces the wrong parts of the interpreter in this process. Errors: RuntimeError outside interpretation."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast(interpreter)
    builder.create_fp_to_fp = _cast(interpreter)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _wide_op(interpreter, getattr(builder, name)))
    builder.create_fma = lambda self, x, y, z: self.ternary_op(x, y, z, lambda a, b, c: a * b + c)
    builder.create_rsqrt = lambda self, arg: self.unary_op(arg, lambda a: 1 / np.sqrt(a))
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_dot = _dot(interpreter)
    builder.create_dot_scaled = _dot_scaled(interpreter)
    _scaled_formats(interpreter.TritonSemantic)
    _lazy_tuples(interpreter.tl.core)
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None  # whose assertion is off
    interpreter._patch_lang = _patch_once(interpreter)
    interpreter._get_np_dtype = _remembered_dtypes(interpreter)
