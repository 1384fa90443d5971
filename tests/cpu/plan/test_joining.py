"""Products of one input become one where they are stored alike, and stay apart where that would change a value."""

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cpu.plan.test_published_shapes import fp8, model_headers, nvfp4
from support.pages import plan_text

from ownpath.bench.published import FLASH, PRO
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import ModelConfig, Parallel
from ownpath.loading import default_model_dir, plan_model
from ownpath.official import Step
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.plan.sharding import Region, regions_of

Header = tuple[str, str, tuple[int, ...]]
HOPPER = Caps("cuda", "H200", 90, frozenset({"triton"}))
QUERIES = ("attn.wq_b", "attn.indexer.wq_b")
OF_X = ("attn.compressor.wkv_wgate", "attn.indexer.weights_proj", "attn.indexer.compressor.wkv_wgate")
THREE_LAYERS = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}


def plan_of(
    fields: dict[str, Any], *others: Header, caps: Caps = HOPPER, demands: Demands | None = None, without: str = "-"
) -> Plan:
    """Plans the published headers of a model of three layers. others: instead of, or beside, those of a name.

    without: what is left out, by the beginning of its name.
    """
    headers: list[Header] = [*model_headers(fields, nvfp4), *others]
    kept = (header for header in headers if not header[0].startswith((without, "mtp.")) or header in others)
    infos = {name: TensorInfo(name, dtype, shape, Path("shard")) for name, dtype, shape in kept}
    index = CheckpointIndex(Path(), MappingProxyType(infos))
    return make_plan(ModelConfig.from_dict(fields), index, caps, demands or Demands("bfloat16"))


def slots_of(plan: Plan, layer: str = "layers.1") -> dict[str, tuple[str, ...]]:
    """The slots of a layer's products in front of attention, and what each joins."""
    attn = f"{layer}.attn."
    ops = (op for op in plan.ops if op.spec.slot.startswith(attn) and not op.spec.slot.startswith(f"{attn}wo_"))
    return {
        op.spec.slot.removeprefix(f"{layer}."): tuple(part.slot.removeprefix(f"{layer}.") for part in op.spec.parts)
        for op in ops
    }


@pytest.mark.parametrize("fields", [FLASH, PRO], ids=["V4-Flash", "V4-Pro"])
def test_a_csa_layer_multiplies_its_inputs_three_times(fields: dict[str, Any]) -> None:
    plan = plan_of(fields | THREE_LAYERS)
    assert slots_of(plan) == {"attn.wqa_wkv": (), "attn.queries": QUERIES, "attn.x_products": OF_X}
    assert list(slots_of(plan, "layers.0")) == ["attn.wqa_wkv", "attn.wq_b"]
    assert list(slots_of(plan, "layers.2")) == ["attn.wqa_wkv", "attn.wq_b", "attn.compressor.wkv_wgate"]
    heads = 512 * fields["num_attention_heads"]
    (queries,), (of_x,) = plan.ops_of("layers.1.attn.queries"), plan.ops_of("layers.1.attn.x_products")
    assert queries.spec.shape == (heads + 64 * 128, fields["q_lora_rank"])
    assert of_x.spec.shape == (2 * 1024 + 64 + 2 * 256, fields["hidden_size"])
    assert of_x.spec.is_wide
    assert not queries.spec.is_wide
    assert [span.start for span in queries.spec.columns.values()] == [0, heads]
    assert [span.start for span in of_x.spec.columns.values()] == [0, 2048, 2112]


@pytest.mark.parametrize("fields", [FLASH, PRO, None], ids=["V4-Flash", "V4-Pro", "embedded"])
def test_every_part_begins_where_kernels_may_read_it(fields: dict[str, Any] | None) -> None:
    """At a multiple of 16 bytes, in every row."""
    plan = plan_model(default_model_dir(), "sm_90") if fields is None else plan_of(fields | THREE_LAYERS)
    joined = [op.spec for op in plan.ops if op.spec.parts]
    assert joined
    for spec in joined:
        itemsize = 4 if spec.is_wide else 2
        offsets = [span.start * itemsize for span in spec.columns.values()]
        assert not any(offset % 16 for offset in (*offsets, spec.shape[0] * itemsize)), spec.slot


def test_the_embedded_model_keeps_its_two_formats_of_queries_apart() -> None:
    plan = plan_model(default_model_dir(), "cpu")
    expected = {"attn.wqa_wkv": (), "attn.wq_b": (), "attn.indexer.wq_b": (), "attn.x_products": OF_X}
    assert slots_of(plan) == expected
    assert plan.slots["layers.1.attn.wq_b"] != plan.slots["layers.1.attn.indexer.wq_b"]


def index_queries(dtype: str) -> Iterator[Header]:
    """The index queries' FP8 weight with scales of a dtype."""
    (name, stored, shape), (scale, _, grid) = fp8("layers.1.attn.indexer.wq_b", 8192, FLASH["q_lora_rank"])
    yield name, stored, shape
    yield scale, dtype, grid


def test_scales_of_another_dtype_stay_apart() -> None:
    """W8A8 gives an input power-of-two scales if the weight has such: joined, one of the two would get the other's."""
    plan = plan_of(FLASH | THREE_LAYERS, *index_queries("F32"), without="layers.1.attn.indexer.wq_b")
    assert list(slots_of(plan)) == ["attn.wqa_wkv", *QUERIES, "attn.x_products"]
    assert "attn.queries" in slots_of(plan_of(FLASH | THREE_LAYERS, *index_queries("F8_E8M0")))


