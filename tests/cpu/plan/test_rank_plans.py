"""The published models on several ranks: what a GPU holds and sends, from headers alone.

Bytes are counted here from the headers' names by rules of this file's own, and against arithmetic by hand.
"""

import json
import re
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from support.checkpoints import random_checkpoint
from test_published_shapes import model_headers, nvfp4

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import full_shape

from ownpath.bench.published import FLASH, PRO
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.cli import main
from ownpath.config import ModelConfig, Parallel
from ownpath.inspect.memory import replicated_bytes, weights_bytes
from ownpath.plan.links import link_bytes, totals
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.plan.tiling import tiling_faults
from ownpath.splits import AttentionSplit, ExpertSplit

HOPPER = Caps("cuda", "H200", 90, frozenset({"triton"}))
HEADS, DATA = (AttentionSplit.HEADS, ExpertSplit.WIDTH), (AttentionSplit.DATA, ExpertSplit.IDS)
BY_HEADS = r"layers\.\d+\.attn\.(wq_b|wo_a|wo_b|attn_sink)\b.*|.*shared_experts.*|head\..*|.*\.experts\..*"
FEW_EXPERTS = {"n_routed_experts": 16}
"""As many kinds of tensors as with hundreds, in a tenth of the time; nothing that is sent depends on it."""
BY_DATA = r"head\..*|.*\.experts\..*"


def index_of(fields: dict[str, Any]) -> CheckpointIndex:
    file = Path("model.safetensors")
    headers = model_headers(fields, nvfp4)
    infos = {name: TensorInfo(name, dtype, shape, file) for name, dtype, shape in headers}
    return CheckpointIndex(Path(), MappingProxyType(infos))


def expected_bytes(index: CheckpointIndex, divided: str, size: int) -> tuple[float, float]:
    """Bytes of one rank, and those that every rank has. Scalars of experts are per matrix, input scales not read."""
    whole = part = 0.0
    for name, info in index.tensors.items():
        if name.startswith("mtp.") or name.endswith("input_scale"):
            continue
        num_bytes = TORCH_DTYPES[info.dtype].itemsize
        for n in info.shape:
            num_bytes *= n
        is_scalar = not info.shape and divided == BY_HEADS
        if re.fullmatch(divided, name) and not is_scalar:
            part += num_bytes / size
        else:
            whole += num_bytes
    return whole + part, whole


@pytest.mark.parametrize(
    ("fields", "size", "splits", "token", "row"),
    [
        # 43 layers of two sums of 4096 bf16, by two ranks; 129,280 logits in float32, half of them sent.
        (FLASH, 2, HEADS, (43 * 2 * 8192, 43 * 2 * 8192), (129280 * 2, 129280 * 2)),
        # 43 layers: a token's row and 6 x 12 bytes of routing to the other rank in half of the cases, and its sum back.
        (FLASH, 2, DATA, (43 * (8264 / 2 + 8192 / 2),) * 2, (8192 / 2 + 129280, 8192 / 2 + 129280 * 2)),
        # 61 layers of two sums of 7168 bf16: 2 x 7 / 8 of a row at least, 7 rows where each gives all others its part.
        (PRO, 8, HEADS, (61 * 2 * 14336 * 7 / 4, 61 * 2 * 14336 * 7), (129280 * 4 * 7 / 8,) * 2),
    ],
    ids=["flash-tp2", "flash-ep2", "pro-tp8"],
)
def test_a_rank_of_a_published_model(
    fields: dict[str, Any], size: int, splits: Any, token: tuple[float, float], row: tuple[float, float]
) -> None:
    few = fields | FEW_EXPERTS
    index, config = index_of(few), ModelConfig.from_dict(few)
    plan = make_plan(config, index, HOPPER, Demands("bfloat16"), parallel=Parallel(size - 1, size, *splits))
    held, whole = expected_bytes(index, BY_HEADS if splits is HEADS else BY_DATA, size)
    assert weights_bytes(plan, index) == pytest.approx(held, rel=2e-3)  # global scales of rows are there per row
    assert replicated_bytes(plan, index) == pytest.approx(whole, rel=2e-3)
    found = {is_scored: (least, sent) for is_scored, least, sent in totals(link_bytes(plan))}
    assert found == {False: pytest.approx(token), True: pytest.approx(row)}
    print(f"{held / 1e9:.1f} GB, of which {whole / 1e9:.1f} on every rank; {token[0] / 1e3:.0f} KB a token")


