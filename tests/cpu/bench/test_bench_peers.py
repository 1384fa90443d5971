"""Adapters of systems that are not here, called with their operations' meaning written anew in torch: that lists,
lengths, pages and scales say what each system would read."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ownpath.bench.check import moe_reference, rel_l2
from ownpath.bench.contender import SWIGLU_LIMIT
from ownpath.bench.kernel import NotApplicable
from ownpath.bench.operands import random_activations, random_moe
from ownpath.bench.peers.deepgemm import DeepGemm
from ownpath.bench.peers.deepgemm_experts import DeepGemmMegaMoe
from ownpath.bench.peers.flashinfer import interleave
from ownpath.bench.peers.flashmla import FlashMla
from ownpath.bench.routing import uniform_routing
from ownpath.bench.scores import ScoresInputs, draw_keys, draw_rows
from ownpath.bench.shapes import moe_shape
from ownpath.conformance.attend import AttendInputs, make_attend_inputs
from ownpath.conformance.entries import read_key_pages
from ownpath.formats import KeyFormat
from ownpath.kernels.attend.cases import AttendCase
from ownpath.kernels.scores.types import IndexQuery
from ownpath.numerics import decode_fp8_block

CPU = torch.device("cpu")
PLANS = torch.zeros(1, dtype=torch.int32)


def attention(q, window, ring, length, sink, plan, splits, extra, extra_list, extra_length, value_dim, scale):
    """Attends to the listed keys of FP8 pages; the plan is made where none is given."""
    assert (plan is None) is (splits is None)
    assert value_dim == 512
    out = torch.empty_like(q)
    for t in range(len(q)):
        keys = read_key_pages(window.flatten(1), window.shape[1])[ring[t, 0, : length[t]]]
        if extra is not None:
            more = read_key_pages(extra.flatten(1), extra.shape[1])[extra_list[t, 0, : extra_length[t]]]
            keys = torch.cat((keys, more))
        scores = torch.cat((q[t, 0].float() @ keys.float().T * scale, sink[:, None]), dim=1)
        out[t, 0] = (scores.softmax(dim=1)[:, :-1] @ keys.float()).to(q.dtype)
    return out, torch.zeros(1), PLANS, PLANS.clone()


@pytest.fixture
def flashmla(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashMla]:
    library = torch.library.Library("_flashmla_C", "FRAGMENT")
    library.define(
        "sparse_decode_fwd(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? attn_sink, Tensor? plan, "
        "Tensor? splits, Tensor? extra_kv, Tensor? extra_indices, Tensor? extra_length, int d_v, float sm_scale) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.impl("sparse_decode_fwd", attention, "CPU")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    yield FlashMla(Path("_flashmla_C.abi3.so"))
    library._destroy()


def attend_inputs(ratio: int, *, fp8: bool = True, num_heads: int = 64) -> AttendInputs:
    context = {0: 300, 4: 700, 128: 9000}[ratio]
    return make_attend_inputs(AttendCase("case", num_heads, ratio, context, 512 if ratio == 4 else 0, fp8=fp8), 3, CPU)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_flashmla_reads_the_keys_that_a_row_sees(flashmla: FlashMla, ratio: int) -> None:
    sets = [attend_inputs(ratio)] * 2
    bound = flashmla.bind(sets)
    assert len(bound.calls) == 2
    for call in bound.calls:
        call()
    bound.judge()


def test_flashmlas_mistakes_are_found(flashmla: FlashMla) -> None:
    inputs = attend_inputs(4)
    bound = flashmla.bind([inputs])
    inputs.weights.sink_N.add_(2.0)  # another operand than the result was computed from
    with pytest.raises(AssertionError, match="relative L2"):
        bound.judge()


def test_flashmla_takes_neither_bf16_nor_few_heads(flashmla: FlashMla) -> None:
    with pytest.raises(NotApplicable, match="FP8 keys only"):
        flashmla.bind([attend_inputs(0, fp8=False)])
    with pytest.raises(NotApplicable, match="64 or 128 heads"):
        flashmla.bind([attend_inputs(0, num_heads=4)])


def deep_gemm() -> ModuleType:
    module = ModuleType("deep_gemm")

    def scores(q, pages, weights, lengths, blocks, plan, width, *, clean_logits):
        assert (q.dtype, weights.dtype, plan, clean_logits) == (torch.float8_e4m3fn, torch.float32, "plan", False)
        num_keys, flat = pages.shape[1], pages.flatten(1)
        codes = flat[:, : num_keys * 128].contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (num_keys, 128))
        scales = flat[:, num_keys * 128 :].contiguous().view(torch.float32)
        keys = (codes * scales[..., None])[blocks.long()].flatten(1, 2)
        products = torch.relu(q[:, 0].float() @ keys.transpose(1, 2))
        assert lengths.tolist() == [width] * len(q)
        return (products * weights[..., None]).sum(1)

    vars(module).update(
        get_num_sms=lambda: 132, get_paged_mqa_logits_metadata=lambda *_: "plan", fp8_paged_mqa_logits=scores
    )
    return module


def scores_inputs(keys: KeyFormat) -> ScoresInputs:
    g = torch.Generator().manual_seed(0)
    angles_TF = torch.randn(3, 32, generator=g)
    heads = torch.randn(3, 8, 128, generator=g).bfloat16(), torch.randn(3, 8, generator=g)
    query = IndexQuery(*heads, angles_TF.cos(), angles_TF.sin())
    return ScoresInputs(query, draw_keys(9, keys, g), draw_rows(3, 512, 9, g))


def test_deepgemm_is_called_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm())
    inputs = scores_inputs(KeyFormat.FP8)
    bound = DeepGemm().bind([inputs])
    bound.judge()
    inputs.query.weights_TI.mul_(1.2)
    with pytest.raises(AssertionError, match="relative L2"):
        bound.judge()
    for keys in (KeyFormat.BF16, KeyFormat.FP4):
        with pytest.raises(NotApplicable, match="FP8 keys only"):
            DeepGemm().bind([scores_inputs(keys)])


def mega_moe() -> ModuleType:
    """DeepGEMM's MegaMoE of one rank, in torch: its signatures, gate rows first, FP8 tokens."""
    module = ModuleType("deep_gemm")

    def transform(gate_up, down):
        assert gate_up[0].dtype == down[0].dtype == torch.float8_e4m3fn
        assert gate_up[1].dtype == down[1].dtype == torch.float32
        return gate_up, down

    def room(group, num_experts, max_tokens, top_k, hidden, inter):
        assert (group, num_experts, max_tokens, top_k, hidden, inter) == (None, 8, 5, 2, 256, 128)
        empty = torch.empty
        return SimpleNamespace(
            x=empty(8, hidden), x_sf=empty(8, hidden // 128), topk_idx=empty(8, top_k), topk_weights=empty(8, top_k)
        )

    def dispatch(x, ids, weights, room_x, room_scale, room_ids, room_weights, num_tokens):
        blocks = x.float().unflatten(1, (-1, 128))
        scale = blocks.abs().amax(-1) / 448
        room_x[:num_tokens] = ((blocks / scale[..., None]).to(torch.float8_e4m3fn).float()).flatten(1)
        room_scale[:num_tokens], room_ids[:num_tokens], room_weights[:num_tokens] = scale, ids, weights

    def fp8_mega_moe(y, gate_up, down, room, *, activation_clamp):
        x = (room.x.unflatten(1, (-1, 128)) * room.x_sf[..., None]).flatten(1)[: len(y)]
        y.zero_()
        for row in range(len(y)):
            for expert, weight in zip(room.topk_idx[row].long(), room.topk_weights[row], strict=True):
                first, second = (decode_fp8_block(codes[expert], scale[expert]) for codes, scale in (gate_up, down))
                gate, up = (first @ x[row]).chunk(2)
                hidden = torch.nn.functional.silu(gate.clamp(max=activation_clamp))
                y[row] += weight * (second @ (hidden * up.clamp(-activation_clamp, activation_clamp)))

    vars(module).update(
        transform_weights_for_mega_moe_sm90=transform,
        get_symm_buffer_for_mega_moe=room,
        mega_moe_pre_dispatch_sm90=dispatch,
        fp8_mega_moe=fp8_mega_moe,
    )
    return module


def test_deepgemms_experts_are_called_as_their_signatures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", mega_moe())
    shape, group = moe_shape("tiny"), cast("Any", None)
    operands = random_moe(shape, torch.Generator().manual_seed(0))
    layer = DeepGemmMegaMoe(operands, range(8), group, 5, shape.top_k)
    x = random_activations(5, shape.hidden, torch.Generator().manual_seed(1))
    routing = uniform_routing(shape, 5, 0, "cpu")
    y = layer(x, routing.topk_ids, routing.topk_weights)
    reference = moe_reference(x, routing, operands, SWIGLU_LIMIT)
    assert 1e-2 < rel_l2(y, reference) <= DeepGemmMegaMoe.max_rel_l2, "FP8 weights and tokens"
    assert rel_l2(y * 1.2, reference) > DeepGemmMegaMoe.max_rel_l2


def _interleaved_lane_by_lane(weight: torch.Tensor) -> torch.Tensor:
    """FlashInfer 0.7.4's order for FP8 products, written as its sixteen lanes write it. weight: uint8 [N, K/2]."""
    num_rows, num_bytes = weight.shape
    words = weight.view(torch.int16).to(torch.int64) & 0xFFFF
    out = torch.zeros(num_rows, num_bytes // 2, dtype=torch.int64)
    for block in range(num_rows // 2):
        row = block // 8 * 16 + block % 8
        for part in range(num_bytes // 32):
            for lane in range(16):
                pair = int(words[row, 16 * part + lane]) | int(words[row + 8, 16 * part + lane]) << 16
                signs = [pair >> bit & 1 for bit in range(3, 32, 4)]
                pair &= 0x77777777
                for place, sign in zip((7, 15, 23, 31, 3, 11, 19, 27), signs, strict=True):
                    pair |= sign << place
                place = 16 * part + lane // 8 * 8 + lane % 4 * 2
                out[row + lane % 8 // 4 * 8, place] = pair & 0xFFFF
                out[row + lane % 8 // 4 * 8, place + 1] = pair >> 16
    return out.to(torch.int32).to(torch.int16).view(torch.uint8)


def test_flashinfers_order_of_codes() -> None:
    weight = torch.randint(0, 256, (2, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([_interleaved_lane_by_lane(one) for one in weight])
    assert torch.equal(interleave(weight), expected)
