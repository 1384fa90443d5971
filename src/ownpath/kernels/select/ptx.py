"""PTX instructions of the selection, as typed functions. Addresses are of shared memory unless they say global."""

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Site, Value, asm

_BITS_OF_KEY = "shr.s32 s, $1, 31; and.b32 s, s, 0x7fffffff; xor.b32 b, $1, s;"


@dsl_user_op
def load_scores_or_nan(address: Value, inside: Value, *, loc: Site = None, ip: Site = None) -> tuple[Int32, ...]:
    """Loads four scores of global memory, as bits; NaN where ``inside`` is 0: nothing is read then."""
    struct = llvm.StructType.get_literal([T.i32()] * 4)
    nan = " ".join(f"mov.b32 ${idx}, 0x7fffffff;" for idx in range(4))
    text = f"{{ .reg .pred p; setp.ne.s32 p, $5, 0; {nan} @p ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4]; }}"
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(inside).ir_value(loc=loc, ip=ip)]
    loaded = asm(text, "=&r,=&r,=&r,=&r,l,r", struct, operands, False, loc, ip)
    return tuple(Int32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(4))


@dsl_user_op
def load_global(address: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Loads an integer at a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.global.b32 $0, [$1];", "=r,l", T.i32(), operands, False, loc, ip))


@dsl_user_op
def ordered_key(bits: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Converts the bits of a float32 to an integer of the same order. -0 becomes +0, NaN minus infinity."""
    text = (
        "{ .reg .pred z, n; .reg .b32 a, s; and.b32 a, $1, 0x7fffffff; shr.s32 s, $1, 31; and.b32 s, s, 0x7fffffff; "
        "xor.b32 s, $1, s; setp.eq.u32 z, a, 0; setp.gt.u32 n, a, 0x7f800000; selp.b32 s, 0, s, z; "
        "selp.b32 $0, 0x807fffff, s, n; }"
    )
    return Int32(asm(text, "=r,r", T.i32(), [Int32(bits).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def value_of(key: Value, *, loc: Site = None, ip: Site = None) -> Float32:
    """Undoes ``ordered_key``."""
    text = f"{{ .reg .b32 s, b; {_BITS_OF_KEY} mov.b32 $0, b; }}"
    return Float32(asm(text, "=f,r", T.f32(), [Int32(key).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def value_bin(key: Value, best: Value, scale: Value, num_bins: int, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns (best - value of the key) * scale as a bin; a NaN of infinities is bin 0. It never falls with the key's
    rank, whatever the scale, if that is not negative."""
    text = (
        f"{{ .reg .b32 s, b; .reg .f32 d; {_BITS_OF_KEY} mov.b32 d, b; sub.rn.f32 d, $2, d; mul.rn.f32 d, d, $3; "
        f"cvt.rzi.s32.f32 b, d; min.s32 b, b, {num_bins - 1}; max.s32 $0, b, 0; }}"
    )
    operands = [Int32(key).ir_value(loc=loc, ip=ip)] + [Float32(v).ir_value(loc=loc, ip=ip) for v in (best, scale)]
    return Int32(asm(text, "=r,r,f,f", T.i32(), operands, True, loc, ip))


def _reduce(instruction: str, x: Value, loc: Site, ip: Site) -> Int32:
    text = f"redux.sync.{instruction}.s32 $0, $1, 0xffffffff;"
    return Int32(asm(text, "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], False, loc, ip))


@dsl_user_op
def sum_warp(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Adds the integers of a warp."""
    return _reduce("add", x, loc, ip)


@dsl_user_op
def max_warp(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the largest integer of a warp."""
    return _reduce("max", x, loc, ip)


@dsl_user_op
def min_warp(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the least integer of a warp."""
    return _reduce("min", x, loc, ip)


@dsl_user_op
def add_lower_lane(x: Value, distance: int, *, loc: Site = None, ip: Site = None) -> Int32:
    """Adds the integer of the lane ``distance`` below, if there is one: a step of a warp's prefix sum."""
    text = (
        f"{{ .reg .pred p; .reg .b32 o; shfl.sync.up.b32 o|p, $1, {distance}, 0, 0xffffffff; "
        "mov.b32 $0, $1; @p add.s32 $0, $0, o; }"
    )
    return Int32(asm(text, "=&r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], False, loc, ip))


@dsl_user_op
def max_of_pair(x: Value, distance: int, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the larger of this lane's integer and of the lane's that differs in one bit."""
    text = f"{{ .reg .b32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, 0xffffffff; max.s32 $0, $1, o; }}"
    return Int32(asm(text, "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], False, loc, ip))


@dsl_user_op
def broadcast_lane(x: Value, lane: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the integer of a lane of the warp."""
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (x, lane)]
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return Int32(asm(text, "=r,r,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def ballot(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the lanes of a warp, a bit each, whose integer is not 0."""
    text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return Int32(asm(text, "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], False, loc, ip))


@dsl_user_op
def count_bits(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Counts the bits that are set."""
    return Int32(asm("popc.b32 $0, $1;", "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def lowest_bit(x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the place of the lowest bit that is set."""
    text = "{ .reg .b32 r; brev.b32 r, $1; bfind.shiftamt.u32 $0, r; }"
    return Int32(asm(text, "=r,r", T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], True, loc, ip))


@dsl_user_op
def lanes_below(*, loc: Site = None, ip: Site = None) -> Int32:
    """Returns the lanes below this one, a bit each."""
    return Int32(asm("mov.u32 $0, %lanemask_lt;", "=r", T.i32(), [], True, loc, ip))


@dsl_user_op
def load_shared(address: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Loads an integer."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.shared.b32 $0, [$1];", "=r,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def store_shared(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores an integer."""
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (address, x)]
    asm("st.shared.b32 [$0], $1;", "r,r", None, operands, False, loc, ip)


def _merge(instruction: str, address: Value, x: Value, loc: Site, ip: Site) -> None:
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (address, x)]
    asm(f"red.shared.{instruction} [$0], $1;", "r,r", None, operands, False, loc, ip)


@dsl_user_op
def merge_sum(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Adds to an integer that other threads add to."""
    _merge("add.u32", address, x, loc, ip)


@dsl_user_op
def merge_max(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Raises an integer to at least ``x``."""
    _merge("max.s32", address, x, loc, ip)


@dsl_user_op
def merge_min(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Lowers an integer to at most ``x``."""
    _merge("min.s32", address, x, loc, ip)


@dsl_user_op
def fetch_add(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Adds to an integer that other threads add to, and returns what it was."""
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (address, x)]
    return Int32(asm("atom.shared.add.u32 $0, [$1], $2;", "=r,r,r", T.i32(), operands, False, loc, ip))


@dsl_user_op
def load_peer(address: Value, rank: Value, count: int, *, loc: Site = None, ip: Site = None) -> tuple[Int32, ...]:
    """Loads 1, 2 or 4 integers at an aligned address of the cluster's CTA ``rank``."""
    results = ", ".join(f"${idx}" for idx in range(count))
    width, results = ("", results) if count == 1 else (f".v{count}", f"{{{results}}}")
    text = (
        f"{{ .reg .b32 remote; mapa.shared::cluster.u32 remote, ${count}, ${count + 1}; "
        f"ld.shared::cluster{width}.b32 {results}, [remote]; }}"
    )
    operands = [Int32(v).ir_value(loc=loc, ip=ip) for v in (address, rank)]
    constraints = ",".join(["=r"] * count + ["r", "r"])
    if count == 1:
        return (Int32(asm(text, constraints, T.i32(), operands, False, loc, ip)),)
    struct = llvm.StructType.get_literal([T.i32()] * count)
    loaded = asm(text, constraints, struct, operands, False, loc, ip)
    return tuple(Int32(llvm.extractvalue(T.i32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(count))


@dsl_user_op
def arrive_cluster(*, loc: Site = None, ip: Site = None) -> None:
    """Tells the cluster that this thread has read what it reads of others' shared memory."""
    asm("barrier.cluster.arrive.relaxed.aligned;", "", None, [], False, loc, ip)


@dsl_user_op
def wait_cluster(*, loc: Site = None, ip: Site = None) -> None:
    """Waits until all of the cluster have arrived."""
    asm("barrier.cluster.wait.aligned;", "", None, [], False, loc, ip)


@dsl_user_op
def store_global(address: Value, x: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores an integer at a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(x).ir_value(loc=loc, ip=ip)]
    asm("st.global.b32 [$0], $1;", "l,r", None, operands, False, loc, ip)
