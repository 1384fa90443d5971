"""Compile-time configurations of the FP8 kernels. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES

WG = 128
BLOCK_K = 128
CHUNK_K = 64
ENTRY_BYTES = 16
MAX_SMEM = 232448
MAX_K_BLOCKS = 64
QUANTIZE_ROWS = 32
QUANTIZE_THREADS = 8 * QUANTIZE_ROWS
QUANTIZE_SPREAD_BYTES = 114688
"""Shared memory that a spread CTA of the quantiser takes so that two fill an SM."""
CTA_SMEM = {1: MAX_SMEM, 2: 114688, 3: 76288, 4: 56832}
"""CTAs per SM -> bytes of shared memory for each."""
W8A16_REGISTERS = {
    (1, 2): (40, 232),
    (2, 2): (32, 104),
    (1, 4): (32, 112),
    (2, 1): (40, 216),
    (3, 1): (24, 136),
    (4, 1): (24, 104),
}
"""Registers of loading and multiplying threads, by CTAs per SM and consumers, within the CTA's launch allocation."""
W8A8_REGISTERS = {2: 240, 3: 160}
"""Registers of multiplying threads, by warpgroups."""
SUM_REGISTERS = 64
"""Registers per thread for the sums of 64 tokens x 128 features: a set for the block of K, one per block's total."""
MAX_CLUSTER = 8
TOKEN_TILES = (8, 16, 32, 64, 128)
ACT_STRIDE = 9216
"""Activation blocks start at multiples of 1024, as the swizzle needs: 8192 bytes, 256 of scales, a gap."""
FEWEST_STAGES, FEWEST_STAGES_OF_FEW, FEW = 3, 2, 16
"""Stages that W8A16 keeps where the sums of the cluster's other CTAs get a place beside the ring, not over it; the
same for tiles of few tokens, and how many are few. Measured on an H200."""

assert ACT_BLOCK_BYTES <= ACT_STRIDE

_SHARED_SOURCES = (
    *(f"fp8/{name}.py" for name in ("output_sm90", "ptx", "config", "layout")),
    *(f"dsl/{name}.py" for name in ("pipeline", "warpgroup", "ptx")),
)