@pytest.mark.parametrize("splits", [HEADS, DATA], ids=["heads", "data"])
def test_two_ranks_tile_v4_flash(splits: Any) -> None:
    few = FLASH | FEW_EXPERTS
    index, config = index_of(few), ModelConfig.from_dict(few)
    demands = Demands("bfloat16")
    plans = [make_plan(config, index, HOPPER, demands, parallel=Parallel(rank, 2, *splits)) for rank in range(2)]
    assert not tiling_faults(plans)
    kernels = [{op.spec.slot: op.choice.kernel.name for op in plan.decided} for plan in plans]
    assert kernels[0] == kernels[1]


def test_plan_shows_what_a_rank_holds_and_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_checkpoint(tmp_path, "modelopt-experts-only", moe_intermediate_size=256, o_lora_rank=128, hidden_size=128)
    assert main(["plan", str(tmp_path), "--ranks", "2", "--device", "sm_90", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parallel"] == {"rank": 0, "size": 2, "attention": "heads", "experts": "width", "is_even": False}
    exchanges = [one for one in told["companions"] if one["kind"] in ("all_reduce", "all_gather")]
    assert [one["slot"] for one in exchanges][:2] == ["layers.0.attn.reduce", "layers.0.ffn.reduce"]
    assert {one["kernel"] for one in exchanges} == {"triton.reduce", "triton.gather"}
    assert told["sent_by_a_rank"]["token"] == {"least_bytes": 5 * 2 * 256, "planned_bytes": 5 * 2 * 256}
    assert told["rank_memory"]["weights"] > told["rank_memory"]["replicated"] > 0
    shapes = {one["slot"]: one["local_shape"] for one in told["ops"]}
    assert shapes["layers.0.attn.wo_b"] == [128, 128]
    by_data = "--ranks", "2", "--attention", "data", "--experts", "ids"
    assert main(["plan", str(tmp_path), *by_data]) == 0
    page = capsys.readouterr().out
    assert "2, attention by data, experts by ids" in page
    assert "all_to_all" in page
    # A server pads its steps by data, so that kernels of fixed sizes exchange their rows: the plan is the server's.
    assert main(["plan", str(tmp_path), *by_data, "--device", "sm_90", "--json"]) == 0
    companions = json.loads(capsys.readouterr().out)["companions"]
    kernels = {one["kind"]: one["kernel"] for one in companions}
    kinds = {"all_gather": "triton.gather", "reduce_scatter": "triton.scatter", "all_to_all": "triton.turn"}
    assert {kind: kernels[kind] for kind in kinds} == kinds


def test_a_shape_without_files_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool writes what a plan by ``--random-weights`` needs: the way to plan V4-Flash and V4-Pro without them."""
    monkeypatch.setattr(sys, "argv", ["full_shape.py", "--shape", "small", "--layers", "4", "--write", str(tmp_path)])
    assert full_shape.main() == 0
    assert main(["plan", str(tmp_path), "--random-weights", "--ranks", "2", "--device", "sm_90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank_memory"]["weights"] > 0


def test_plan_refuses_ranks_that_do_not_fit_by_module_and_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint(tmp_path, "bf16")
    assert main(["plan", str(tmp_path), "--ranks", "4"]) == 2
    assert "layers.0.attn.wo_a: 64 rows do not divide into 4 ranks of whole 32s" in capsys.readouterr().err
