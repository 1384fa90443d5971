"""Router, RMS norm and SwiGLU: one launch each, between the large products.

How they work. The router gives each token one warp: scores, then K rounds of "the largest, lowest id first" in
registers; with a look-up table there is nothing to search and only K logits are read. RMS norm gives each row a
program (short rows share one), reads it once and keeps it in registers. SwiGLU is elementwise.

Why they are fast. Each reads and writes every byte once and does no other memory traffic; at decode sizes they are
launch latency, which programmatic dependent launch overlaps with the end of the kernel before.

Roofline. Router: 4 * T * E bytes read. RMS norm: 4 * D bytes a row. SwiGLU: 6 * F bytes a row.

Limits. Router: float32 logits, E up to 4096, K up to 16. RMS norm: bfloat16 or float32, D up to 16384, last dimension
contiguous, rows equally spaced. SwiGLU: bfloat16 or float32, F a multiple of 8. A token's bits never depend on the
other tokens of a call.
"""

import torch
import triton
import triton.language as tl

from ownpath.kernels.triton.checks import VECTOR_BYTES, check, check_alignment, check_rank

INTERPRETED = triton.knobs.runtime.interpret
MAX_EXPERTS, MAX_CHOSEN, MAX_WIDTH = 4096, 16, 16384
FLOATS = (torch.bfloat16, torch.float32)


@triton.jit
def _score(logits):
    """sqrt(softplus(x)). softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|) in (0, 1].

    log1p(e) = 2 atanh(z), z = e / (2 + e) <= 1/3: an odd series whose first dropped term is below 3^-20 / 21 of z.
    """
    e = tl.exp(-tl.abs(logits))
    z = e / (2.0 + e)
    q = z * z
    series = 1.0 / 15.0 + q * (1.0 / 17.0 + q * (1.0 / 19.0))
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * series))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * series)))
    return tl.sqrt(tl.maximum(logits, 0.0) + 2.0 * z * series)


