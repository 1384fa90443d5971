"""The router on Hopper: chooses experts in one launch.

How it works. Each token has one warp: scores, then K rounds of "the largest, lowest id first" in registers; with a
look-up table there is no search and only K logits are read. At decode sizes the time is launch latency, which
programmatic dependent launch overlaps with the end of the previous kernel.

Roofline. 4 * T * E bytes read. Limits. float32 logits, E up to 4096, K up to 16. A token's bits never depend on the
other tokens of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import check, check_rank, is_dense
from ownpath.kernels.contract import Config, RouterWeights
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_EXPERTS, MAX_CHOSEN = 4096, 16


@triton.jit
def _score(logits):
    """Computes sqrt(softplus(x)). softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|) in (0, 1].

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
    HAS_TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Chooses one token's experts and their weights."""
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    row = logits_ptr + t * num_experts
    if HAS_TOKENS:
        token = tl.load(token_ids_ptr + t)
    if BY_TOKEN:
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
    if HAS_TOKENS:
        chosen = tl.where(token < 0, -1, chosen)
        weights = tl.where(token < 0, 0.0, weights)
    tl.store(ids_ptr + t * K + k, chosen.to(ids_ptr.dtype.element_ty), mask=k < K)
    tl.store(weights_ptr + t * K + k, weights, mask=k < K)


def _check_choice(logits_TE: torch.Tensor, weights: RouterWeights, token_ids_T: torch.Tensor | None) -> None:
    num_experts, k, device = logits_TE.shape[1], weights.num_experts_per_tok, logits_TE.device
    bias_E, tid2eid_VK = weights.bias_E, weights.tid2eid_VK
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


