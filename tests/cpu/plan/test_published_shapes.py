"""The published V4-Flash and V4-Pro, DeepSeek's own and NVIDIA's NVFP4 export: their headers make a plan.

Names, dtypes and shapes are those of the published files' tables, not derived from the code under test. No weight
exists in this test: a plan needs headers alone.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from ownpath.bench.published import FLASH, PRO
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import ModelConfig
from ownpath.ops import OpKind
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.plan.show import plan_rows

Header = tuple[str, str, tuple[int, ...]]
Expert = Callable[[str, int, int], Iterator[Header]]


def fp8(name: str, n: int, k: int) -> Iterator[Header]:
    yield f"{name}.weight", "F8_E4M3", (n, k)
    yield f"{name}.scale", "F8_E8M0", (-(-n // 128), k // 128)


def nvfp4(name: str, n: int, k: int) -> Iterator[Header]:
    yield f"{name}.weight", "U8", (n, k // 2)
    yield f"{name}.weight_scale", "F8_E4M3", (n, k // 16)
    yield f"{name}.weight_scale_2", "F32", ()
    yield f"{name}.input_scale", "F32", ()


def mxfp4(name: str, n: int, k: int) -> Iterator[Header]:
    yield f"{name}.weight", "I8", (n, k // 2)
    yield f"{name}.scale", "F8_E8M0", (n, k // 32)


def hyper(name: str, rows: int, scales: int, dim: int) -> Iterator[Header]:
    yield f"{name}_fn", "F32", (rows, 4 * dim)
    yield f"{name}_base", "F32", (rows,)
    yield f"{name}_scale", "F32", (scales,)


def compressor(name: str, ratio: int, head_dim: int, dim: int) -> Iterator[Header]:
    width = 2 * head_dim if ratio == 4 else head_dim
    yield f"{name}.wkv.weight", "BF16", (width, dim)
    yield f"{name}.wgate.weight", "BF16", (width, dim)
    yield f"{name}.ape", "F32", (ratio, width)
    yield f"{name}.norm.weight", "BF16", (head_dim,)


def layer_headers(c: dict[str, Any], layer_idx: int, expert: Expert) -> Iterator[Header]:
    name, dim, rank = f"layers.{layer_idx}", c["hidden_size"], c["q_lora_rank"]
    heads_dim, out_rank = 512 * c["num_attention_heads"], 1024 * c["o_groups"]
    ratio = c["compress_ratios"][layer_idx]
    for norm, size in (("attn_norm", dim), ("ffn_norm", dim), ("attn.q_norm", rank), ("attn.kv_norm", 512)):
        yield f"{name}.{norm}.weight", "BF16", (size,)
    for part in ("attn", "ffn"):
        yield from hyper(f"{name}.hc_{part}", 24, 3, dim)
    yield f"{name}.attn.attn_sink", "F32", (c["num_attention_heads"],)
    yield from fp8(f"{name}.attn.wq_a", rank, dim)
    yield from fp8(f"{name}.attn.wq_b", heads_dim, rank)
    yield from fp8(f"{name}.attn.wkv", 512, dim)
    yield from fp8(f"{name}.attn.wo_a", out_rank, heads_dim // c["o_groups"])
    yield from fp8(f"{name}.attn.wo_b", dim, out_rank)
    if ratio:
        yield from compressor(f"{name}.attn.compressor", ratio, 512, dim)
    if ratio == 4:
        yield from fp8(f"{name}.attn.indexer.wq_b", 8192, rank)
        yield f"{name}.attn.indexer.weights_proj.weight", "BF16", (64, dim)
        yield from compressor(f"{name}.attn.indexer.compressor", 4, 128, dim)
    inter, num_experts = c["moe_intermediate_size"], c["n_routed_experts"]
    yield f"{name}.ffn.gate.weight", "BF16", (num_experts, dim)
    if layer_idx < 3:
        yield f"{name}.ffn.gate.tid2eid", "I64", (129280, 6)
    else:
        yield f"{name}.ffn.gate.bias", "F32", (num_experts,)
    for projection, n, k in (("w1", inter, dim), ("w2", dim, inter), ("w3", inter, dim)):
        yield from fp8(f"{name}.ffn.shared_experts.{projection}", n, k)
        for expert_idx in range(num_experts):
            yield from expert(f"{name}.ffn.experts.{expert_idx}.{projection}", n, k)


def model_headers(c: dict[str, Any], expert: Expert) -> Iterator[Header]:
    dim = c["hidden_size"]
    yield "embed.weight", "BF16", (129280, dim)
    yield "head.weight", "BF16", (129280, dim)
    yield "norm.weight", "BF16", (dim,)
    yield from hyper("hc_head", 4, 1, dim)
    for layer_idx in range(c["num_hidden_layers"]):
        yield from layer_headers(c, layer_idx, expert)
    # The draft keeps DeepSeek's MXFP4 experts; the backbone does not read it.
    yield from mxfp4("mtp.0.ffn.experts.0.w1", c["moe_intermediate_size"], dim)


def draft_headers(c: dict[str, Any], expert: Expert) -> Iterator[Header]:
    """MTP: a layer under the last entry of compress_ratios, and what is around it."""
    layer_idx, dim = c["num_hidden_layers"], c["hidden_size"]
    for name, dtype, shape in layer_headers(c, layer_idx, expert):
        yield name.replace(f"layers.{layer_idx}.", "mtp.0."), dtype, shape
    for projection in ("e_proj", "h_proj"):
        yield from fp8(f"mtp.0.{projection}", dim, dim)
    for norm in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{norm}.weight", "BF16", (dim,)
    yield from hyper("mtp.0.hc_head", 4, 1, dim)


@pytest.mark.parametrize(
    ("expert", "fields", "sliding", "csa", "hca"),
    [
        pytest.param(nvfp4, FLASH, 2, 21, 20, id="V4-Flash of NVIDIA"),
        pytest.param(mxfp4, PRO, 0, 30, 31, id="V4-Pro of DeepSeek"),
        pytest.param(mxfp4, FLASH, 2, 21, 20, id="V4-Flash of DeepSeek", marks=pytest.mark.slow),
        pytest.param(nvfp4, PRO, 0, 30, 31, id="V4-Pro of NVIDIA", marks=pytest.mark.slow),
    ],
)
def test_the_published_export_makes_a_plan(
    expert: Expert, fields: dict[str, Any], sliding: int, csa: int, hca: int
) -> None:
    config = ModelConfig.from_dict(fields)
    assert [config.compress_ratios.count(ratio) for ratio in (0, 4, 128)] == [sliding, csa, hca]
    file = Path("model-00001-of-00001.safetensors")
    infos = {name: TensorInfo(name, dtype, shape, file) for name, dtype, shape in model_headers(fields, expert)}
    start = time.perf_counter()
    plan = make_plan(config, CheckpointIndex(Path(), MappingProxyType(infos)), Caps("cuda", "H200", 90))
    seconds = time.perf_counter() - start
    print(f"{len(infos)} tensors planned in {seconds:.2f} s")
    runners = {op.spec.slot: op.choice.kernel.runner for op in plan.ops}
    assert runners["layers.5.ffn.experts"] == "Nvfp4MoE"
    assert runners["layers.5.attn.wqa_wkv"] == "Fp8Linear"
    assert runners["layers.5.attn.wo_a"] == "GroupedLinear"
    num_modules = sum(len(op.spec.modules) for op in plan.ops if op.spec.kind is OpKind.MOE)
    assert num_modules == 3 * fields["num_hidden_layers"] * fields["n_routed_experts"]
    assert set(plan.ignored) == {name for name in infos if name.startswith("mtp.")}
    assert len(plan_rows(plan)) < 20, "equal layers share a row"
    assert seconds < 30


def test_the_base_model_makes_a_plan() -> None:
    """V4-Flash-Base: experts in FP8 blocks too, every FP8 scale float32, and a config that says so."""
    fields = FLASH | {"expert_dtype": "fp8"}
    file = Path("model-00001-of-00001.safetensors")
    infos = {
        name: TensorInfo(name, "F32" if dtype == "F8_E8M0" else dtype, shape, file)
        for name, dtype, shape in model_headers(fields, fp8)
    }
    plan = make_plan(
        ModelConfig.from_dict(fields), CheckpointIndex(Path(), MappingProxyType(infos)), Caps("cpu", "CPU")
    )
    experts = [op for op in plan.ops if op.spec.kind is OpKind.MOE]
    assert {(op.encoding.name, op.choice.kernel.runner) for op in experts} == {("native-fp8-block", "Fp8MoE")}
    assert plan.contradictions == ()


@pytest.mark.parametrize(
    ("fields", "expert"), [(FLASH, mxfp4), (FLASH, nvfp4), (PRO, mxfp4)], ids=["V4-Flash", "third-party", "V4-Pro"]
)
def test_the_published_draft_runs_on_the_backbones_kernels(fields: dict[str, Any], expert: Expert) -> None:
    """NVFP4 experts in the backbone, and in the draft DeepSeek's MXFP4 ones or requantised ones, on Hopper.

    Of the backbone its last four layers: the draft is like the last of them.
    """
    fields = fields | {"num_hidden_layers": 4, "compress_ratios": fields["compress_ratios"][-5:]}
    config = ModelConfig.from_dict(fields)
    assert (config.num_nextn_predict_layers, fields["compress_ratios"][config.num_hidden_layers]) == (1, 0)
    headers = {name: header for name, *header in model_headers(fields, nvfp4) if not name.startswith("mtp.")}
    headers |= {name: header for name, *header in draft_headers(fields, expert)}
    infos = {name: TensorInfo(name, dtype, shape, Path("shard")) for name, (dtype, shape) in headers.items()}
    hopper = Caps("cuda", "H200", 90, frozenset({"triton"}))
    index = CheckpointIndex(Path(), MappingProxyType(infos))
    plan = make_plan(config, index, hopper, Demands("bfloat16"), loads_draft=True)
    assert not plan.ignored
    kernels = {op.spec.slot: op.choice.kernel.name for op in plan.decided}
    kernels |= {part.slot: op.choice.kernel.name for op in plan.ops for part in op.spec.parts}
    last = f"layers.{config.num_hidden_layers - 1}"
    own = {"e_proj": "attn.wq_b", "h_proj": "attn.wq_b", "enorm": "attn.q_norm", "hnorm": "attn.q_norm"}
    for slot in [slot.removeprefix("mtp.0.") for slot in kernels if slot.startswith("mtp.0.")]:
        alike = "hc_head" if slot == "hc_head" else f"{last}.{own.get(slot, slot)}"
        assert kernels[f"mtp.0.{slot}"] == kernels[alike], slot
    assert kernels["mtp.0.ffn.experts"] == "cute.nvfp4_moe"