@triton.jit
def router_kernel(
    logits_ptr,
    bias_ptr,
    token_ids_ptr,
    table_ptr,
    ids_ptr,
    weights_ptr,
    factor,
    num_experts,
    vocab_size,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: its experts and their weights."""
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    row = logits_ptr + t * num_experts
    if BY_TOKEN:
        token = tl.load(token_ids_ptr + t)
        known = (token >= 0) & (token < vocab_size)
        chosen = tl.load(table_ptr + token * K + k, mask=(k < K) & known, other=0).to(tl.int32)
    else:
        bias = tl.load(bias_ptr + e, mask=e < num_experts, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if not BY_TOKEN:
        logits = tl.load(row + e, mask=e < num_experts, other=0.0)
        left = tl.where(e < num_experts, _score(logits) + bias, float("-inf"))
        chosen = tl.zeros((K_PAD,), dtype=tl.int32)
        for round_idx in tl.static_range(K):
            best = tl.minimum(tl.argmax(left, axis=0, tie_break_left=True), num_experts - 1)
            chosen = tl.where(k == round_idx, best, chosen)
            left = tl.where(e == best, float("-inf"), left)
    inside = (k < K) & (chosen >= 0) & (chosen < num_experts)
    scores = tl.where(inside, _score(tl.load(row + chosen, mask=inside, other=0.0)), 0.0)
    weights = scores / tl.sum(scores, axis=0) * factor
    tl.store(ids_ptr + t * K + k, chosen.to(ids_ptr.dtype.element_ty), mask=k < K)
    tl.store(weights_ptr + t * K + k, weights, mask=k < K)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    inner_rows,
    outer_stride,
    row_stride,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows; row r starts at (r // inner_rows) * outer_stride + (r % inner_rows) * row_stride."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (r < num_rows)[:, None] & (d < D)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = (r // inner_rows) * outer_stride + (r % inner_rows) * row_stride
    x = tl.load(x_ptr + start[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    if HAS_WEIGHT:
        y = y * weight[None, :]
    tl.store(y_ptr + r[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, F, limit, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK outputs of one row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + f, y.to(y_ptr.dtype.element_ty), mask=f < F)


def _router_out(
    logits_TE: torch.Tensor, k: int, out: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, device = len(logits_TE), logits_TE.device
    if out is None:
        ids_TK = torch.empty(num_tokens, k, dtype=torch.int64, device=device)
        return ids_TK, torch.empty(num_tokens, k, dtype=torch.float32, device=device)
    check("out[0]", out[0], (torch.int64, torch.int32), (num_tokens, k), device)
    check("out[1]", out[1], (torch.float32,), (num_tokens, k), device)
    return out


def _check_choice(
    logits_TE: torch.Tensor,
    k: int,
    bias_E: torch.Tensor | None,
    token_ids_T: torch.Tensor | None,
    tid2eid_VK: torch.Tensor | None,
) -> None:
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    if not 0 < k <= min(num_experts, MAX_CHOSEN) or num_experts > MAX_EXPERTS:
        raise ValueError(f"cannot choose {k} of {num_experts} experts: limits are {MAX_CHOSEN} and {MAX_EXPERTS}")
    if (bias_E is None) == (tid2eid_VK is None):
        raise ValueError("exactly one of bias_E and tid2eid_VK must be given")
    if bias_E is not None:
        check("bias_E", bias_E, (torch.float32,), (num_experts,), device)
    if tid2eid_VK is not None:
        check("tid2eid_VK", tid2eid_VK, (torch.int64, torch.int32), (len(tid2eid_VK), k), device)
        if token_ids_T is None:
            raise ValueError("token_ids_T is needed to look experts up")
        # A step's ids are often a view into a longer row: element alignment is enough for scalar loads.
        if token_ids_T.dtype not in (torch.int64, torch.int32) or token_ids_T.shape != (num_tokens,):
            raise ValueError(f"token_ids_T must be int64 or int32 [{num_tokens}]")
        if token_ids_T.device != device or not token_ids_T.is_contiguous():
            raise ValueError(f"token_ids_T must be contiguous on {device}")


def router(
    logits_TE: torch.Tensor,
    num_experts_per_tok: int,
    routed_scaling_factor: float,
    bias_E: torch.Tensor | None = None,
    token_ids_T: torch.Tensor | None = None,
    tid2eid_VK: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids [T, K] and weights [T, K] that sum to ``routed_scaling_factor``; scores are sqrt(softplus(logits)).

    Either ``bias_E`` shifts the scores for the selection (never the weights; the lower id wins an exact tie), or
    ``tid2eid_VK`` names the experts of each token id (token 0's row for an id outside the vocabulary).
    Shapes: logits float32 [T, E]; bias float32 [E]; tid2eid int64 or int32 [V, K]; out: ids int64 or int32, weights
        float32, both [T, K].
    Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
    """
    check_rank("logits_TE", logits_TE, 2, INTERPRETED)
    check("logits_TE", logits_TE, (torch.float32,), tuple(logits_TE.shape), logits_TE.device)
    _check_choice(logits_TE, num_experts_per_tok, bias_E, token_ids_T, tid2eid_VK)
    ids_TK, weights_TK = _router_out(logits_TE, num_experts_per_tok, out)
    num_tokens, num_experts = logits_TE.shape
    if num_tokens:
        by_token, pdl = tid2eid_VK is not None, not INTERPRETED
        router_kernel[(num_tokens,)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            token_ids_T if by_token else ids_TK,
            tid2eid_VK if by_token else ids_TK,
            ids_TK,
            weights_TK,
            routed_scaling_factor,
            num_experts,
            len(tid2eid_VK) if tid2eid_VK is not None else 0,
            K=num_experts_per_tok,
            K_PAD=triton.next_power_of_2(num_experts_per_tok),
            E_PAD=triton.next_power_of_2(num_experts),
            BY_TOKEN=by_token,
            PDL=pdl,
            num_warps=1 if num_experts <= 1024 else 4,
            launch_pdl=pdl,
        )
    return ids_TK, weights_TK


def _row_steps(x: torch.Tensor) -> tuple[int, int, int]:
    """(rows of the innermost run, elements between runs, elements between its rows) of x [..., D], as it lies.

    Errors: ValueError naming x when its rows need more than two steps.
    """
    shape, stride = list(x.shape[:-1]), list(x.stride()[:-1])
    runs: list[tuple[int, int]] = []
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size == 1:
            continue
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, step))
    if len(runs) > 2:
        raise ValueError(f"x must have rows at one or two regular steps, found strides {list(x.stride())}")
    inner = runs[0] if runs else (1, 0)
    return inner[0], runs[1][1] if len(runs) > 1 else 0, inner[1]


