"""Distances between DeepSeek's published code, vLLM and transformers, step by step, on values of V4-Flash's sizes.

Each test states the three ways of one step on its own (BF16 activations, float64 as the measure), prints the size of
the difference, and holds it between two bounds that follow from the formats: a rounding to BF16 moves a value by at
most 2^-9 of itself, one to E4M3 by at most 2^-4, one to E2M1 by at most 1/5 (or all of it, where it becomes zero).
``docs/numerics.md`` has the printed numbers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.formats import MXFP4
from ownpath.kernels.cache_formats.ref import fp4_index, fp8_keys
from ownpath.kernels.norms.ref import rms_norm_stepwise
from ownpath.kernels.official_experts.ref import ExpertWeights, moe_official
from ownpath.kernels.router.ref import router
from ownpath.numerics import decode_mxfp4_blocks, hadamard, quantize_mxfp4
from ownpath.oracle.formats import E4M3 as E4M3_VALUES
from ownpath.oracle.formats import fp4, fp8, nearest, nvfp4_without_global, power_of_two_scale

BF16, E4M3, E2M1 = 2**-9, 2**-4, 0.5
TOKENS, HIDDEN, INTER = 64, 4096, 2048


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def difference(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def report(row: str, **sizes: float) -> None:
    print(f"table {row}: " + ", ".join(f"{name} {size:.1e}" for name, size in sizes.items()))


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def activations(*shape: int) -> Tensor:
    return bf16(torch.randn(*shape))


def fp8_pow2_of_row(x: Tensor) -> Tensor:
    """One power-of-two scale for all channels of a row."""
    scale = power_of_two_scale(x.float().abs().amax(-1, keepdim=True), 448)
    return nearest(x.double() / scale, E4M3_VALUES) * scale


def expert(x: Tensor, w13: Tensor, w2: Tensor, quantize: object) -> Tensor:
    """One expert in float64 but for its inputs and BF16 hidden rows."""
    gate, up = (quantize(x).double() @ w13.T).chunk(2, -1)  # type: ignore[operator]
    hidden = bf16(F.silu(gate.clamp(max=10)) * up.clamp(-10, 10))
    return quantize(hidden).double() @ w2.T  # type: ignore[operator]


def test_expert_math() -> None:
    """Published: E4M3 activations x MXFP4. vLLM: BF16 activations (Hopper), NVFP4 (Blackwell). transformers: BF16."""
    x = activations(TOKENS, HIDDEN)
    q13, q2 = (quantize_mxfp4(torch.randn(n, k) * k**-0.5) for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER)))
    w13, w2 = (decode_mxfp4_blocks(q.qdata, q.scale, torch.float64) for q in (q13, q2))
    gate, up = (x.double() @ w13.T).chunk(2, -1)
    exact = (F.silu(gate.clamp(max=10)) * up.clamp(-10, 10)) @ w2.T

    stacks = (ExpertWeights(MXFP4, q.qdata[None], q.scale[None]) for q in (q13, q2))
    ids, one = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1)
    official = difference(moe_official(x, ids, one, *stacks, 10.0), exact)
    unquantized = difference(bf16(expert(x, w13, w2, lambda rows: rows)), exact)

    def nvfp4(rows: Tensor) -> Tensor:
        scale = rows.float().abs().max() / 2688
        return nvfp4_without_global(rows, scale) * scale.double()

    blackwell = difference(expert(x, w13, w2, nvfp4), exact)
    report(
        "expert math", official=official, vllm_hopper=unquantized, vllm_blackwell=blackwell, transformers=unquantized
    )
    assert unquantized <= 3 * BF16 < official <= 2 * E4M3 < blackwell <= E2M1


def test_routing_weight() -> None:
    """Published: before w2, in BF16 hidden rows. vLLM, transformers: after w2. The same but for one rounding."""
    x, w2 = activations(TOKENS, INTER), bf16(torch.randn(HIDDEN, INTER) * INTER**-0.5).double()
    weight = torch.rand(TOKENS, 1) + 0.1
    before = bf16(bf16(weight * x.float()).double() @ w2.T)
    after = bf16(weight.double() * bf16(x.double() @ w2.T).double())
    size = difference(before, after)
    report("routing weight", difference=size)
    assert 0 < size <= 3 * BF16


def test_wo_a() -> None:
    """Published, transformers: BF16 activations. vLLM: attention's output in E4M3 per 1 x 128."""
    o, weight = activations(TOKENS, HIDDEN), bf16(torch.randn(1024, HIDDEN) * HIDDEN**-0.5).double()
    exact = o.double() @ weight.T
    official, vllm = difference(bf16(exact), exact), difference(bf16(fp8(o, 128) @ weight.T), exact)
    report("wo_a", official=official, vllm=vllm)
    assert official <= BF16 < vllm <= E4M3


