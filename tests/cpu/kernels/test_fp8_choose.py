"""The choice of FP8 kernels: the table's where it has an entry, else the rule's; one arithmetic when invariant."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ownpath.kernels.fp8 import choose as fp8_choose
from ownpath.kernels.fp8.choose import (
    TABLE,
    W8A8_SHAPES,
    WeightKey,
    quantize_config,
    read_table,
    w8a8_config,
    w8a8_configs,
    w8a8_shape,
    w8a16_config,
    w8a16_configs,
)
from ownpath.kernels.fp8.config import TOKEN_TILES, QuantizeConfig, W8A8Config, W8A16Config, w8a16_stages_of
from ownpath.kernels.fp8.spec import PREFILL_FROM

SMS = 132
TUNED: WeightKey = (64, 32, True, False)
OTHERS: tuple[WeightKey, ...] = (
    (64, 32, False, False),
    (64, 32, True, True),
    (62, 32, True, False),
    (64, 31, True, False),
)
FEW = {"num_m64": 1, "num_n": 16, "cluster_k": 4, "per_sm": 3, "consumers": 1, "wgmma": False}
MORE = {"num_m64": 4, "num_n": 64, "cluster_k": 7, "per_sm": 1, "consumers": 2, "wgmma": True}
LONG = {"warpgroups": 3, "num_m64": 1, "cluster_n": 2, "cluster_k": 1, "num_stages": 4}
ENTRIES: dict[str, dict[str, Any]] = {
    "tokens=64,rows=4096,cols=4096": {"config": MORE},
    "tokens=16,rows=4096,cols=4096": {"config": FEW},
    "tokens=2048,rows=4096,cols=4096": {"config": LONG},
}

FEW_OF_THREE = W8A16Config(2, 32, 4, 3, folded=True)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """A table in place of the package's."""
    entries: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(fp8_choose, "fp8_table", lambda: read_table(entries))
    forget()
    yield entries
    forget()


def forget() -> None:
    w8a16_config.cache_clear()
    w8a8_config.cache_clear()


def rule(num_tokens: int, key: WeightKey, entries: dict[str, Any]) -> W8A16Config | W8A8Config:
    """Makes the choice without a table."""
    kept = dict(entries)
    entries.clear()
    forget()
    found = w8a16_config(num_tokens, key, SMS) if num_tokens < PREFILL_FROM else w8a8_config(num_tokens, key, SMS)
    entries.update(kept)
    forget()
    return found


def test_an_entry_holds_for_its_tokens_and_fewer(entries: dict[str, dict[str, Any]]) -> None:
    entries.update(ENTRIES)
    stages = w8a16_stages_of(1, 16, 4, 3, 1)
    few = W8A16Config(1, 16, stages, 4, folded=True, per_sm=3, consumers=1)
    more = W8A16Config(4, 64, w8a16_stages_of(4, 64, 7, 1, 2), 7, folded=True, wgmma=True)
    for num_tokens in (1, 8, 9, 16):
        assert w8a16_config(num_tokens, TUNED, SMS) == few
    for num_tokens in (17, 32, 64):
        assert w8a16_config(num_tokens, TUNED, SMS) == more


def test_an_entry_of_many_tokens_holds_for_as_many_blocks(entries: dict[str, dict[str, Any]]) -> None:
    entries.update(ENTRIES)
    for num_tokens in (1985, 2047, 2048):
        assert w8a8_config(num_tokens, TUNED, SMS) == W8A8Config(3, 1, 4, 2)
    for num_tokens in (PREFILL_FROM, 1984, 2049, 4096):
        assert w8a8_config(num_tokens, TUNED, SMS) == rule(num_tokens, TUNED, entries)


@pytest.mark.parametrize("key", OTHERS)
def test_other_weights_follow_the_rule(key: WeightKey, entries: dict[str, dict[str, Any]]) -> None:
    entries.update(ENTRIES)
    for num_tokens in (1, 16, 33, 64, 128, 2048):
        choose = w8a16_config if num_tokens < PREFILL_FROM else w8a8_config
        assert choose(num_tokens, key, SMS) == rule(num_tokens, key, entries)