def _check_norm(x: torch.Tensor, weight_D: torch.Tensor | None) -> None:
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    check_rank("x", x, x.ndim, INTERPRETED)
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be bfloat16 or float32, found {x.dtype}")
    dim, vector = x.shape[-1], VECTOR_BYTES // x.element_size()
    if not 0 < dim <= MAX_WIDTH or dim % vector:
        raise ValueError(f"x must have rows of a multiple of {vector} up to {MAX_WIDTH} elements, found {dim}")
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) != 1 or any(step % vector for step in steps):
        raise ValueError(f"x must have contiguous rows at multiples of 16 bytes, found strides {list(x.stride())}")
    check_alignment("x", x)
    if weight_D is not None:
        check("weight_D", weight_D, FLOATS, (dim,), x.device)


def norm_tile(dim: int) -> tuple[int, int, int]:
    """Rows of a program, elements of a row with padding, and warps: by width alone, so that a row's sum never depends
    on the other rows."""
    block = int(triton.next_power_of_2(dim))
    rows = max(1, min(8, 2048 // block))
    return rows, block, max(1, min(16, rows * block // 256))


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; no weight means ones.

    Shapes: x bfloat16 or float32 [..., D], rows may be spaced (a slice of a wider tensor); weight [D]; out as x,
        contiguous.
    Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
    """
    _check_norm(x, weight_D)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check("out", out, (x.dtype,), tuple(x.shape), x.device)
    dim = x.shape[-1]
    num_rows = x.numel() // dim
    if num_rows:
        inner_rows, outer_stride, row_stride = _row_steps(x)
        (rows, block_d, num_warps), pdl = norm_tile(dim), not INTERPRETED
        rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            x if weight_D is None else weight_D,
            out,
            num_rows,
            inner_rows,
            outer_stride,
            row_stride,
            dim,
            eps,
            ROWS=rows,
            BLOCK_D=block_d,
            HAS_WEIGHT=weight_D is not None,
            PDL=pdl,
            num_warps=num_warps,
            launch_pdl=pdl,
        )
    return out


def swiglu_block(half: int) -> int:
    """Outputs of one program."""
    return min(1024, int(triton.next_power_of_2(half)))


def swiglu(gate_up_TF2: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), gate columns first, in float32, rounded once.

    Shapes: gate_up bfloat16 or float32 [..., 2F], contiguous; y [..., F].
    Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
    """
    check_rank("gate_up_TF2", gate_up_TF2, max(1, gate_up_TF2.ndim), INTERPRETED)
    *lead, width = gate_up_TF2.shape
    if width % 16:
        raise ValueError(f"gate_up_TF2 must have rows of a multiple of 16 elements, found {width}")
    check("gate_up_TF2", gate_up_TF2, FLOATS, tuple(gate_up_TF2.shape), gate_up_TF2.device)
    half = width // 2
    if out is None:
        out = gate_up_TF2.new_empty(*lead, half)
    check("out", out, (gate_up_TF2.dtype,), (*lead, half), gate_up_TF2.device)
    if out.numel():
        pdl, block = not INTERPRETED, swiglu_block(half)
        grid = (out.numel() // half, triton.cdiv(half, block))
        swiglu_kernel[grid](
            gate_up_TF2, out, half, limit, BLOCK=block, PDL=pdl, num_warps=max(1, block // 256), launch_pdl=pdl
        )
    return out
