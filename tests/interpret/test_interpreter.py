"""The corrected interpreter computes what the hardware's instructions define, with torch as the witness."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def cast_kernel(src, dst, num, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + at, tl.load(src + at, mask=at < num).to(dst.dtype.element_ty), mask=at < num)


@triton.jit
def arithmetic_kernel(a, b, out, compared, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x * y + x)
    tl.store(compared + at, (x < y).to(tl.int32))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    w = tl.load(b + n[:, None] * K + k[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, w.T))


@triton.jit
def scaled_kernel(a, a_scale, b, b_scale, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 2), tl.arange(0, K // GROUP)
    x = tl.load(a + m[:, None] * (K // 2) + k[None, :])
    w = tl.load(b + n[:, None] * (K // 2) + k[None, :])
    x_scale = tl.load(a_scale + m[:, None] * (K // GROUP) + g[None, :])
    w_scale = tl.load(b_scale + n[:, None] * (K // GROUP) + g[None, :])
    acc = tl.full((M, N), 1.0, dtype=tl.float32)
    acc = tl.dot_scaled(x, x_scale, "e2m1", w.T, w_scale, "e2m1", acc)
    tl.store(out + m[:, None] * N + n[None, :], acc)


@triton.jit
def mixed_kernel(a, b, b_scale, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    x = tl.load(a + m[:, None] * K + k[None, :])
    w = tl.load(b + n[:, None] * K + k[None, :])
    w_scale = tl.load(b_scale + n[:, None] * (K // 32) + g[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot_scaled(x, None, "bf16", w.T, w_scale, "e4m3"))


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(values.shape, dtype=dtype)
    block = 1 << 16
    cast_kernel[(triton.cdiv(values.numel(), block),)](values, out, values.numel(), BLOCK=block)
    return out


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def every_upper_half() -> torch.Tensor:
    """Every finite float32 whose lower half is one of the patterns around a rounding decision of bfloat16."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    upper = upper[(upper & 0x7F80) != 0x7F80]
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return ((upper[:, None] << 16) | lower).flatten().to(torch.int32).view(torch.float32)


def test_float32_to_bf16_rounds_to_nearest_even() -> None:
    """Expected bits by integer arithmetic: add half a unit minus one, plus the last kept bit, then truncate."""
    values = every_upper_half()
    pattern = bits(values).to(torch.int64) & 0xFFFFFFFF
    expected = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    assert torch.equal(bits(cast(values, torch.bfloat16)).to(torch.int64) & 0xFFFF, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_bf16_converts(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    wide = values.float()
    expected = (wide.clamp(-448, 448) if dtype.itemsize == 1 else wide).to(dtype)
    assert torch.equal(bits(cast(values, dtype)), bits(expected))


def test_float32_to_e4m3_is_nearest_even_and_saturates() -> None:
    """Expected values by search: the nearest of all finite codes, the even code on a tie."""
    codes = torch.arange(127, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    between = (table[1:] + table[:-1]) / 2
    points = torch.cat((table, between, between * (1 + 2**-20), between * (1 - 2**-20), torch.tensor([460.0, 1e9])))
    distance = (points[:, None] - table).abs()
    nearest = distance == distance.min(dim=1, keepdim=True).values
    even_first = torch.where(codes % 2 == 0, 2, 1) * nearest
    expected = codes[even_first.argmax(dim=1)]
    assert torch.equal(bits(cast(points.float(), torch.float8_e4m3fn)), expected)
    assert torch.equal(bits(cast(-points.float(), torch.float8_e4m3fn)), expected | 128)


def test_every_e4m3_widens_exactly() -> None:
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    got, expected = cast(values, torch.float32), values.float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_bf16_arithmetic_rounds_each_operation() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(512, dtype=torch.float32).to(torch.bfloat16) for _ in range(2))
    out, compared = torch.zeros_like(a), torch.zeros(512, dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, out, compared, BLOCK=512)
    assert torch.equal(bits(out), bits(a * b + a))
    assert torch.equal(compared.bool(), a < b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    """Small integers: every product and sum is exact in float32, so the order of summation cannot matter."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 9, (rows, 128), generator=generator).float() for rows in (32, 16))
    out = torch.full((32, 16), torch.nan)
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), out, M=32, N=16, K=128)
    assert torch.equal(out, a @ b.T)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_fp4(rows: int, num_k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes uint8 [rows, K/2], low nibble first, and their values float64 [rows, K]."""
    codes = torch.randint(0, 16, (rows, num_k), generator=generator)
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)[codes]
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8), values


@pytest.mark.parametrize("group", [16, 32])
def test_dot_scaled_of_two_fp4_operands(group: int) -> None:
    """E4M3 scales per 16 (NVFP4) and E8M0 scales per 32 (MXFP4), against float64 of the decoded operands."""
    generator = torch.Generator().manual_seed(2)
    num_m, num_n, num_k = 32, 16, 128
    (a, a_MK), (b, b_NK) = random_fp4(num_m, num_k, generator), random_fp4(num_n, num_k, generator)
    low, high = (1, 127) if group == 16 else (120, 134)
    stored = [
        torch.randint(low, high, (rows, num_k // group), generator=generator).to(torch.uint8) for rows in (num_m, num_n)
    ]
    kind = torch.float8_e4m3fn if group == 16 else torch.float8_e8m0fnu
    decoded = [scale.view(kind).double().repeat_interleave(group, dim=1) for scale in stored]
    scales = [scale.view(kind) if group == 16 else scale for scale in stored]
    out = torch.full((num_m, num_n), torch.nan)
    scaled_kernel[(1,)](a, scales[0], b, scales[1], out, M=num_m, N=num_n, K=num_k, GROUP=group)
    terms_a, terms_b = a_MK * decoded[0], b_NK * decoded[1]
    bound = num_k * 2**-24 * (terms_a.abs() @ terms_b.abs().T + 1)  # K float32 additions
    assert ((out.double() - (terms_a @ terms_b.T + 1)).abs() <= bound).all()


def test_dot_scaled_of_bf16_and_fp8() -> None:
    """One operand without a scale, the other E4M3 with E8M0 scales per 32."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-8, 9, (16, 64), generator=generator).to(torch.bfloat16)
    b = torch.randint(-8, 9, (16, 64), generator=generator).float().to(torch.float8_e4m3fn)
    scale = torch.randint(125, 130, (16, 2), generator=generator).to(torch.uint8)
    out = torch.full((16, 16), torch.nan)
    mixed_kernel[(1,)](a, b, scale, out, M=16, N=16, K=64)
    spread = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=1)
    assert torch.equal(out, a.float() @ (b.float() * spread).T)
