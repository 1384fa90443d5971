"""PTX instructions of the experts' FP8 kernels, as typed functions."""

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Site, Value, asm


@dsl_user_op
def choose_bytes(low: Value, high: Value, selectors: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns four of the eight bytes of (low, high): byte i is the one that bits 4i .. 4i + 2 of selectors name."""
    operands = [Uint32(value).ir_value(loc=loc, ip=ip) for value in (low, high, selectors)]
    return Uint32(asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def merge_signs(value: Value, signs: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns value | (signs & 0x80808080)."""
    operands = [Uint32(one).ir_value(loc=loc, ip=ip) for one in (value, signs)]
    text = "lop3.b32 $0, $1, $2, 0x80808080, 0xF8;"
    return Uint32(asm(text, "=r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def extract_byte(word: Value, idx: int, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns byte ``idx`` of a word."""
    operands = [Uint32(word).ir_value(loc=loc, ip=ip)]
    return Int32(asm(f"bfe.u32 $0, $1, {8 * idx}, 8;", "=r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def load_table(address: Value, *, loc: Site = None, ip: Site = None) -> tuple[Uint32, Uint32]:
    """Loads 8 bytes of shared memory that never change."""
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    loaded = asm("ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", struct, operands, True, loc, ip)
    low, high = (Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(2))
    return low, high


@dsl_user_op
def store_shared_vec2(address: Value, low: Value, high: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 8 bytes to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    operands += [Uint32(word).ir_value(loc=loc, ip=ip) for word in (low, high)]
    asm("st.shared.v2.b32 [$0], {$1, $2};", "r,r,r", None, operands, False, loc, ip)


@dsl_user_op
def load_shared_floats(address: Value, count: int, *, loc: Site = None, ip: Site = None) -> list[Float32]:
    """Loads two or four float32 of shared memory at a byte address."""
    struct = llvm.StructType.get_literal([T.f32()] * count)
    outputs = ", ".join(f"${idx}" for idx in range(count))
    text = f"ld.shared.v{count}.f32 {{{outputs}}}, [${count}];"
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, ",".join(["=f"] * count + ["r"]), struct, operands, False, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(count)]


@dsl_user_op
def copy_word(target: Value, source: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Starts a copy of 4 bytes from global to shared memory (byte addresses)."""
    operands = [Int32(target).ir_value(loc=loc, ip=ip), Int64(source).ir_value(loc=loc, ip=ip)]
    asm("cp.async.ca.shared.global [$0], [$1], 4;", "r,l", None, operands, False, loc, ip)


@dsl_user_op
def arrive_after_copies(barrier: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Arrives at a barrier once this thread's copies so far have landed."""
    operands = [barrier.toint().ir_value(loc=loc, ip=ip)]
    asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r", None, operands, False, loc, ip)


@dsl_user_op
def pin(values: list[Value], *, loc: Site = None, ip: Site = None) -> list[Float32]:
    """Returns the values unchanged, computed before and used after this point of the program. No instruction."""
    count = len(values)
    struct = llvm.StructType.get_literal([T.f32()] * count)
    operands = [Float32(value).ir_value(loc=loc, ip=ip) for value in values]
    constraints = ",".join(["=f"] * count + [str(idx) for idx in range(count)])
    held = asm("", constraints, struct, operands, False, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), held, [idx], loc=loc, ip=ip)) for idx in range(count)]


@dsl_user_op
def widen_e4m3(word: Value, *, loc: Site = None, ip: Site = None) -> list[Float32]:
    """Returns the four E4M3 of a word as float32, exactly."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    text = (
        "{ .reg .b16 low, high, a, b, c, d; .reg .b32 first, second; mov.b32 {low, high}, $4; "
        "cvt.rn.f16x2.e4m3x2 first, low; cvt.rn.f16x2.e4m3x2 second, high; "
        "mov.b32 {a, b}, first; mov.b32 {c, d}, second; "
        "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
    )
    held = asm(text, "=f,=f,=f,=f,r", struct, [Uint32(word).ir_value(loc=loc, ip=ip)], True, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), held, [idx], loc=loc, ip=ip)) for idx in range(4)]


@dsl_user_op
def release_writes(*, loc: Site = None, ip: Site = None) -> None:
    """Makes this thread's writes to global memory visible to the device, whoever reads them."""
    asm("fence.acq_rel.gpu; fence.proxy.async.global;", "", None, [], False, loc, ip)