def test_one_compressor_in_fp8_stays_apart_and_so_do_the_others() -> None:
    """Two halves of a compressor in two formats are two products in one slot, as ever."""
    fields = FLASH | THREE_LAYERS
    name = "layers.1.attn.compressor.wkv"
    plan = plan_of(fields, *fp8(name, 1024, fields["hidden_size"]), without=f"{name}.")
    assert list(slots_of(plan)) == ["attn.wqa_wkv", "attn.queries", *OF_X]
    assert len(plan.ops_of(f"layers.1.{OF_X[0]}")) == 2


def in_nvfp4() -> Iterator[Header]:
    fields = FLASH | THREE_LAYERS
    yield from nvfp4("layers.1.attn.wq_b", 512 * fields["num_attention_heads"], fields["q_lora_rank"])
    yield from nvfp4("layers.1.attn.indexer.wq_b", 8192, fields["q_lora_rank"])


@pytest.mark.parametrize("joined", [True, False], ids=["inputs as they are", "inputs in NVFP4"])
def test_a_calibrated_input_scale_is_one_modules(joined: bool) -> None:
    """A call quantises its input by one scale; each of two modules has its own in the file."""
    headers = [header for header in model_headers(FLASH | THREE_LAYERS, nvfp4) if ".wq_b." not in header[0]]
    headers += [header for layer in (0, 2) for header in fp8(f"layers.{layer}.attn.wq_b", 32768, FLASH["q_lora_rank"])]
    infos = {
        name: TensorInfo(name, dtype, shape, Path("shard"))
        for name, dtype, shape in (*headers, *in_nvfp4())
        if not name.startswith("mtp.")
    }
    index, config = CheckpointIndex(Path(), MappingProxyType(infos)), ModelConfig.from_dict(FLASH | THREE_LAYERS)
    official = frozenset() if joined else frozenset({Step.NVFP4_INPUTS})
    plan = make_plan(config, index, HOPPER, Demands("bfloat16", official=official))
    assert ("attn.queries" in slots_of(plan)) is joined
    assert (set(QUERIES) <= set(slots_of(plan))) is not joined


def test_heads_that_do_not_fill_16_bytes_stay_apart() -> None:
    """Two index heads: their weights take 8 bytes, and the rows of what follows would begin between vectors."""
    fields = FLASH | THREE_LAYERS | {"index_n_heads": 2}
    name = "layers.1.attn.indexer"
    others = [*fp8(f"{name}.wq_b", 256, fields["q_lora_rank"])]
    others.append((f"{name}.weights_proj.weight", "BF16", (2, fields["hidden_size"])))
    headers = {header[0]: header for header in (*model_headers(fields, nvfp4), *others)}
    infos = {name: TensorInfo(*header, Path("shard")) for name, header in headers.items() if "mtp." not in name}
    plan = make_plan(ModelConfig.from_dict(fields), CheckpointIndex(Path(), MappingProxyType(infos)), HOPPER)
    assert list(slots_of(plan)) == ["attn.wqa_wkv", "attn.queries", *OF_X]


def kernels_with(*reference: str) -> dict[str, str]:
    plan = plan_of(FLASH | THREE_LAYERS, demands=Demands("bfloat16", reference=frozenset(reference)))
    own = (op for op in plan.ops if op.spec.slot.startswith("layers.1.attn."))
    return {op.spec.slot.removeprefix("layers.1."): op.choice.kernel.name for op in own}


def test_the_reference_may_be_asked_for_by_any_of_its_names() -> None:
    """One of several joined products goes to torch by itself; the name of the slot means them all."""
    alone = kernels_with("layers.1.attn.indexer.wq_b")
    assert alone["attn.indexer.wq_b"] == "ref.fp8_linear"
    assert alone["attn.wq_b"] == kernels_with()["attn.queries"] != "ref.fp8_linear"
    assert kernels_with("layers.1.attn.queries")["attn.queries"] == "ref.fp8_linear"
    assert kernels_with("layers.1.attn.indexer.compressor")[OF_X[2]] == "ref.plain_linear"
    assert OF_X[0] in kernels_with("layers.1.attn.indexer.compressor"), "the others stay on their kernel"


def test_a_plan_names_the_modules_of_what_it_joins() -> None:
    """The kernel that ran for ``indexer.weights_proj`` can be read off the page."""
    text = plan_text(plan_of(FLASH | THREE_LAYERS))
    (line,) = (line for line in text.splitlines() if "weights_proj" in line)
    assert line.split()[0] == "layers.1.attn.x_products:"
    assert "indexer.wq_b" in next(line for line in text.splitlines() if line.split()[:1] == ["layers.1.attn.queries:"])


def test_a_rank_has_its_heads_and_all_index_heads() -> None:
    plan = plan_of(FLASH | THREE_LAYERS)
    (op,) = plan.ops_of("layers.1.attn.queries")
    regions = regions_of(plan.config, op.spec.modules, op.encoding, Parallel(1, 2))
    assert regions == (Region(0, 16384, 32768), None)
