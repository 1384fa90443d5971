"""The standalone checks of the team this project comes from, by their names: each part alone, before any engine."""

import math
from pathlib import Path

import pytest
import torch
from support.checkpoints import LAYOUTS, SMALL, random_checkpoint

from ownpath.attention.rope import Rope
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import ModelConfig
from ownpath.loading import plan_model
from ownpath.numerics import dequantize, quantize_nvfp4
from ownpath.qtensor import QuantTensor
from ownpath.runners import GroupedLinear, Nvfp4Linear, Nvfp4MoE
from ownpath.weights.load import load_weights

REFERENCE_LINEAR, REFERENCE_MOE = "ref.nvfp4_linear", "ref.nvfp4_moe"
"""The twins that every other kernel is held against; the kernels' own tests are in tests/gpu."""
EPS_F32 = torch.finfo(torch.float32).eps
EPS_BF16 = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def parts(weight: QuantTensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert weight.scale is not None
    assert weight.global_scale is not None
    return weight.qdata.to(device), weight.scale.to(device), weight.global_scale.to(device)


def assert_close_to_float64(y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, num_terms: int) -> None:
    """|y - exact| within a float32 sum's error bound (terms * eps * sum |x||w|) plus one rounding to y's dtype."""
    rounding = torch.finfo(y.dtype).eps / 2 * exact.abs() if y.dtype != torch.float32 else 0.0
    bound = num_terms * EPS_F32 * magnitude + rounding
    assert torch.isfinite(y).all()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wo_a_batched_matmul_equals_einsum_exactly(
    dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """Integers in [-8, 8] sum exactly in any order, so that the two formulations must agree bit for bit."""
    tokens, groups, width, rank = 5, 4, 128, 32
    x = torch.randint(-8, 9, (tokens, groups, width), generator=generator).to(device, dtype)
    weight = torch.randint(-8, 9, (groups * rank, width), generator=generator).to(device, torch.bfloat16)
    y = GroupedLinear(weight, groups)(x)
    expected = torch.einsum("tgi,gri->tgr", x.double(), weight.view(groups, rank, width).double()).to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("compressing", [False, True], ids=["sliding", "compressing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_inverse_rope_round_trip(
    compressing: bool, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """Rotating and rotating back returns every channel, up to two roundings of a vector of the pair's length."""
    config = ModelConfig.from_dict(SMALL)
    positions = torch.tensor([0, 1, 4096, 131072, 1_000_000], device=device)
    rotation = Rope.for_layer(config, compressing, device).at(positions)
    x = torch.randn(len(positions), 3, config.head_dim, generator=generator).to(device, dtype)
    turned = rotation.apply(x)
    back = rotation.invert(turned)
    nope = config.head_dim - config.qk_rope_head_dim
    assert torch.equal(turned[..., :nope], x[..., :nope])
    assert not torch.equal(turned[1:, :, nope:], x[1:, :, nope:])
    pair_norm = x[..., nope:].double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
    # cos and sin are float32, so that cos² + sin² misses 1 by up to two of its roundings.
    bound = (2 * torch.finfo(dtype).eps + 4 * EPS_F32) * pair_norm
    error = (back[..., nope:].double() - x[..., nope:].double()).unflatten(-1, (-1, 2)).abs()
    assert (error <= bound).all()


def test_rope_angles_against_float64(device: torch.device) -> None:
    """Frequencies from the formula in Python floats; YaRN keeps fast pairs and divides slow ones by the factor."""
    config = ModelConfig.from_dict(
        SMALL | {"rope_scaling": {**SMALL["rope_scaling"], "original_max_position_embeddings": 65536}}
    )
    dim = config.qk_rope_head_dim
    plain = Rope.for_layer(config, compressing=False, device=device).freqs_F.tolist()
    expected = [config.rope_theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    assert plain == pytest.approx(expected, rel=4 * EPS_F32)
    yarn = Rope.for_layer(config, compressing=True, device=device).freqs_F.tolist()
    for pair, frequency in enumerate(yarn):
        unscaled = config.compress_rope_theta ** (-2 * pair / dim)
        turns = 65536 * unscaled / (2 * math.pi)
        kept, divided = pytest.approx(unscaled, rel=4 * EPS_F32), pytest.approx(unscaled / 16, rel=4 * EPS_F32)
        if turns > 2 * 32:  # a whole pair clear of the ramp's rounded ends
            assert frequency == kept
        elif turns < 0.25:
            assert frequency == divided
        else:
            assert unscaled / 16 * (1 - 1e-6) <= frequency <= unscaled * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_wo_b_nvfp4_linear(
    num_tokens: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    n, k = 96, 256
    weight = quantize_nvfp4(torch.randn(n, k, generator=generator))
    x = torch.randn(num_tokens, k, generator=generator).to(device, dtype)
    y = Nvfp4Linear(*parts(weight, device), kernel=REFERENCE_LINEAR)(x)
    dense = dequantize(weight, torch.float64).to(device)
    assert y.dtype == dtype
    assert_close_to_float64(y, x.double() @ dense.T, x.double().abs() @ dense.abs().T, k + 2)


def test_fused_shards_keep_their_own_global_scales(generator: torch.Generator, device: torch.device) -> None:
    """wq_a + wkv with global scales 1000 times apart: each shard's rows equal the shard computed alone, bit for bit."""
    shards = [quantize_nvfp4(torch.randn(32, 64, generator=generator) * gain) for gain in (1.0, 1e-3)]
    x = torch.randn(5, 64, generator=generator).to(device)
    fused = Nvfp4Linear(*zip(*(parts(shard, device) for shard in shards), strict=True), kernel=REFERENCE_LINEAR)
    alone = [Nvfp4Linear(*parts(shard, device), kernel=REFERENCE_LINEAR)(x) for shard in shards]
    assert shards[0].global_scale != shards[1].global_scale
    torch.testing.assert_close(fused(x), torch.cat(alone, dim=-1), rtol=64 * EPS_F32, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantisation_of_every_weight(layout: str, tmp_path: Path, device: torch.device) -> None:
    """Each operand as loaded decodes to the values its checkpoint was made from, all of them valid BF16."""
    checkpoint = random_checkpoint(tmp_path, layout, seed=11)
    plan = plan_model(tmp_path, str(device))
    loaded = load_weights(plan, CheckpointIndex.open(tmp_path), device)
    num_checked = 0
    for op, operand in zip(plan.ops, loaded.operands, strict=True):
        for name, decoded in _decoded_modules(op, operand):
            assert torch.equal(decoded.cpu(), checkpoint.decoded[name].float()), name
            assert torch.isfinite(decoded.to(torch.bfloat16)).all(), name
            num_checked += 1
    assert num_checked == sum(len(op.spec.modules) for op in plan.ops)
    for key, value in loaded.params.items():
        assert torch.equal(value.cpu(), checkpoint.decoded[key]), key


def _decoded_modules(op, operand):  # type: ignore[no-untyped-def]
    """(module, decoded weight) of one op, taken apart again by the tests' own bookkeeping."""
    fmt = op.encoding.format
    buffers = operand.buffers
    if str(op.spec.kind) == "moe":
        num_experts = buffers["w2"][0].shape[0]
        inter = op.spec.modules[0].shape[0]
        for idx, module in enumerate(op.spec.modules):
            projection, expert = divmod(idx, num_experts)
            which = "w2" if projection == 2 else "w13"
            rows = slice(None) if projection == 2 else slice(projection * inter, (projection + 1) * inter)
            scalar, per_matrix = None, expert if projection == 2 else (expert, projection)
            if str(fmt) == "NVFP4":
                scalar = buffers[f"{which}_scale_2"][0][per_matrix]
            codes = buffers[which][0][expert, rows]
            scale = None
            if f"{which}_scale" in buffers:
                scale = buffers[f"{which}_scale"][0][per_matrix if str(fmt) == "FP8_BLOCK" else (expert, rows)]
            yield module.name, dequantize(QuantTensor(codes, scale, scalar, fmt))
        return
    start = 0
    for idx, module in enumerate(op.spec.modules):
        rows = slice(start, start + module.shape[0])
        start = rows.stop
        if str(fmt) == "NVFP4":
            scalar = buffers["weight_scale_2"][0][rows][0]
            part = QuantTensor(buffers["weight"][0][rows], buffers["weight_scale"][0][rows], scalar, fmt)
        elif str(fmt) == "FP8_BLOCK":
            part = QuantTensor(buffers["weight"][idx], buffers["scale"][idx], None, fmt)
        else:
            part = QuantTensor(buffers["weight"][0][rows], None, None, fmt)
        yield module.name, dequantize(part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("routing", ["random", "one-expert", "expert-left-out"])
def test_moe(routing: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    """The routed experts against a loop in float64 over the dequantised experts; gate and up scales differ."""
    num_tokens, num_experts, top_k, dim, inter, limit = 9, 4, 2, 64, 48, 1.0
    w1, w3, w2 = (
        [
            quantize_nvfp4(torch.randn(n, k, generator=generator) * gain)
            for gain in torch.linspace(0.1, 0.4, num_experts)
        ]
        for n, k in ((inter, dim), (inter, dim), (dim, inter))
    )
    w3 = [quantize_nvfp4(2 * dequantize(weight)) for weight in w3]
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    if routing == "one-expert":
        ids = torch.stack((torch.full((num_tokens,), 2), torch.full((num_tokens,), 0)), dim=1)
    elif routing == "expert-left-out":
        ids = torch.stack((torch.full((num_tokens,), 1), torch.arange(num_tokens) % 2 * 2), dim=1)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    x = (torch.randn(num_tokens, dim, generator=generator)).to(dtype)
    moe = _fused_moe(w1, w3, w2, limit, device)
    y = moe(x.to(device), ids.to(device), weights.to(device)).cpu()
    exact = torch.zeros(num_tokens, dim, dtype=torch.float64)
    for token in range(num_tokens):
        for slot in range(top_k):
            expert = int(ids[token, slot])
            gate, up, down = (dequantize(w[expert], torch.float64) for w in (w1, w3, w2))
            g, u = (gate @ x[token].double()).clamp(max=limit), (up @ x[token].double()).clamp(-limit, limit)
            exact[token] += weights[token, slot].double() * (down @ (g * torch.sigmoid(g) * u))
    # bf16: hidden values and the result are rounded once each; float32: sums of dim + inter terms.
    tolerance = 4 * EPS_BF16 if dtype == torch.bfloat16 else (dim + inter) * EPS_F32
    assert (y.double() - exact).norm() <= tolerance * exact.norm()


def _fused_moe(
    w1: list[QuantTensor], w3: list[QuantTensor], w2: list[QuantTensor], limit: float, device: torch.device
) -> Nvfp4MoE:
    def stack(pick: str) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up = [torch.cat((getattr(a, pick), getattr(b, pick))) for a, b in zip(w1, w3, strict=True)]
        return torch.stack(gate_up).to(device), torch.stack([getattr(w, pick) for w in w2]).to(device)

    (w13, down), (w13_scale, down_scale) = stack("qdata"), stack("scale")
    pairs = [torch.stack((a.global_scale, b.global_scale)) for a, b in zip(w1, w3, strict=True)]  # type: ignore[arg-type]
    w13_scale_2 = torch.stack(pairs).to(device)
    down_scale_2 = torch.stack([w.global_scale for w in w2]).to(device)  # type: ignore[misc]
    return Nvfp4MoE(w13, w13_scale, w13_scale_2, down, down_scale, down_scale_2, limit, kernel=REFERENCE_MOE)


def test_runners_refuse_wrong_operands_by_name(device: torch.device) -> None:
    weight, scale, scalar = parts(quantize_nvfp4(torch.randn(32, 64)), device)
    with pytest.raises(ValueError, match=r"weight_scale\[0\] must have shape \[32, 4\]"):
        Nvfp4Linear(weight, scale[:, :2], scalar)
    with pytest.raises(ValueError, match=r"weight_scale_2\[0\] must be torch.float32"):
        Nvfp4Linear(weight, scale, scalar.double())
    with pytest.raises(ValueError, match="x has 63 features, the weight takes 64"):
        Nvfp4Linear(weight, scale, scalar, kernel=REFERENCE_LINEAR)(torch.zeros(1, 63, device=device))
    with pytest.raises(ValueError, match="same number of shards"):
        Nvfp4Linear([weight, weight], [scale], [scalar])