def _check_token_ids(token_ids_T: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    # A step's ids are often a view into a longer row; scalar loads need only element alignment.
    if token_ids_T.dtype not in (torch.int64, torch.int32) or token_ids_T.shape != (num_tokens,):
        raise ValueError(f"token_ids_T must be int64 or int32 [{num_tokens}]")
    if token_ids_T.device != device or not token_ids_T.is_contiguous():
        raise ValueError(f"token_ids_T must be contiguous on {device}")


RouterOut = tuple[torch.Tensor, torch.Tensor]
RouterCallKey = tuple[torch.Size, torch.dtype | None, bool, torch.dtype, int]
"""Shape of the logits, dtype of the token ids, whether they are aligned, dtype of the ids written, device."""


@dataclass(frozen=True)
class RouterCall:
    """The prepared launch of one size, and its outputs."""

    launch: TritonCall
    ids: EmptyOutput
    weights: EmptyOutput


@dataclass(frozen=True)
class RouterOperand:
    """launches: by ``RouterCallKey``, for inputs that have passed every check."""

    weights: RouterWeights
    launches: LaunchCache[RouterCallKey, RouterCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonRouter:
    """Expert ids [T, K] and weights [T, K] that sum to ``routed_scaling_factor``; scores are sqrt(softplus(logits)).

    Either ``bias_E`` shifts the scores for the selection (never the weights; the lower id wins an exact tie), or
    ``tid2eid_VK`` names the experts of each token id (token 0's row for an id beyond the vocabulary). A negative token
    id marks a padded row: its expert ids are -1 and its weights 0.
    """

    def prepare(self, weights: RouterWeights) -> RouterOperand:
        """Makes the operand."""
        return RouterOperand(weights)

    def configs(self, operand: RouterOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, logits_TE: torch.Tensor, operand: RouterOperand) -> str:
        """Returns the variant's name, which depends on how experts are chosen. The logits are not read."""
        weights = operand.weights
        name = "router_by_score" if weights.tid2eid_VK is None else "router_by_token"
        return variant_name(name, k=weights.num_experts_per_tok)

    def run(
        self,
        logits_TE: torch.Tensor,
        token_ids_T: torch.Tensor | None,
        operand: RouterOperand,
        *,
        out: RouterOut | None = None,
    ) -> RouterOut:
        """Chooses experts. Shapes: logits float32 [T, E]; token ids [T], needed where a table names experts by token;
            out: ids int64 or int32 [T, K], weights float32 [T, K].

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        ids = token_ids_T
        dtype, aligned = (None, True) if ids is None else (ids.dtype, not ids.data_ptr() % 16)
        written = torch.int64 if out is None else out[0].dtype
        key = logits_TE.shape, dtype, aligned, written, logits_TE.get_device()
        call = operand.launches.get(key)
        if call is None or not is_dense(logits_TE, torch.float32):
            return _first(logits_TE, token_ids_T, operand, key, out)
        if ids is not None:
            _check_token_ids(ids, logits_TE.shape[0], logits_TE.device)
        if out is None:
            out = call.ids.new(), call.weights.new()
        else:
            _check_out(out, logits_TE, operand.weights)
        with operand.lock:
            chosen = out[0].data_ptr()
            read = chosen if ids is None else ids.data_ptr()
            call.launch.start(current_stream(key[4]), logits_TE.data_ptr(), read, chosen, out[1].data_ptr())
        return out

    def __call__(
        self,
        logits_TE: torch.Tensor,
        num_experts_per_tok: int,
        routed_scaling_factor: float,
        bias_E: torch.Tensor | None = None,
        token_ids_T: torch.Tensor | None = None,
        tid2eid_VK: torch.Tensor | None = None,
        out: RouterOut | None = None,
    ) -> RouterOut:
        """Computes ``run`` with the signature of the twin."""
        weights = RouterWeights(num_experts_per_tok, routed_scaling_factor, bias_E, tid2eid_VK)
        return self.run(logits_TE, token_ids_T, self.prepare(weights), out=out)


def _check_out(out: RouterOut, logits_TE: torch.Tensor, weights: RouterWeights) -> None:
    shape, device = (logits_TE.shape[0], weights.num_experts_per_tok), logits_TE.device
    check("out[0]", out[0], (torch.int64, torch.int32), shape, device)
    check("out[1]", out[1], (torch.float32,), shape, device)


def _first(
    logits_TE: torch.Tensor,
    token_ids_T: torch.Tensor | None,
    operand: RouterOperand,
    key: RouterCallKey,
    out: RouterOut | None,
) -> RouterOut:
    """Checks everything, launches, and caches the launch of this size."""
    weights = operand.weights
    check_rank("logits_TE", logits_TE, 2, INTERPRETED)
    check("logits_TE", logits_TE, (torch.float32,), tuple(logits_TE.shape), logits_TE.device)
    num_tokens, k = logits_TE.shape[0], weights.num_experts_per_tok
    if token_ids_T is not None:
        _check_token_ids(token_ids_T, num_tokens, logits_TE.device)
    if out is None:
        out = logits_TE.new_empty(num_tokens, k, dtype=torch.int64), logits_TE.new_empty(num_tokens, k)
    else:
        _check_out(out, logits_TE, weights)
    _check_choice(logits_TE, weights, token_ids_T)
    first = _first_launch(logits_TE, token_ids_T, weights, out) if num_tokens else None
    if first is not None:
        made = (EmptyOutput(one.shape, one.dtype, one.get_device()) for one in out)
        operand.launches.add(key, RouterCall(first, *made))
    return out


def _tensors(
    logits_TE: torch.Tensor, token_ids_T: torch.Tensor | None, weights: RouterWeights, out: RouterOut
) -> tuple[torch.Tensor, ...]:
    """Returns the kernel's tensors in order; an absent one is replaced by a tensor that is not read."""
    return (
        logits_TE,
        logits_TE if weights.bias_E is None else weights.bias_E,
        out[0] if token_ids_T is None else token_ids_T,
        out[0] if weights.tid2eid_VK is None else weights.tid2eid_VK,
        *out,
    )


def _first_launch(
    logits_TE: torch.Tensor, token_ids_T: torch.Tensor | None, weights: RouterWeights, out: RouterOut
) -> TritonCall | None:
    num_tokens, num_experts = logits_TE.shape
    k, table, pdl = weights.num_experts_per_tok, weights.tid2eid_VK, not INTERPRETED
    scalars = (weights.routed_scaling_factor, num_experts, 0 if table is None else len(table))
    return launch(
        router_kernel,
        (num_tokens,),
        (*_tensors(logits_TE, token_ids_T, weights, out), *scalars),
        {
            "K": k,
            "K_PAD": triton.next_power_of_2(k),
            "E_PAD": triton.next_power_of_2(num_experts),
            "BY_TOKEN": table is not None,
            "HAS_TOKENS": token_ids_T is not None,
            "PDL": pdl,
            "num_warps": 1 if num_experts <= 1024 else 4,
            "launch_pdl": pdl,
        },
        moving=(0, 2, 4, 5),
    )


ROUTER = TritonRouter()
