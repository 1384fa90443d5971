"""A wrong operand is refused by name before anything is launched."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ownpath.conformance.operations import CASES, make_inputs
from ownpath.kernels.grouped.launch import GROUPED_LINEAR as rope_grouped_linear
from ownpath.kernels.hyper.launch import HYPER_BOUNDARY as hyper_boundary
from ownpath.kernels.hyper.launch import new_out, num_workspace_floats
from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix
from ownpath.kernels.norms.launch import RMS_NORM as rms_norm
from ownpath.kernels.router.launch import ROUTER as router
from ownpath.kernels.router.ref import router as reference
from ownpath.kernels.swiglu.launch import SWIGLU as swiglu

CPU = torch.device("cpu")


def inputs_of(op: str, label: str = "tiny", num_tokens: int = 3) -> tuple[Any, ...]:
    case = next(case for case in CASES if (case.op, case.label) == (op, label))
    return make_inputs(case, num_tokens, CPU)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element off a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    start = next(i for i in range(8) if (room.data_ptr() + i * room.element_size()) % 16 == room.element_size())
    view = room[start : start + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap between rows."""
    return torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)[..., : tensor.shape[-1]]


WRONG_STREAMS = {
    "float32": lambda x: x.float(),
    "three streams": lambda x: x[:, :3].contiguous(),
    "flat": lambda x: x.flatten(1),
    "strided": strided,
    "unaligned": shifted,
    "odd width": lambda x: x[..., :252].contiguous(),
    "other device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("wrong", WRONG_STREAMS.values(), ids=WRONG_STREAMS.keys())
def test_streams(wrong: Any) -> None:
    x_TSD, y_TD, mix, weights = inputs_of("hyper_boundary")
    with pytest.raises(ValueError, match=r"x_TSD|y_TD"):
        hyper_boundary(wrong(x_TSD), y_TD, mix, weights)


@pytest.mark.parametrize("name", ["fn", "base", "scale", "norm_weight"])
@pytest.mark.parametrize("wrong", [lambda t: t.half(), lambda t: t[..., :-1].contiguous(), shifted], ids=str)
def test_hyper_weights(name: str, wrong: Any) -> None:
    x_TSD, y_TD, mix, weights = inputs_of("hyper_boundary")
    broken: HyperWeights = replace(weights, **{name: wrong(getattr(weights, name))})
    with pytest.raises(ValueError, match=name):
        hyper_boundary(x_TSD, y_TD, mix, broken)


def test_hyper_outputs_and_workspace() -> None:
    x_TSD, y_TD, mix, weights = inputs_of("hyper_boundary")
    out = new_out(x_TSD, with_mix=True)
    with pytest.raises(ValueError, match=r"out\.h_TD"):
        hyper_boundary(x_TSD, y_TD, mix, weights, out=out._replace(h_TD=out.h_TD.float()))
    with pytest.raises(ValueError, match=r"out\.mix"):
        hyper_boundary(x_TSD, y_TD, mix, weights, out=out._replace(mix=None))
    with pytest.raises(ValueError, match=r"out\.mix\.post_TS"):
        hyper_boundary(x_TSD, y_TD, mix, weights, out=HyperOut(out.x_TSD, out.h_TD, Mix(x_TSD, mix.comb_TSS)))
    both = torch.cat((x_TSD, x_TSD))
    for num_later in (0, 1):  # where the streams are, and a token behind
        place = out._replace(x_TSD=both[num_later : num_later + len(x_TSD)])
        for _ in range(2):  # as a first call, and as one that finds its launches prepared
            with pytest.raises(ValueError, match=r"out\.x_TSD must not overlap x_TSD"):
                hyper_boundary(both[: len(x_TSD)], y_TD, mix, weights, out=place)
            hyper_boundary(x_TSD, y_TD, mix, weights, out=out)
    with pytest.raises(ValueError, match="workspace"):
        hyper_boundary(x_TSD, y_TD, mix, weights, out=out, workspace=torch.empty(8))
    wrong = torch.empty(num_workspace_floats(3, 256), dtype=torch.float64)
    with pytest.raises(ValueError, match="workspace"):
        hyper_boundary(x_TSD, y_TD, mix, weights, out=out, workspace=wrong)
    with pytest.raises(ValueError, match="together"):
        hyper_boundary(x_TSD, y_TD, None, weights)


def test_router() -> None:
    logits_TE, k, factor, bias_E, _, _ = inputs_of("router")
    for broken in (logits_TE.double(), logits_TE[:, :-1], logits_TE[0], strided(logits_TE), shifted(logits_TE)):
        with pytest.raises(ValueError, match=r"logits_TE|bias_E"):
            router(broken, k, factor, bias_E)
    with pytest.raises(ValueError, match="bias_E"):
        router(logits_TE, k, factor, bias_E.bfloat16())
    with pytest.raises(ValueError, match="exactly one"):
        router(logits_TE, k, factor)
    with pytest.raises(ValueError, match="choose 9 of 8"):
        router(logits_TE, 9, factor, bias_E)
    table = torch.zeros(10, k, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_ids_T"):
        router(logits_TE, k, factor, tid2eid_VK=table)
    with pytest.raises(ValueError, match="token_ids_T"):
        router(logits_TE, k, factor, token_ids_T=torch.zeros(2, dtype=torch.int64), tid2eid_VK=table)
    with pytest.raises(ValueError, match=r"out\[0\]"):
        router(logits_TE, k, factor, bias_E, out=(torch.zeros(3, k), torch.zeros(3, k)))


def test_exact_ties_go_to_the_lower_id() -> None:
    ids_TK, weights_TK = router(torch.zeros(2, 8), 3, 1.5, torch.tensor([0, 1, 0, 1, 1, 1, 0, 0.0]))
    assert ids_TK.tolist() == [[1, 3, 4]] * 2
    assert ((weights_TK - 0.5).abs() <= 4 * 2.0**-24).all()  # a sum, a quotient, a product


def test_ids_can_be_int32() -> None:
    logits_TE, k, factor, bias_E, _, _ = inputs_of("router")
    out = (torch.full((3, k), -1, dtype=torch.int32), torch.full((3, k), torch.nan))
    router(logits_TE, k, factor, bias_E, out=out)
    ids_TK, weights_TK = router(logits_TE, k, factor, bias_E)
    assert torch.equal(out[0].long(), ids_TK)
    assert torch.equal(out[1], weights_TK)


def test_unknown_token_ids_stay_inside_the_table() -> None:
    table = torch.randint(0, 8, (10, 2))
    ids_TK, _ = router(torch.zeros(2, 8), 2, 1.0, None, torch.tensor([10, 1 << 40]), table)
    assert ids_TK.tolist() == [[0, 0]] * 2


@pytest.mark.parametrize("by_token", [False, True])
def test_padded_rows_go_to_no_expert(by_token: bool) -> None:
    table = torch.randint(0, 8, (10, 2)) if by_token else None
    bias_E = None if by_token else torch.zeros(8)
    logits_TE = torch.randn(3, 8)
    token_ids_T = torch.tensor([4, -1, 7])
    ids_TK, weights_TK = router(logits_TE, 2, 1.0, bias_E, token_ids_T, table)
    expected, weights = reference(logits_TE, 2, 1.0, bias_E, token_ids_T, table)
    assert torch.equal(ids_TK, expected)
    assert ids_TK[1].tolist() == [-1, -1]
    assert weights_TK[1].tolist() == weights[1].tolist() == [0.0, 0.0]


def test_rms_norm() -> None:
    x, weight, eps = inputs_of("rms_norm", "odd")
    for broken in (x.half(), x[:, :260], shifted(x), x[:, ::2]):
        with pytest.raises(ValueError, match="x must"):
            rms_norm(broken, None, eps)
    with pytest.raises(ValueError, match="x must have rows at one or two"):
        rms_norm(torch.zeros(4, 6, 4, 4, 8).bfloat16()[:, :3, :2, :3], None, eps)
    with pytest.raises(ValueError, match="weight_D"):
        rms_norm(x, weight[:-8].contiguous(), eps)
    with pytest.raises(ValueError, match="out"):
        rms_norm(x, weight, eps, out=x.float())


def test_swiglu() -> None:
    gate_up, limit = inputs_of("swiglu")
    for broken in (gate_up.half(), gate_up[:, :-4], strided(gate_up), shifted(gate_up)):
        with pytest.raises(ValueError, match="gate_up_TF2"):
            swiglu(broken, limit)
    with pytest.raises(ValueError, match="out"):
        swiglu(gate_up, limit, out=gate_up)


def test_grouped() -> None:
    o_TNH, cos_TA, sin_TA, weight_GRI = inputs_of("grouped_linear")
    for broken in (o_TNH.float(), o_TNH[:, :3].contiguous(), o_TNH[0], strided(o_TNH), shifted(o_TNH)):
        with pytest.raises(ValueError, match="o_TNH"):
            rope_grouped_linear(broken, cos_TA, sin_TA, weight_GRI)
    with pytest.raises(ValueError, match="cos_TA"):
        rope_grouped_linear(o_TNH, cos_TA[:2].contiguous(), sin_TA, weight_GRI)
    with pytest.raises(ValueError, match="sin_TA"):
        rope_grouped_linear(o_TNH, cos_TA, sin_TA.bfloat16(), weight_GRI)
    with pytest.raises(ValueError, match="weight_GRI"):
        rope_grouped_linear(o_TNH, cos_TA, sin_TA, weight_GRI.float())
    with pytest.raises(ValueError, match="weight_GRI"):
        rope_grouped_linear(o_TNH, cos_TA, sin_TA, weight_GRI[:, :100].contiguous())
