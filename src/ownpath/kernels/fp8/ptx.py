"""PTX instructions of the FP8 kernels, as typed functions."""

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Site, Value, asm


@dsl_user_op
def load_global16_or_zero(address: Value, inside: Value, *, loc: Site = None, ip: Site = None) -> list[Uint32]:
    """Loads 16 bytes of global memory that this kernel does not write, or returns zeros."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(inside).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, "=&r,=&r,=&r,=&r,l,r", struct, operands, False, loc, ip)
    return [Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4)]


@dsl_user_op
def max_u16x2(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns the larger of each half's two unsigned values."""
    operands = [Uint32(a).ir_value(loc=loc, ip=ip), Uint32(b).ir_value(loc=loc, ip=ip)]
    return Uint32(asm("max.u16x2 $0, $1, $2;", "=r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def max_u32(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns the larger of two unsigned words."""
    operands = [Uint32(a).ir_value(loc=loc, ip=ip), Uint32(b).ir_value(loc=loc, ip=ip)]
    return Uint32(asm("max.u32 $0, $1, $2;", "=r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def divide(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Computes a / b, correctly rounded."""
    operands = [Float32(a).ir_value(loc=loc, ip=ip), Float32(b).ir_value(loc=loc, ip=ip)]
    return Float32(asm("div.rn.f32 $0, $1, $2;", "=f,f,f", T.f32(), operands, True, loc, ip))


@dsl_user_op
def to_e4m3x4(v0: Value, v1: Value, v2: Value, v3: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Rounds four float32 to E4M3, nearest even, saturating, ``v0`` in the lowest byte."""
    text = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    operands = [Float32(v).ir_value(loc=loc, ip=ip) for v in (v0, v1, v2, v3)]
    return Uint32(asm(text, "=r,f,f,f,f", T.i32(), operands, True, loc, ip))


@dsl_user_op
def load_shared_float(address: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Loads one float32 of shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm("ld.shared.f32 $0, [$1];", "=f,r", T.f32(), operands, False, loc, ip))


@dsl_user_op
def store_global8(dst: Value, low: Value, high: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores two words to global memory at an 8-byte aligned address."""
    operands = [
        dst.toint().ir_value(loc=loc, ip=ip),
        Uint32(low).ir_value(loc=loc, ip=ip),
        Uint32(high).ir_value(loc=loc, ip=ip),
    ]
    asm("st.global.v2.b32 [$0], {$1, $2};", "l,r,r", None, operands, False, loc, ip)


@dsl_user_op
def store_global_float(address: Value, value: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores one float32 to global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    asm("st.global.f32 [$0], $1;", "l,f", None, operands, False, loc, ip)


@dsl_user_op
def nan_unless_finite(value: Value, bits: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Returns ``value``, or NaN where the non-negative float32 with these bits is infinite or NaN."""
    text = "{ .reg .pred p; setp.lt.u32 p, $2, 0x7F800000; selp.f32 $0, $1, 0f7FC00000, p; }"
    operands = [Float32(value).ir_value(loc=loc, ip=ip), Uint32(bits).ir_value(loc=loc, ip=ip)]
    return Float32(asm(text, "=f,f,r", T.f32(), operands, True, loc, ip))


@dsl_user_op
def send_vec4(
    address: Value, barrier: Value, rank: Value, values: tuple[Value, ...], *, loc: Site = None, ip: Site = None
) -> None:
    """Stores four float32 in the shared memory of the cluster's CTA ``rank``, whose ``barrier`` counts the bytes.

    Both are byte addresses. Whoever has waited for that barrier sees the values; no fence is needed.
    """
    text = (
        "{ .reg .b32 place, bar; mapa.shared::cluster.u32 place, $0, $2; mapa.shared::cluster.u32 bar, $1, $2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {$3, $4, $5, $6}, [bar]; }"
    )
    operands = [Int32(value).ir_value(loc=loc, ip=ip) for value in (address, barrier, rank)]
    operands += [Float32(value).ir_value(loc=loc, ip=ip) for value in values]
    asm(text, "r,r,r,f,f,f,f", None, operands, False, loc, ip)


@dsl_user_op
def cluster_arrive(*, loc: Site = None, ip: Site = None) -> None:
    """Arrives at the cluster's barrier without waiting; what this thread wrote is visible to those who wait."""
    asm("barrier.cluster.arrive.release.aligned;", "", None, [], False, loc, ip)


@dsl_user_op
def cluster_wait(*, loc: Site = None, ip: Site = None) -> None:
    """Waits until all threads of the cluster that have not exited have arrived."""
    asm("barrier.cluster.wait.acquire.aligned;", "", None, [], False, loc, ip)
