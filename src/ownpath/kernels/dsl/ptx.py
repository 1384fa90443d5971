"""PTX instructions that the kernels issue directly, as typed functions."""

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import cute as _cute_ir
from cutlass._mlir.dialects import cute_nvgpu as _cute_nvgpu_ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

Value = Any
"""A traced value of the DSL; its classes are not typed."""
Site = Any
"""A source location or insertion point; the DSL passes it."""


def asm(text: str, constraints: str, result: Value, operands: list[Value], pure: bool, loc: Site, ip: Site) -> Value:
    """Emits inline PTX. pure: the compiler may move, merge or drop it like arithmetic."""
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=not pure,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def keep(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns a word that the compiler keeps in a register, because it does not know how to compute it again."""
    return Int32(asm("mov.b32 $0, $1;", "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], False, loc, ip))


def once(x: Value) -> Int32:
    """Returns a word that is computed once: nobody, not even the assembler, computes the result of a shuffle again.

    All lanes of a warp call it together.
    """
    return Int32(cute.arch.shuffle_sync_bfly(Int32(x), offset=0))


@dsl_user_op
def rotate_right(x: Value, distance: int, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Rotates the bits of ``x`` right by ``distance``."""
    text = f"shf.r.wrap.b32 $0, $1, $1, {distance};"
    return Uint32(asm(text, "=r,r", T.i32(), [Uint32(x).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def mad(x: Value, factor: int, addend: int, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Computes x * factor + addend on 32 bits, on the multiplier's pipe instead of the logic pipe."""
    text = f"mad.lo.u32 $0, $1, {factor:#x}, {addend:#x};"
    return Uint32(asm(text, "=r,r", T.i32(), [Uint32(x).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def broadcast_halves(pair: Value, *, loc: Site = None, ip: Site = None) -> tuple[Uint32, Uint32]:
    """Returns the lower half twice and the upper half twice; the multiplier selects halves at no cost."""
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; mov.b32 $0, {low, low}; mov.b32 $1, {high, high}; }"
    both = asm(text, "=r,=r,r", struct, [Uint32(pair).ir_value(loc=loc, ip=ip)], True, loc, ip)
    low, high = (Uint32(llvm.extractvalue(T.i32(), both, [idx], loc=loc, ip=ip)) for idx in range(2))
    return low, high


@dsl_user_op
def mul_bf16x2(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Multiplies two pairs of BF16; subnormal operands keep their value."""
    operands = [Uint32(a).ir_value(loc=loc, ip=ip), Uint32(b).ir_value(loc=loc, ip=ip)]
    return Uint32(asm("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", T.i32(), operands, True, loc, ip))


@dsl_user_op
def pack_bf16x2(low: Value, high: Value, *, loc: Site = None, ip: Site = None) -> Uint32:
    """Rounds two float32 to BF16, nearest even, ``low`` in the lower half."""
    operands = [Float32(high).ir_value(loc=loc, ip=ip), Float32(low).ir_value(loc=loc, ip=ip)]
    return Uint32(asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", T.i32(), operands, True, loc, ip))


def _unary(instruction: str, x: Value, loc: Site, ip: Site) -> Float32:
    operands = [Float32(x).ir_value(loc=loc, ip=ip)]
    return Float32(asm(f"{instruction} $0, $1;", "=f,f", T.f32(), operands, True, loc, ip))


def _binary(instruction: str, a: Value, b: Value, loc: Site, ip: Site) -> Float32:
    operands = [Float32(a).ir_value(loc=loc, ip=ip), Float32(b).ir_value(loc=loc, ip=ip)]
    return Float32(asm(f"{instruction} $0, $1, $2;", "=f,f,f", T.f32(), operands, True, loc, ip))


@dsl_user_op
def exp2(x: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Computes 2**x within 2 ulp; subnormal results are kept."""
    return _unary("ex2.approx.f32", x, loc, ip)


@dsl_user_op
def reciprocal(x: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Computes 1/x within 1 ulp."""
    return _unary("rcp.approx.f32", x, loc, ip)


@dsl_user_op
def minimum(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Returns the smaller of two; NaN if either is NaN, as in torch.clamp."""
    return _binary("min.NaN.f32", a, b, loc, ip)


@dsl_user_op
def maximum(a: Value, b: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Returns the larger of two; NaN if either is NaN."""
    return _binary("max.NaN.f32", a, b, loc, ip)


@dsl_user_op
def load_bulk(
    dst: Value,
    src: Value,
    num_bytes: Value,
    barrier: Value,
    passes_once: bool = False,
    peers: int = 0,
    *,
    loc: Site = None,
    ip: Site = None,
) -> None:
    """Copies contiguous global to shared memory (byte addresses) by the copy engine; ``barrier`` counts the bytes.

    passes_once: the data is read once, so it is marked to be evicted from L2 first. peers: mask of the cluster's CTAs
    that all receive it, each at the same address of its memory; 0 for this CTA only.
    """
    setup, how, more = "", "", ""
    if peers:
        setup += f".reg .b16 mask; mov.b16 mask, {peers:#x}; "
        how, more = how + ".multicast::cluster", more + ", mask"
    if passes_once:
        setup += ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
        how, more = how + ".L2::cache_hint", more + ", policy"
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    text = f"{{ {setup}{copy}{how} [$0], [$1], $2, [$3]{more}; }}"
    operands = [
        Int32(dst).ir_value(loc=loc, ip=ip),
        Int64(src).ir_value(loc=loc, ip=ip),
        Int32(num_bytes).ir_value(loc=loc, ip=ip),
        barrier.toint().ir_value(loc=loc, ip=ip),
    ]
    asm(text, "r,l,r,r", None, operands, False, loc, ip)


@dsl_user_op
def descriptor_address(atom: Value, *, loc: Site = None, ip: Site = None) -> Int64:
    """Returns the generic address of the tensor map behind a TMA copy atom."""
    pointer = _cute_ir.PtrType.get(T.i8(), cute.AddressSpace.generic, 64)
    runnable = _cute_nvgpu_ir.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    return Int64(_cute_nvgpu_ir.get_tma_desc_addr(pointer, runnable, loc=loc, ip=ip).toint())


@dsl_user_op
def load_box(
    dst: Value,
    descriptor: Value,
    col: Value,
    row: Value,
    barrier: Value,
    num_ctas: int = 1,
    *,
    loc: Site = None,
    ip: Site = None,
) -> None:
    """Copies a two-dimensional TMA box with its upper left corner at (row, col); rows outside the tensor become zeros.

    With ``num_ctas`` of a cluster it arrives in the same place of each, and each one's own barrier counts its bytes.
    """
    copy = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    text = f"{copy} [$0], [$1, {{$2, $3}}], [$4];"
    if num_ctas > 1:
        everyone = (1 << num_ctas) - 1
        text = (
            f"{{ .reg .b16 all; mov.b16 all, {everyone}; "
            f"{copy}.multicast::cluster [$0], [$1, {{$2, $3}}], [$4], all; }}"
        )
    operands = [
        dst.toint().ir_value(loc=loc, ip=ip),
        Int64(descriptor).ir_value(loc=loc, ip=ip),
        Int32(col).ir_value(loc=loc, ip=ip),
        Int32(row).ir_value(loc=loc, ip=ip),
        barrier.toint().ir_value(loc=loc, ip=ip),
    ]
    asm(text, "r,l,r,r,r", None, operands, False, loc, ip)


@dsl_user_op
def arrive_remote(barrier: Value, rank: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Arrives at the barrier in the same place of the cluster's CTA ``rank``."""
    text = (
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $0, $1; "
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }"
    )
    operands = [barrier.toint().ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    asm(text, "r,r", None, operands, False, loc, ip)


@dsl_user_op
def load_shared_vec4(address: Value, *, loc: Site = None, ip: Site = None) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Loads 16 bytes of shared memory at a byte address."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    loaded = asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", struct, operands, False, loc, ip)
    words = [Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4)]
    return words[0], words[1], words[2], words[3]


@dsl_user_op
def load_shared_vec2(address: Value, *, loc: Site = None, ip: Site = None) -> tuple[Uint32, Uint32]:
    """Loads 8 bytes of shared memory at a byte address."""
    struct = llvm.StructType.get_literal([T.i32()] * 2)
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    loaded = asm("ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", struct, operands, False, loc, ip)
    words = [Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(2)]
    return words[0], words[1]


@dsl_user_op
def named_barrier(barrier_id: int, num_threads: int, *, loc: Site = None, ip: Site = None) -> None:
    """Waits for all ``num_threads`` threads that use this barrier."""
    asm(f"bar.sync {barrier_id}, {num_threads};", "", None, [], False, loc, ip)


@dsl_user_op
def cluster_barrier(relaxed: bool = False, *, loc: Site = None, ip: Site = None) -> None:
    """Waits for all threads of the cluster that have not exited.

    What they wrote is then visible to all, unless ``relaxed``, which orders nothing but spares waiting for writes.
    """
    order = "relaxed" if relaxed else "release"
    text = f"barrier.cluster.arrive.{order}.aligned; barrier.cluster.wait.aligned;"
    asm(text, "", None, [], False, loc, ip)


@dsl_user_op
def load_cluster_vec4(address: Value, rank: Value, *, loc: Site = None, ip: Site = None) -> tuple[Float32, ...]:
    """Loads four float32 at a shared-memory byte address of the cluster's CTA ``rank``."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    text = (
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $4, $5; "
        "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [remote]; }"
    )
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, "=f,=f,=f,=f,r,r", struct, operands, False, loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4))


@dsl_user_op
def load_cluster(address: Value, rank: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Loads an integer at a shared-memory byte address of the cluster's CTA ``rank``."""
    text = "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $1, $2; ld.shared::cluster.b32 $0, [remote]; }"
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    return Int32(asm(text, "=r,r,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def store_shared_vec4(address: Value, values: tuple[Value, ...], *, loc: Site = None, ip: Site = None) -> None:
    """Stores four float32 to shared memory at a byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)] + [Float32(v).ir_value(loc=loc, ip=ip) for v in values]
    asm("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", "r,f,f,f,f", None, operands, False, loc, ip)


@dsl_user_op
def load_global_vec4(address: Value, *, loc: Site = None, ip: Site = None) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Loads 16 bytes of global memory at an aligned byte address."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    loaded = asm("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", struct, operands, False, loc, ip)
    words = [Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4)]
    return words[0], words[1], words[2], words[3]


@dsl_user_op
def store_global_vec4(address: Value, words: tuple[Value, ...], *, loc: Site = None, ip: Site = None) -> None:
    """Stores 16 bytes to global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Uint32(w).ir_value(loc=loc, ip=ip) for w in words]
    asm("st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", None, operands, False, loc, ip)


@dsl_user_op
def widen_bf16(word: Value, high: bool, *, loc: Site = None, ip: Site = None) -> Float32:
    """Returns the lower or upper BF16 of a word as float32."""
    text = "and.b32 $0, $1, 0xffff0000;" if high else "shl.b32 $0, $1, 16;"
    return Float32(asm(text, "=f,r", T.f32(), [Uint32(word).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def store_global(address: Value, word: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 4 bytes to global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Uint32(word).ir_value(loc=loc, ip=ip)]
    asm("st.global.b32 [$0], $1;", "l,r", None, operands, False, loc, ip)


@dsl_user_op
def store_global_vec2(address: Value, pair: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores two float32 to global memory at an aligned byte address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Float32(v).ir_value(loc=loc, ip=ip) for v in pair]
    asm("st.global.v2.f32 [$0], {$1, $2};", "l,f,f", None, operands, False, loc, ip)


@dsl_user_op
def as_float(word: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Reinterprets the bits as float32."""
    operands = [Uint32(word).ir_value(loc=loc, ip=ip)]
    return Float32(asm("mov.b32 $0, $1;", "=f,r", T.f32(), operands, True, loc, ip))


@dsl_user_op
def load_matrix4(address: Value, *, loc: Site = None, ip: Site = None) -> list[Uint32]:
    """Loads four 8 x 8 matrices of 16-bit values; lane 8 i + t addresses row t of matrix i."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, "=r,=r,=r,=r,r", struct, operands, False, loc, ip)
    return [Uint32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4)]


@dsl_user_op
def mma_bf16(a: Value, b: Value, c: Value, *, loc: Site = None, ip: Site = None) -> list[Float32]:
    """Computes c + a b for a warp: 16 x 16 of BF16 times 16 x 8, float32 sums."""
    struct = llvm.StructType.get_literal([T.f32()] * 4)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    operands = [Uint32(v).ir_value(loc=loc, ip=ip) for v in (*a, *b)]
    operands += [Float32(v).ir_value(loc=loc, ip=ip) for v in c]
    summed = asm(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", struct, operands, True, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), summed, [idx], loc=loc, ip=ip)) for idx in range(4)]


@dsl_user_op
def store_async(address: Value, barrier: Value, rank: Value, word: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores 4 bytes in the shared memory of the cluster's CTA ``rank``, whose ``barrier`` counts them.

    Both are byte addresses. Whoever has waited for that barrier sees the word; no fence is needed.
    """
    text = (
        "{ .reg .b32 place, bar; mapa.shared::cluster.u32 place, $0, $2; mapa.shared::cluster.u32 bar, $1, $2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], $3, [bar]; }"
    )
    operands = [Int32(value).ir_value(loc=loc, ip=ip) for value in (address, barrier, rank)]
    asm(text, "r,r,r,r", None, [*operands, Uint32(word).ir_value(loc=loc, ip=ip)], False, loc, ip)