def index_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index queries, keys and head weights of V4-Flash's shape, and the exact scores."""
    q, k, w = activations(TOKENS, 64, 128), activations(2048, 128), torch.randn(TOKENS, 64).double() / 90
    return q, k, w, index_scores(q, k, w)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (torch.einsum("tih,ch->tic", q.double(), k.double()).relu() * w[..., None]).sum(1)


def chosen(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(512, dim=1).indices, True)


def test_hadamard_without_quantisation() -> None:
    """Rotating both sides changes no score: vLLM and transformers leave it out."""
    q, k, w, exact = index_data()
    rotated = index_scores(hadamard(q.double()), hadamard(k.double()), w)
    size = difference(rotated, exact)
    report("Hadamard alone", difference=size)
    assert size <= 128 * torch.finfo(torch.float64).eps


def test_index_quantisation() -> None:
    """Published: Hadamard, E2M1 per 32. vLLM: E4M3 per 128. SGLang: Hadamard, E4M3. transformers: none."""
    q, k, w, exact = index_data()
    ways = {
        "official": (fp4_index(q), fp4_index(k)),
        "vllm": (fp8_pow2_of_row(q), fp8_pow2_of_row(k)),
        "sglang": (fp8_pow2_of_row(hadamard(q)), fp8_pow2_of_row(hadamard(k))),
        "vllm_mxfp4": (fp4(q, 32), fp4(k, 32)),
    }
    scores = {name: index_scores(*pair, w) for name, pair in ways.items()}
    sizes = {name: difference(score, exact) for name, score in scores.items()}
    kept = {name: (chosen(score) & chosen(exact)).sum().item() / (512 * TOKENS) for name, score in scores.items()}
    report("index scores", **sizes)
    report("index choices kept", **kept)
    assert BF16 < sizes["vllm"] <= 2 * E4M3 < sizes["official"] <= 2 * E2M1
    assert BF16 < sizes["sglang"] <= 2 * E4M3 < sizes["vllm_mxfp4"] <= 2 * E2M1
    assert kept["official"] < kept["vllm"] < 1


def test_index_weights() -> None:
    """Published: a BF16 product, scaled in BF16. vLLM: a BF16 product. transformers and ours: sums of float32."""
    q, k, w, _ = index_data()
    q, k = fp4_index(q), fp4_index(k)
    exact = index_scores(q, k, w)
    published, vllm = (index_scores(q, k, rounded) for rounded in (bf16(bf16(w * 90) / 90), bf16(w * 90).double() / 90))
    sizes = {"official": difference(published, exact), "vllm": difference(vllm, exact)}
    kept = (chosen(published) & chosen(exact)).sum().item() / (512 * TOKENS)
    report("index weights", **sizes, choices_lost=1 - kept)
    assert 0 < sizes["vllm"] <= sizes["official"] <= 2 * BF16 * 64**0.5, "heads of both signs cancel"


def test_index_scores_sums() -> None:
    """Published: BF16 scores, weights and sums of heads. vLLM, transformers and ours, official or not: float32."""
    q, k, w, _ = index_data()
    q, k = fp4_index(q), fp4_index(k)
    exact = index_scores(q, k, w)
    narrow = torch.einsum("tih,ch->tic", q.float(), k.float()).to(torch.bfloat16).relu()
    summed = (narrow * bf16(w)[..., None]).sum(1)
    size = difference(summed, exact)
    kept = (chosen(summed.float()) & chosen(exact)).sum().item() / (512 * TOKENS)
    report("index score sums", official=size, choices_kept=kept)
    assert 0 < size <= 4 * BF16 * 64**0.5, "heads of both signs cancel, so that the roundings weigh more"


def test_compressor() -> None:
    """Published: float32. vLLM: BF16 operands, float32 result, the same. transformers: BF16 result."""
    x, weight = activations(TOKENS, HIDDEN), bf16(torch.randn(1024, HIDDEN) * HIDDEN**-0.5)
    exact = x.double() @ weight.double().T
    official, transformers = difference(x.float() @ weight.float().T, exact), difference(bf16(exact), exact)
    report("compressor", official=official, vllm=official, transformers=transformers)
    assert official <= HIDDEN**0.5 * 2**-24 < 2**-12 < transformers <= BF16