def test_a_matrix_as_wide_with_some_more_rows_takes_the_tiles_for_few_tokens(
    entries: dict[str, dict[str, Any]],
) -> None:
    entries.update(ENTRIES)
    num_row_blocks, *others = TUNED
    taller, twice = (num_row_blocks * 3 // 2, *others), (2 * num_row_blocks, *others)
    for num_tokens in (1, 16, 64):
        assert w8a16_config(num_tokens, taller, SMS) == w8a16_config(num_tokens, TUNED, SMS)
        assert w8a16_config(num_tokens, twice, SMS) == rule(num_tokens, twice, entries)
    assert w8a8_config(2048, taller, SMS) == rule(2048, taller, entries)


def test_an_invariant_plan_never_reads_the_table(entries: dict[str, dict[str, Any]]) -> None:
    """Rows per CTA and the share of K decide the order of sums: they must not follow the number of rows."""
    before = [w8a16_config(count, TUNED, SMS, is_batch_invariant=True) for count in (1, 9, 17, 64, 4096)]
    assert len({(config.num_m64, config.cluster_k, config.consumers, config.wgmma) for config in before}) == 1
    entries.update(ENTRIES)
    forget()
    assert [w8a16_config(count, TUNED, SMS, is_batch_invariant=True) for count in (1, 9, 17, 64, 4096)] == before


@pytest.mark.parametrize("with_entries", [False, True])
@pytest.mark.parametrize(
    ("prefill_from", "invariant"), [(PREFILL_FROM, False), (None, False), (None, True), (33, False)]
)
def test_what_is_compiled_first_covers_every_count(
    with_entries: bool, prefill_from: int | None, invariant: bool, entries: dict[str, dict[str, Any]]
) -> None:
    entries.update(ENTRIES if with_entries else {})
    for key in (TUNED, *OTHERS):
        listed = w8a16_configs(key, SMS, prefill_from, invariant)
        for num_tokens in range(1, prefill_from or 300):
            assert w8a16_config(num_tokens, key, SMS, invariant) in listed
        for num_tokens in range(prefill_from or PREFILL_FROM, 5000, 61):
            assert w8a8_config(num_tokens, key, SMS) in w8a8_configs(key)
        assert w8a8_config(2048, key, SMS) in w8a8_configs(key)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (FEW | {"num_m64": 3}, "num_m64=3"),
        (FEW | {"num_m64": 1, "consumers": 2, "per_sm": 2}, "num_m64=1"),
        (FEW | {"consumers": 2}, "per_sm=3 with consumers=2"),
        (FEW | {"per_sm": 5}, "per_sm=5"),
        (FEW | {"num_n": 24}, "num_n=24"),
        (FEW | {"cluster_k": 16}, "cluster_k=16"),
        (FEW | {"cluster_k": 0}, "cluster_k=0"),
        (FEW | {"num_m64": 4, "num_n": 64}, "num_stages="),
        (LONG | {"warpgroups": 4}, "warpgroups=4"),
        (LONG | {"num_m64": 2}, "num_m64=2"),
        (LONG | {"cluster_n": 4}, "cluster_n=4"),
        (LONG | {"num_stages": 9}, "num_stages=9"),
        (LONG | {"cluster_k": 4}, "cluster_n=2 with cluster_k=4"),
        (LONG | {"cluster_n": 1, "cluster_k": 0}, "cluster_k=0"),
        (LONG | {"cluster_n": 1, "cluster_k": 9}, "cluster_k=9"),
        (LONG | {"cluster_n": 1, "cluster_k": 8, "num_stages": 4}, "num_stages=4"),
        ({"num_n": 8}, "knobs num_n instead of"),
        (LONG | {"depth": 2}, "depth"),
    ],
)
def test_an_entry_that_is_no_kernel_is_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"fp8.json, tokens=16,rows=4096,cols=4096: .*{words}"):
        read_table({"tokens=16,rows=4096,cols=4096": {"config": knobs}})