@dataclass(frozen=True)
class Shares:
    """The division of a tile's sums among the CTAs of a cluster that split K.

    A thread has ``num_parts`` parts of four sums; every ``width`` of them have the same owner. num_threads: of a CTA.
    """

    cluster_k: int
    num_parts: int
    width: int
    num_threads: int

    def owner(self, part: int) -> int:
        """Returns the rank of the CTA that adds a part up and writes it."""
        return part // self.width % self.cluster_k

    def place(self, part: int) -> int:
        """Returns the byte of a part among those that its owner gets from one CTA, for the first thread."""
        turn = part // (self.width * self.cluster_k)
        return (turn * self.width + part % self.width) * self.num_threads * 16

    @property
    def slot_bytes(self) -> int:
        """Bytes that a CTA gets from one other, at most."""
        return -(-self.num_parts // (self.width * self.cluster_k)) * self.width * self.num_threads * 16

    @property
    def num_bytes(self) -> int:
        """Bytes that a CTA gets from all others, at most."""
        return (self.cluster_k - 1) * self.slot_bytes


@dataclass(frozen=True)
class W8A16Config:
    """The shape of one compiled W8A16 kernel.

    num_m64: 64-row blocks per CTA, 1, 2 or 4. num_n: tokens per tile. cluster_k: CTAs that share rows and split K.
    folded: the decode multiplication applies block scales too. ragged: outputs are written one by one.
    per_sm: CTAs that must fit an SM together, so that the next kernel's may fetch while this one's finish.
    consumers: warpgroups that multiply. wgmma: they use ``wgmma``; otherwise ``mma``, which costs less for few tokens.
    Errors: ValueError naming the field, for a shape without a kernel.
    """

    num_m64: int
    num_n: int
    num_stages: int
    cluster_k: int
    folded: bool
    ragged: bool = False
    per_sm: int = 1
    consumers: int = 2
    wgmma: bool = False
    compiler: ClassVar[str] = "fp8.w8a16_sm90:compile_w8a16"

    def __post_init__(self) -> None:
        if (self.per_sm, self.consumers) not in W8A16_REGISTERS:
            raise ValueError(f"per_sm={self.per_sm} with consumers={self.consumers}: no split of the registers")
        if self.num_m64 not in (1, 2, 4) or self.num_m64 % self.consumers:
            raise ValueError(f"num_m64={self.num_m64}: 1, 2 or 4 blocks, shared by consumers={self.consumers}")
        if self.num_n not in TOKEN_TILES:
            raise ValueError(f"num_n={self.num_n}: tiles have {', '.join(map(str, TOKEN_TILES))} tokens")
        if not 1 <= self.cluster_k <= MAX_CLUSTER:
            raise ValueError(f"cluster_k={self.cluster_k}: clusters have 1 to {MAX_CLUSTER} CTAs")
        stages = w8a16_stages(self.num_m64, self.num_n, CTA_SMEM[self.per_sm])
        if not 2 <= self.num_stages <= stages:
            raise ValueError(f"num_stages={self.num_stages}: at least 2, at most {stages} fit shared memory")
        # Two stages hold 2 * (8192 num_m64 + 256 num_n) bytes, sums 256 num_m64 num_n at most, rounded up for few.
        assert self.has_inbox or self.shares.num_bytes <= self.ring_bytes

    @property
    def shares(self) -> Shares:
        num_parts = self.num_m64 // self.consumers * self.num_n // 8
        return Shares(self.cluster_k, num_parts, 1, self.consumers * WG)

    @property
    def ring_bytes(self) -> int:
        return self.num_stages * (self.num_m64 * BLOCK_BYTES + self.num_n * BLOCK_K * 2)

    @property
    def has_inbox(self) -> bool:
        """The sums of the cluster's other CTAs have a place beside the ring, so that they need not wait for its end."""
        budget = CTA_SMEM[self.per_sm] - self.shares.num_bytes
        return self.cluster_k > 1 and self.num_stages <= w8a16_stages(self.num_m64, self.num_n, budget)

    @property
    def name(self) -> str:
        shape = f"r{self.num_m64}n{self.num_n}s{self.num_stages}c{self.cluster_k}p{self.per_sm}w{self.consumers}"
        shape += "_wgmma" if self.wgmma else "_mma"
        return f"fp8_w8a16_{shape}{'_folded' if self.folded else ''}{'_ragged' if self.ragged else ''}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("fp8/w8a16_sm90.py", *_SHARED_SOURCES)

    @property
    def num_threads(self) -> int:
        return WG * (self.consumers + 1)

    @property
    def cluster(self) -> int:
        return self.cluster_k

    def grid(self, num_tokens: int, num_row_blocks: int) -> int:
        return -(-num_row_blocks // self.num_m64) * self.cluster_k * -(-num_tokens // self.num_n)


@dataclass(frozen=True)
class W8A8Config:
    """The shape of one compiled W8A8 kernel.

    warpgroups: consumers, 2 or 3; num_m64: 64-token blocks of each. cluster_n: CTAs that share activations, 1 or 2.
    cluster_k: CTAs that share a tile and split K, each cluster one tile. ragged: outputs are written one by one.
    Errors: ValueError naming the field, for a shape without a kernel.
    """

    warpgroups: int
    num_m64: int
    num_stages: int
    cluster_n: int = 2
    cluster_k: int = 1
    ragged: bool = False
    compiler: ClassVar[str] = "fp8.w8a8_sm90:compile_w8a8"

    def __post_init__(self) -> None:
        if self.warpgroups not in W8A8_REGISTERS:
            raise ValueError(f"warpgroups={self.warpgroups}: 2 or 3")
        if not 1 <= self.num_m64 < W8A8_REGISTERS[self.warpgroups] // SUM_REGISTERS:
            raise ValueError(f"num_m64={self.num_m64}: its sums do not fit a thread's registers")
        if self.cluster_n not in (1, 2):
            raise ValueError(f"cluster_n={self.cluster_n}: 1 or 2")
        if not 1 <= self.cluster_k <= MAX_CLUSTER:
            raise ValueError(f"cluster_k={self.cluster_k}: clusters have 1 to {MAX_CLUSTER} CTAs")
        if self.cluster_n > 1 and self.cluster_k > 1:
            raise ValueError(f"cluster_n={self.cluster_n} with cluster_k={self.cluster_k}: a cluster has one of them")
        stages = w8a8_stages(self.warpgroups, self.num_m64, self.cluster_k)
        if not 2 <= self.num_stages <= stages:
            raise ValueError(f"num_stages={self.num_stages}: at least 2, at most {stages} fit shared memory")

    @property
    def shares(self) -> Shares:
        return w8a8_shares(self.warpgroups, self.num_m64, self.cluster_k)

    @property
    def name(self) -> str:
        shape = f"w{self.warpgroups}r{self.num_m64}s{self.num_stages}c{self.cluster_n}"
        shape += f"k{self.cluster_k}" if self.cluster_k > 1 else ""
        return f"fp8_w8a8_{shape}{'_ragged' if self.ragged else ''}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("fp8/w8a8_sm90.py", *_SHARED_SOURCES)

    @property
    def num_threads(self) -> int:
        return WG * (self.warpgroups + 1)

    @property
    def cluster(self) -> int:
        return self.cluster_n * self.cluster_k

    @property
    def m64_per_tile(self) -> int:
        return self.warpgroups * self.num_m64

    def num_tiles(self, num_tokens: int, num_row_blocks: int) -> int:
        return -(-num_tokens // (64 * self.m64_per_tile)) * -(-num_row_blocks // (2 * self.cluster_n))

    def grid(self, num_tokens: int, num_row_blocks: int, num_sms: int) -> int:
        if self.cluster_k > 1:
            return self.cluster_k * self.num_tiles(num_tokens, num_row_blocks)
        return self.cluster_n * min(self.num_tiles(num_tokens, num_row_blocks), num_sms // self.cluster_n)


@dataclass(frozen=True)
class QuantizeConfig:
    """power_of_two: activation scales are powers of two (``ue8m0``); otherwise any float32. num_k: blocks of K of each
    CTA, 1 or 2. is_spread: an SM holds two CTAs at most."""

    power_of_two: bool
    num_k: int = 1
    is_spread: bool = False
    compiler: ClassVar[str] = "fp8.quantize_sm90:compile_quantize"

    @property
    def name(self) -> str:
        form = ("_k2" if self.num_k == 2 else "") + ("_spread" if self.is_spread else "")
        return f"fp8_quantize_{'ue8m0' if self.power_of_two else 'fp32'}{form}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("fp8/quantize_sm90.py", *_SHARED_SOURCES)

    @property
    def num_threads(self) -> int:
        return QUANTIZE_THREADS

    def grid(self, num_tokens: int, num_k_blocks: int) -> tuple[int, int, int]:
        return -(-num_k_blocks // self.num_k), -(-num_tokens // QUANTIZE_ROWS), 1

    @property
    def cluster(self) -> int:
        return 1


def w8a16_stages(num_m64: int, num_n: int, budget: int = MAX_SMEM) -> int:
    """Returns the number of stages that fit ``budget`` bytes of shared memory, at most 12."""
    fixed = num_m64 * MAX_K_BLOCKS * ENTRY_BYTES + 1024
    return min(12, (budget - fixed) // (num_m64 * BLOCK_BYTES + num_n * BLOCK_K * 2 + 16))


def w8a16_stages_of(num_m64: int, num_n: int, cluster_k: int, per_sm: int, consumers: int) -> int:
    """Returns the number of stages that fit, beside the cluster's sums where that leaves enough of them."""
    shares = Shares(cluster_k, num_m64 // consumers * num_n // 8, 1, consumers * WG)
    beside = w8a16_stages(num_m64, num_n, CTA_SMEM[per_sm] - shares.num_bytes)
    is_enough = beside >= (FEWEST_STAGES_OF_FEW if num_n <= FEW else FEWEST_STAGES)
    return beside if is_enough else w8a16_stages(num_m64, num_n, CTA_SMEM[per_sm])


def w8a8_shares(warpgroups: int, num_m64: int, cluster_k: int) -> Shares:
    """Returns how a cluster divides a tile of 64 * warpgroups * num_m64 tokens by 128 features."""
    return Shares(cluster_k, 16 * num_m64, 2, warpgroups * WG)


def w8a8_stages(warpgroups: int, num_m64: int, cluster_k: int = 1) -> int:
    """Returns the number of stages that fit an SM's shared memory, beside the sums of the cluster's other CTAs."""
    sums = w8a8_shares(warpgroups, num_m64, cluster_k).num_bytes
    stage = warpgroups * num_m64 * ACT_STRIDE + 2 * (BLOCK_BYTES + ENTRY_BYTES) + 16
    return (MAX_SMEM - 1024 - sums) // stage


Fp8Config = W8A16Config | W8A8Config | QuantizeConfig