def test_keys() -> None:
    """Published: E4M3 of 448 channels per 64, read back. vLLM: the same values, stored. transformers: none."""
    kv = activations(TOKENS, 512)
    kept = fp8_keys(kv, 64)
    codes = torch.cat([nearest(block / scale, E4M3_VALUES) * scale for block, scale in _pages(kv)], -1)
    assert torch.equal(kept[:, :448].double(), codes), "what a real FP8 cache reads back"
    assert torch.equal(kept[:, 448:], kv[:, 448:])
    size = difference(kept, kv)
    report("keys", official=size, vllm=size, transformers=0.0)
    assert BF16 < size <= E4M3


def _pages(kv: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The seven blocks of a cache entry with their scales."""
    blocks = [kv[:, start : start + 64].double() for start in range(0, 448, 64)]
    return [(block, power_of_two_scale(block.abs().amax(-1, keepdim=True).clamp(min=1e-4), 448)) for block in blocks]


def test_query_head_norm() -> None:
    """Published: every operation in BF16. vLLM: float32, rounded once. transformers: float32 factor, BF16 product."""
    q = activations(TOKENS, 64, 512)
    factor = torch.rsqrt(q.double().square().mean(-1, keepdim=True) + 1e-6)
    exact = q.double() * factor
    sizes = {
        "official": difference(rms_norm_stepwise(q, None, 1e-6), exact),
        "vllm": difference(bf16(exact), exact),
        "transformers": difference(q * bf16(factor), exact),
    }
    report("query head norm", **sizes)
    assert sizes["vllm"] <= BF16
    assert sizes["vllm"] < sizes["transformers"] <= 2 * BF16
    assert sizes["vllm"] < sizes["official"] <= 3 * BF16


def test_hyper_connections() -> None:
    """Published, vLLM: float32 mixing, rounded once. transformers: weights and products in BF16."""
    streams, y = activations(TOKENS, 4, HIDDEN), activations(TOKENS, HIDDEN)
    comb, post = torch.rand(TOKENS, 4, 4).softmax(-1), 2 * torch.rand(TOKENS, 4, 1)
    exact = post.double() * y.double()[:, None] + comb.double().transpose(1, 2) @ streams.double()
    narrow = bf16(post) * y[:, None] + bf16(comb).transpose(1, 2) @ streams
    official, transformers = difference(bf16(exact), exact), difference(narrow, exact)
    report("hyper-connections", official=official, vllm=official, transformers=transformers)
    assert official <= BF16
    assert official < transformers <= 4 * BF16


def test_router() -> None:
    """Published: float32. vLLM: BF16 operands, float32 result, the same. transformers: BF16 result; other choices."""
    x, gate = activations(2048, HIDDEN), bf16(torch.randn(256, HIDDEN) * HIDDEN**-0.5)
    logits = x.float() @ gate.float().T
    exact = x.double() @ gate.double().T
    bias = torch.zeros(256)
    ids, narrow_ids = (router(part, 6, 1.5, bias)[0].sort(1).values for part in (logits, bf16(logits).float()))
    moved = (ids != narrow_ids).any(1).double().mean().item()
    report(
        "router", official=difference(logits, exact), transformers=difference(bf16(exact), exact), tokens_moved=moved
    )
    assert difference(logits, exact) <= HIDDEN**0.5 * 2**-24
    assert 0 < moved < 0.1
    assert torch.equal(ids, router(exact.float(), 6, 1.5, bias)[0].sort(1).values)


def test_renormalisation() -> None:
    """Published: no epsilon. transformers: 1e-20 on the sum, which no sum of scores notices."""
    scores = F.softplus(torch.randn(TOKENS, 6)).sqrt()
    plain, with_eps = scores / scores.sum(1, keepdim=True), scores / (scores.sum(1, keepdim=True) + 1e-20)
    report("renormalisation", difference=difference(with_eps, plain))
    assert torch.equal(plain, with_eps)


def test_head() -> None:
    """Published: float32 logits. vLLM, transformers: BF16 logits, which tie where the best two are close."""
    x, weight = activations(TOKENS, HIDDEN), bf16(torch.randn(8192, HIDDEN) * HIDDEN**-0.5)
    exact = x.double() @ weight.double().T
    official, narrow = x.float() @ weight.float().T, bf16(exact)
    tied = (narrow == narrow.amax(1, keepdim=True)).sum(1).gt(1).double().mean().item()
    report("head", official=difference(official, exact), vllm=difference(narrow, exact), tokens_tied=tied)
    assert difference(official, exact) <= HIDDEN**0.5 * 2**-24
    assert 2**-12 < difference(narrow, exact) <= BF16
    assert torch.equal(official.argmax(1), exact.argmax(1))