def test_k_is_not_shared_by_more_ctas_than_it_has_blocks() -> None:
    with pytest.raises(ValueError, match="cluster_k=4 does not share 3 blocks of K"):
        read_table({"tokens=16,rows=4096,cols=384": {"config": FEW}})
    with pytest.raises(ValueError, match="cluster_k=1 does not share 65 blocks of K"):
        read_table({"tokens=16,rows=4096,cols=8320": {"config": FEW | {"cluster_k": 1}}})


def test_few_rows_split_k_until_the_device_is_full() -> None:
    """1536 x 4096: 24 tiles of 128 tokens for 256 rows. 4096 x 4096 at 2048 rows fills the device without."""
    split = w8a8_config(200, (24, 32, False, False), SMS)
    assert (split.m64_per_tile, split.cluster_k) == (2, 4)
    assert split.grid(200, 24, SMS) == 96
    assert w8a8_config(2048, (64, 32, False, False), SMS).cluster_k == 1
    assert w8a8_config(200, (24, 1, False, False), SMS).cluster_k == 1


def test_a_quantiser_takes_two_blocks_where_one_each_is_too_many_ctas() -> None:
    """132 SMs have places for 1056. 2048 x 4096: 2048 CTAs of one block, 1024 of two; x 8192: twice as many."""
    product = W8A8Config(3, 1, 4, 1)
    two = quantize_config(product, 2048, (24, 32, True, False), SMS, True)
    assert two == QuantizeConfig(True, 2)
    assert two.grid(2048, 32) == (16, 64, 1)
    assert quantize_config(product, 2048, (24, 64, True, False), SMS, True) == QuantizeConfig(True)


def test_a_quantiser_is_spread_where_the_product_fills_the_device() -> None:
    """256 rows. 1536 features with K in four: 96 CTAs leave 36 SMs. 4096 with K in two: 128 leave four."""
    assert quantize_config(W8A8Config(2, 1, 5, 1, 4), 256, (24, 32, True, False), SMS, False) == QuantizeConfig(False)
    product = W8A8Config(2, 1, 5, 1, 2)
    assert quantize_config(product, 256, (64, 16, True, False), SMS, True) == QuantizeConfig(True, is_spread=True)
    assert quantize_config(product, 256, (64, 64, True, False), SMS, True) == QuantizeConfig(True), "512 CTAs"


@pytest.mark.parametrize("config", [W8A8Config(2, 1, 5, 1, 4), W8A8Config(3, 1, 3, 1, 8), FEW_OF_THREE], ids=str)
def test_parts_of_a_cluster_have_places_of_their_own(config: W8A8Config | W8A16Config) -> None:
    shares = config.shares
    step = shares.num_threads * 16
    for rank in range(shares.cluster_k):
        mine = [part for part in range(shares.num_parts) if shares.owner(part) == rank]
        assert [shares.place(part) for part in mine] == [step * idx for idx in range(len(mine))]
        assert step * len(mine) <= shares.slot_bytes


def test_the_package_s_table_is_valid() -> None:
    table = json.loads(TABLE.read_text())
    assert table["family"] == "fp8"
    assert sum(map(len, read_table(table["entries"]).values())) == len(table["entries"])


def test_the_rule_gives_full_tiles_for_any_weight() -> None:
    for key in (TUNED, *OTHERS, (2, 1, True, False), (512, 8, True, False), (24, 512, False, False)):
        for num_n in TOKEN_TILES:
            config = w8a16_config(num_n, key, SMS)
            assert config.num_n == num_n
            assert config.cluster_k <= key[1]
    for shape in W8A8_SHAPES:
        assert w8a8_shape(*shape, ragged=False).num_stages >= 4
