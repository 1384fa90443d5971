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
from ownpath.kernels.router.choice import experts_of, table_experts, write_best, write_named
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_EXPERTS, MAX_CHOSEN = 4096, 16


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
    t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    expert, in_t = experts_of(E_PAD), t >= 0
    row = logits_ptr + t[:, None] * num_experts
    token = t
    if HAS_TOKENS:
        token = tl.load(token_ids_ptr + t).to(tl.int64)
    if BY_TOKEN:
        chosen = table_experts(table_ptr, token, in_t, vocab_size, K, K_PAD)
    else:
        bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if BY_TOKEN:
        inside = (tl.arange(0, K_PAD) < K)[None, :] & (chosen >= 0) & (chosen < num_experts)
        logits = tl.load(row + chosen, mask=inside, other=0.0)
        write_named(ids_ptr, weights_ptr, chosen, logits, inside, token, t, in_t, factor, K, K_PAD, HAS_TOKENS)
    else:
        token, t, in_t = token[:, None, None], t[:, None, None], in_t[:, None, None]
        logits = tl.load(logits_ptr + t * num_experts + expert, mask=expert < num_experts, other=0.0)
        write_best(
            ids_ptr, weights_ptr, logits, bias, expert, token, t, in_t, num_experts, factor, K, HAS_TOKENS
        )  # fmt: skip


def check_choice(
    weights: RouterWeights, num_experts: int, token_ids_T: torch.Tensor | None, device: torch.device
) -> None:
    """Checks what experts are chosen by. Errors: ValueError naming what does not fit."""
    k, bias_E, tid2eid_VK = weights.num_experts_per_tok, weights.bias_E, weights.tid2eid_VK
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


def check_token_ids(token_ids_T: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    """Checks token ids. Errors: ValueError for a wrong dtype, shape, stride or device."""
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
            check_token_ids(ids, logits_TE.shape[0], logits_TE.device)
        if out is None:
            out = call.ids.new(), call.weights.new()
        else:
            check_out(out, logits_TE, operand.weights)
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


def check_out(out: RouterOut, rows: torch.Tensor, weights: RouterWeights) -> None:
    """Checks given outputs for some rows. Errors: ValueError naming the one that does not fit."""
    shape, device = (rows.shape[0], weights.num_experts_per_tok), rows.device
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
        check_token_ids(token_ids_T, num_tokens, logits_TE.device)
    if out is None:
        out = logits_TE.new_empty(num_tokens, k, dtype=torch.int64), logits_TE.new_empty(num_tokens, k)
    else:
        check_out(out, logits_TE, weights)
    check_choice(weights, logits_TE.shape[1], token_ids_T, logits_TE.device)
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
