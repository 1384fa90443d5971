"""PTX instructions of the attention kernels, as typed functions."""

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Site, Value, asm

FourWords = tuple[Value, ...]
"""Four words: 16 bytes."""


@dsl_user_op
def load_word(address: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Loads 4 bytes of global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.global.b32 $0, [$1];", "=r,l", T.i32(), operands, False, loc, ip))


@dsl_user_op
def load_float(address: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Loads one float32 of global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm("ld.global.f32 $0, [$1];", "=f,l", T.f32(), operands, False, loc, ip))


@dsl_user_op
def load_words_or_zero(address: Value, inside: Value, *, loc: Site = None, ip: Site = None) -> FourWords:
    """Loads 16 bytes of global memory, or returns zeros where ``inside`` is 0: nothing is read then."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(inside).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, "=&r,=&r,=&r,=&r,l,r", struct, operands, False, loc, ip)
    return tuple(Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4))


@dsl_user_op
def store_words2(address: Value, low: Value, high: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 8 bytes to global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Uint32(v).ir_value(loc=loc, ip=ip) for v in (low, high)]
    asm("st.global.v2.b32 [$0], {$1, $2};", "l,r,r", None, operands, False, loc, ip)


@dsl_user_op
def copy16(dst: Value, src: Value, num_bytes: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Copies 16 bytes from global to shared memory without waiting; only ``num_bytes`` are read, the rest is zero."""
    operands = [
        Int32(dst).ir_value(loc=loc, ip=ip),
        Int64(src).ir_value(loc=loc, ip=ip),
        Int32(num_bytes).ir_value(loc=loc, ip=ip),
    ]
    asm("cp.async.cg.shared.global.L2::256B [$0], [$1], 16, $2;", "r,l,r", None, operands, False, loc, ip)


@dsl_user_op
def arrive_after_copies(barrier: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Arrives at a barrier once all copies that this thread has started are done."""
    operands = [barrier.toint().ir_value(loc=loc, ip=ip)]
    asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", None, operands, False, loc, ip)


@dsl_user_op
def store_shared_words(address: Value, words: FourWords, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 16 bytes to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)] + [Uint32(v).ir_value(loc=loc, ip=ip) for v in words]
    asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", None, operands, False, loc, ip)


@dsl_user_op
def store_shared_word(address: Value, word: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 4 bytes to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Uint32(word).ir_value(loc=loc, ip=ip)]
    asm("st.shared.b32 [$0], $1;", "r,r", None, operands, False, loc, ip)


@dsl_user_op
def store_shared_float(address: Value, value: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores one float32 to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    asm("st.shared.f32 [$0], $1;", "r,f", None, operands, False, loc, ip)


@dsl_user_op
def load_shared_float(address: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Loads one float32 of shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm("ld.shared.f32 $0, [$1];", "=f,r", T.f32(), operands, False, loc, ip))


@dsl_user_op
def fence_async(*, loc: Site = None, ip: Site = None) -> None:
    """Makes shared memory that was written by stores or copies visible to the tensor cores."""
    asm("fence.proxy.async.shared::cta;", "", None, [], False, loc, ip)


@dsl_user_op
def barrier_sync(barrier_id: Value, num_threads: int, *, loc: Site = None, ip: Site = None) -> None:
    """Waits at a named barrier for all ``num_threads`` threads, of which some may only arrive."""
    operands = [Int32(barrier_id).ir_value(loc=loc, ip=ip)]
    asm(f"bar.sync $0, {num_threads};", "r", None, operands, False, loc, ip)


@dsl_user_op
def barrier_arrive(barrier_id: Value, num_threads: int, *, loc: Site = None, ip: Site = None) -> None:
    """Arrives at a named barrier and does not wait."""
    operands = [Int32(barrier_id).ir_value(loc=loc, ip=ip)]
    asm(f"bar.arrive $0, {num_threads};", "r", None, operands, False, loc, ip)


@dsl_user_op
def fma(a: Value, b: Value, c: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Computes a * b + c with one rounding."""
    operands = [Float32(v).ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    return Float32(asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", T.f32(), operands, True, loc, ip))


@dsl_user_op
def rsqrt(x: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Computes 1 / sqrt(x) within 2 ulp."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip)]
    return Float32(asm("rsqrt.approx.f32 $0, $1;", "=f,f", T.f32(), operands, True, loc, ip))


@dsl_user_op
def minus_infinity_from(value: Value, idx: Value, end: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Returns ``value`` where idx < end, else minus infinity."""
    text = "{ .reg .pred p; setp.lt.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }"
    operands = [Float32(value).ir_value(loc=loc, ip=ip)] + [Int32(v).ir_value(loc=loc, ip=ip) for v in (idx, end)]
    return Float32(asm(text, "=f,f,r,r", T.f32(), operands, True, loc, ip))


@dsl_user_op
def pick(condition: Value, word: Value, otherwise: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns ``word`` where the condition is not 0."""
    text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; selp.b32 $0, $2, $3, p; }"
    operands = [Int32(condition).ir_value(loc=loc, ip=ip)]
    operands += [Uint32(v).ir_value(loc=loc, ip=ip) for v in (word, otherwise)]
    return Uint32(asm(text, "=r,r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def prefetch(address: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Fetches a line of global memory into L2."""
    asm("prefetch.global.L2 [$0];", "l", None, [Int64(address).ir_value(loc=loc, ip=ip)], False, loc, ip)


@dsl_user_op
def scale_pair(word: Value, idx: int, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns BF16 2^(120 + k) twice for E8M0 scale ``idx`` of four, 2^k with k up to 7; 2^127 for larger ones."""
    text = (
        f"{{ .reg .b32 scale; bfe.u32 scale, $1, {8 * idx}, 8; add.u32 scale, scale, 120; min.u32 scale, scale, 254; "
        "mul.lo.u32 $0, scale, 0x00800080; }"
    )
    return Uint32(asm(text, "=r,r", T.i32(), [Uint32(word).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def rest_of_scale(word: Value, idx: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns the rest that ``scale_pair`` leaves, twice in BF16: 2^(k - 7), 1 for a k up to 7; NaN for scale 255."""
    text = (
        "{ .reg .pred nan; .reg .b32 shift, scale; shl.b32 shift, $2, 3; shr.u32 scale, $1, shift; "
        "and.b32 scale, scale, 255; setp.eq.u32 nan, scale, 255; max.u32 scale, scale, 134; "
        "sub.u32 scale, scale, 7; mul.lo.u32 scale, scale, 0x00800080; selp.b32 $0, 0x7FC07FC0, scale, nan; }"
    )
    operands = [Uint32(word).ir_value(loc=loc, ip=ip), Int32(idx).ir_value(loc=loc, ip=ip)]
    return Uint32(asm(text, "=r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def any_scale_above(word: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns 1 in all lanes of a warp if one has an E8M0 scale above 2^7 among its four, else 0."""
    text = (
        "{ .reg .pred p; .reg .b32 low; and.b32 low, $1, 0x7F7F7F7F; add.u32 low, low, 0x79797979; "
        "and.b32 low, low, $1; and.b32 low, low, 0x80808080; setp.ne.u32 p, low, 0; "
        "vote.sync.any.pred p, p, 0xFFFFFFFF; selp.s32 $0, 1, 0, p; }"
    )
    return Int32(asm(text, "=r,r", T.i32(), [Uint32(word).ir_value(loc=loc, ip=ip)], False, loc, ip))


@dsl_user_op
def unknown_sixteen(*, loc: Site = None, ip: Site = None) -> Uint32:
    """Returns 16 in a warp without the compiler's knowledge: it multiplies by it where it would shift, which the busier
    pipe does."""
    return Uint32(asm("{ activemask.b32 $0; and.b32 $0, $0, 16; }", "=r", T.i32(), [], False, loc, ip))


@dsl_user_op
def decode_pair(
    codes: Value, is_high: bool, factor: Value, sixteen: Value, *, loc: Site = None, ip: Site = None
) -> Uint32:
    """Decodes two of four E4M3 codes and multiplies them by ``scale_pair``, exactly where the result is BF16.

    A code's bits, moved by 4, are a BF16 value of 2^-120 of the code's. The multiplication that moves them also adds
    0x7800, which carries a sign from bit 11 to bit 15.
    """
    text = (
        f"{{ .reg .b32 bits; prmt.b32 bits, $1, 0, {0x4342 if is_high else 0x4140:#x}; "
        "mad.lo.u32 bits, bits, $3, 0x78007800; and.b32 bits, bits, 0x87F087F0; mul.rn.bf16x2 $0, bits, $2; }"
    )
    operands = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (codes, factor, sixteen)]
    return Uint32(asm(text, "=r,r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def load_once(address: Value, *, loc: Site = None, ip: Site = None) -> FourWords:
    """Loads 16 bytes of global memory and leaves no copy in L1."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    text = "ld.global.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = asm(text, "=r,=r,=r,=r,l", struct, operands, False, loc, ip)
    return tuple(Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4))


@dsl_user_op
def store_shared_pair(address: Value, first: Value, second: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores two float32 to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    operands += [Float32(v).ir_value(loc=loc, ip=ip) for v in (first, second)]
    asm("st.shared.v2.f32 [$0], {$1, $2};", "r,f,f", None, operands, False, loc, ip)


@dsl_user_op
def load_cluster_or_zero(
    address: Value, rank: Value, inside: Value, *, loc: Site = None, ip: Site = None
) -> list[Float32]:
    """Loads four float32 at a shared-memory byte address of the cluster's CTA ``rank``, or returns zeros."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    text = (
        "{ .reg .pred p; .reg .b32 remote; setp.ne.s32 p, $6, 0; mapa.shared::cluster.u32 remote, $4, $5; "
        "mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; "
        "@p ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [remote]; }"
    )
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (address, rank, inside)]
    loaded = asm(text, "=&f,=&f,=&f,=&f,r,r,r", struct, operands, False, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4)]
