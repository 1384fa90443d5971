"""The forward's parts, each against its definition written another way."""

import math

import pytest
import torch

from ownpath.attention.compress import Compressor
from ownpath.attention.rope import Rope
from ownpath.attention.select import EntrySelector
from ownpath.kernels.hyper.ref import HyperWeights, hyper_post, hyper_pre, sinkhorn
from ownpath.kernels.mixture import clamped_swiglu as swiglu
from ownpath.kernels.norms.ref import rms_norm
from ownpath.runners import PlainLinear, RMSNorm, Router, SwigluMlp

EPS_F32 = torch.finfo(torch.float32).eps


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(13)


def test_sinkhorn_is_doubly_stochastic(generator: torch.Generator, device: torch.device) -> None:
    comb = sinkhorn(torch.randn(7, 4, 4, generator=generator).to(device), num_iters=20, eps=1e-6)
    assert (comb > 0).all()
    # Columns were normalised last: their sums miss 1 by eps alone. Rows converge with the iterations.
    torch.testing.assert_close(comb.sum(-2), torch.ones(7, 4, device=device), atol=3e-6, rtol=0)
    torch.testing.assert_close(comb.sum(-1), torch.ones(7, 4, device=device), atol=1e-3, rtol=0)


def test_sinkhorn_goes_the_right_way() -> None:
    """One iteration: row softmax, then columns. A transposed matrix would come out with rows that sum to 1."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(7.0), 0.0]]])
    expected = torch.tensor([[[0.25 / 1.125, 0.75 / 0.875], [0.875 / 1.125, 0.125 / 0.875]]])
    torch.testing.assert_close(sinkhorn(logits, num_iters=1, eps=0.0), expected)


def test_hyper_connection_mixes_from_stream_to_stream(device: torch.device) -> None:
    """With fn = 0 the weights are the base alone; stream k receives sum over j of comb[j, k] * stream j."""
    streams = 2
    base = torch.tensor([0.0, math.log(3.0), 0.0, -math.log(3.0), 50.0, 0.0, 50.0, 0.0], device=device)
    hyper = HyperWeights(
        fn=torch.zeros(8, streams * 3, device=device),
        base=base,
        scale=torch.ones(3, device=device),
        norm_weight=torch.ones(3, device=device),
        num_iters=1,
        eps=0.0,
        mix_norm_eps=1e-6,
        norm_eps=1e-6,
    )
    x = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]], device=device)
    y, mix = hyper_pre(x, hyper)
    assert mix is not None
    torch.testing.assert_close(y, 0.5 * x[:, 0] + 0.75 * x[:, 1])
    torch.testing.assert_close(mix.post_TS, torch.tensor([[1.0, 0.5]], device=device))
    # Both rows put everything on stream 0: its column is shared, [0.5, 0.5]; stream 1's column underflows evenly.
    out = hyper_post(x, torch.ones_like(y), mix)
    torch.testing.assert_close(out[:, 0], 1.0 + 0.5 * (x[:, 0] + x[:, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_against_float64(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    x = torch.randn(5, 96, generator=generator).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(96, generator=generator)).to(device, torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    bound = torch.finfo(dtype).eps + 8 * EPS_F32
    for found, expected in (
        (rms_norm(x, None, 1e-6), exact),
        (RMSNorm(weight, 1e-6)(x), exact * weight.double()),
    ):
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= bound * expected.abs()).all()


@pytest.mark.parametrize(("gate", "up"), [(20.0, 30.0), (-20.0, -30.0), (10.0, 10.0), (9.5, -9.5), (0.0, 4.0)])
def test_swiglu_clamps_the_gate_above_and_up_on_both_sides(gate: float, up: float) -> None:
    limited_gate, limited_up = min(gate, 10.0), max(-10.0, min(up, 10.0))
    expected = limited_gate / (1 + math.exp(-limited_gate)) * limited_up
    found = swiglu(torch.tensor([gate]), torch.tensor([up]), 10.0).item()
    assert found == pytest.approx(expected, rel=4 * EPS_F32)


def test_the_shared_expert_is_clamped_too(device: torch.device) -> None:
    identity = torch.eye(2, device=device)
    mlp = SwigluMlp(PlainLinear(torch.cat((identity, identity))), PlainLinear(identity), swiglu_limit=1.0)
    y = mlp(torch.tensor([[5.0, 0.5]], device=device))
    silu = [value / (1 + math.exp(-value)) for value in (1.0, 0.5)]
    assert y.tolist() == [pytest.approx([silu[0] * 1.0, silu[1] * 0.5], rel=8 * EPS_F32)]


def router(num_experts: int, bias: list[float] | None, table: list[list[int]] | None, device: torch.device) -> Router:
    return Router(
        gate=PlainLinear(torch.eye(num_experts, device=device)),
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        bias_E=None if bias is None else torch.tensor(bias, device=device),
        tid2eid_VK=None if table is None else torch.tensor(table, device=device),
    )


def score(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(logit)))


def test_router_selects_with_the_bias_and_weighs_without_it(device: torch.device) -> None:
    logits = [0.5, 2.0, -1.0, 1.0]
    ids, weights = router(4, [0.0, -5.0, 4.0, 0.0], None, device)(
        torch.tensor([logits], device=device), torch.tensor([0], device=device)
    )
    assert ids.tolist() == [[2, 3]]
    total = score(-1.0) + score(1.0)
    expected = [1.5 * score(-1.0) / total, 1.5 * score(1.0) / total]
    assert weights.tolist() == [pytest.approx(expected, rel=16 * EPS_F32)]


def test_router_ties_go_to_the_lower_expert(device: torch.device) -> None:
    ids, weights = router(6, [0.0] * 6, None, device)(
        torch.zeros(3, 6, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    )
    assert ids.tolist() == [[0, 1]] * 3
    assert torch.isfinite(weights).all()


def test_hash_layers_look_experts_up_by_token(device: torch.device) -> None:
    table = [[3, 0], [1, 2], [2, 0]]
    tokens = torch.tensor([2, 0, 1], device=device)
    ids, weights = router(4, None, table, device)(torch.randn(3, 4).to(device), tokens)
    assert ids.tolist() == [[2, 0], [3, 0], [1, 2]]
    torch.testing.assert_close(weights.sum(-1), torch.full((3,), 1.5, device=device))


def test_indexer_keeps_the_best_visible_entries_and_the_lowest_on_ties(device: torch.device) -> None:
    selector = EntrySelector(topk=2)
    keys = torch.tensor([[1.0], [3.0], [3.0], [2.0], [9.0]], device=device)
    visible = torch.tensor([[True, True, True, True, False], [True, False, False, False, False]], device=device)
    query, weight = torch.ones(2, 1, 1, device=device), torch.ones(2, 1, device=device)
    assert selector.select(query, weight, keys, visible).tolist() == [
        [False, True, True, False, False],
        [True] + [False] * 4,
    ]
    all_zero = selector.select(-query, weight, keys, visible)  # relu: every score is 0
    assert all_zero.tolist() == [[True, True, False, False, False], [True] + [False] * 4]


@pytest.mark.parametrize("ratio", [4, 128])
def test_compressor_entries_by_the_definition(ratio: int, generator: torch.Generator, device: torch.device) -> None:
    """Each entry recomputed alone, token by token, in float64: which rows, which halves, which position."""
    head_dim, rotary, num_tokens = 8, 4, 3 * ratio + 1
    width = 2 * head_dim if ratio == 4 else head_dim
    rows = torch.randn(num_tokens, 2 * width, generator=generator, dtype=torch.float64).to(device)
    ape = torch.randn(ratio, width, generator=generator).to(device)
    rope = Rope(torch.tensor([1.0, 0.1], device=device))
    norm = RMSNorm(torch.ones(head_dim, device=device), 1e-6)
    compressor = Compressor(ape, norm, rope, ratio, quantize_kv=lambda kv: kv)
    found = compressor.entries(rows, range(3), torch.float64)
    assert len(found) == 3
    for window in range(3):
        picked = []
        for token in range(max(0, (window - 1) * ratio if ratio == 4 else window * ratio), (window + 1) * ratio):
            half = slice(0, head_dim) if ratio == 4 and token < window * ratio else slice(width - head_dim, width)
            kv, gate = rows[token, :width][half], rows[token, width:][half] + ape[token % ratio, half].double()
            picked.append((kv, gate))
        kvs, gates = (torch.stack(values) for values in zip(*picked, strict=True))
        weights = (gates - gates.max(0).values).exp()
        pooled = (weights / weights.sum(0) * kvs).sum(0)
        normed = pooled / (pooled.square().mean() + 1e-6).sqrt()
        angle = torch.tensor([1.0, 0.1]) * (window * ratio)
        cos, sin = angle.cos().double().to(device), angle.sin().double().to(device)
        even, odd = normed[-rotary::2], normed[-rotary + 1 :: 2]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten()
        torch.testing.assert_close(found[window], torch.cat((normed[:-rotary], turned)), rtol=0, atol=4 * EPS_F32)
