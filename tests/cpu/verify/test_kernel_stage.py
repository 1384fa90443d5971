"""The kernels stage: intact checkpoints of every export pass, and each wrong kernel fails by its id and its place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.attention.rope import Rope
from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict, failed
from ownpath.loading import default_model_dir
from ownpath.official import OFFICIAL
from ownpath.trace.observers import Watched
from ownpath.verify import kernel_stage as stage
from ownpath.verify.kernels.probe import watched_in
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.subject import Selection, Subject

ALL_CHECKS = {f"K{number:02}" for number in range(1, 11)}
CSA, HASH = 3, 0
"""A layer with everything, and one that looks experts up by token."""
Change = Callable[[LoadedLayer, dict[str, Watched]], LoadedLayer | None]


def subject(folder: Path, layer_idx: int, **changes: Any) -> Subject:
    engine = EngineConfig(**changes)
    return Subject.of(folder, engine, Selection(layer_ids=frozenset({layer_idx})))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("kernels") / "full", "full-nvfp4").folder


@pytest.fixture
def run_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """What the stage says of one layer that ``change`` made wrong after it was loaded."""

    def run(change: Change, layer_idx: int = CSA, **changes: Any) -> list[Finding]:
        load = stage.load_layer

        def load_changed(of: Subject, idx: int) -> LoadedLayer:
            loaded = load(of, idx)
            return change(loaded, {call.slot: call for call in watched_in(loaded.block)}) or loaded

        monkeypatch.setattr(stage, "load_layer", load_changed)
        return failed(stage.kernel_stage(subject(folder, layer_idx, **changes)))

    return run


def wrap(call: Watched, around: Callable[..., Any]) -> None:
    """The slot's runner becomes ``around(runner, *args)``."""
    runner = call.runner
    object.__setattr__(call, "runner", lambda *args: around(runner, *args))


def places(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.id, finding.where) for finding in found}


def message(found: list[Finding], check_id: str, where: str) -> str:
    (finding,) = [finding for finding in found if (finding.id, finding.where) == (check_id, where)]
    return finding.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_intact_exports_pass(layout: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / layout, layout, seed=11)
    for layer_idx in (HASH, CSA):
        found = list(stage.kernel_stage(subject(checkpoint.folder, layer_idx)))
        assert not failed(found)
        assert {finding.id for finding in found} == ALL_CHECKS
        assert all(finding.number is None or 0 < finding.number <= 1 for finding in found)


@pytest.mark.parametrize("layout", ["full-nvfp4", "fp8-experts"])
def test_official_numerics_in_bfloat16_pass(layout: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / layout, layout, seed=12)
    found = list(stage.kernel_stage(subject(checkpoint.folder, CSA, dtype=torch.bfloat16, official=OFFICIAL)))
    assert not failed(found)
    assert [finding.verdict for finding in found if finding.id == "K03"] == [Verdict.PASS]


def test_what_is_in_no_layer_is_looked_at_with_all_layers(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "short", "bf16", num_hidden_layers=1, compress_ratios=[0])
    heard = []
    whole = Subject.of(checkpoint.folder, EngineConfig())
    found = list(stage.kernel_stage(whole, lambda *told: heard.append(told)))
    assert not failed(found)
    assert heard == [(0, 2, "layers.0"), (1, 2, "ends")]
    assert {finding.id for finding in found if finding.where in ("ends", "hc_head")} >= {"K01", "K02", "K08", "K10"}


def test_a_sample_of_the_embedded_models_experts() -> None:
    of = Subject.of(default_model_dir(), EngineConfig(), Selection(frozenset({1}), num_experts=3, seed=5))
    found = list(stage.kernel_stage(of))
    assert not failed(found)
    (clamp,) = [finding for finding in found if (finding.id, finding.where) == ("K06", "layers.1.ffn.experts")]
    assert "3 comparisons" in clamp.message


EXPERTS = "layers.3.ffn.experts"


def test_an_empty_expert_is_named(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        wrap(slots[EXPERTS], lambda run, x, ids, weights: run(x, ids, torch.where(ids == 5, 0.0, weights)))

    found = run_changed(change)
    assert ("K01", f"{EXPERTS}.5") in places(found)
    assert "empty" in message(found, "K01", f"{EXPERTS}.5")
    assert {where for _, where in places(found)} == {f"{EXPERTS}.5"}


def test_another_experts_weights_are_named(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        wrap(slots[EXPERTS], lambda run, x, ids, weights: run(x, torch.where(ids == 4, 6, ids), weights))

    found = run_changed(change)
    assert {where for _, where in places(found)} == {f"{EXPERTS}.4"}
    assert "what expert 6 should" in message(found, "K01", f"{EXPERTS}.4")


def operand(slots: dict[str, Watched]) -> Any:
    """((codes, scale, global scale) of w13, the same of w2) of all experts."""
    stored = slots[EXPERTS].runner.operand  # type: ignore[attr-defined]
    return [(side.qdata, side.scale, side.global_scale) for side in (stored.gate_up, stored.down)]


def test_swapped_gate_and_up_are_told(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        for tensor in operand(slots)[0]:
            tensor[2] = torch.cat(tensor[2].chunk(2)[::-1])

    found = run_changed(change)
    assert ("K01", f"{EXPERTS}.2") in places(found)
    assert "swapped" in message(found, "K01", f"{EXPERTS}.2")


@pytest.mark.parametrize("matrix", ["w1", "w3", "w2"])
def test_a_wrong_global_scale_is_told_apart(matrix: str, run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        gate_up, down = (part[2] for part in operand(slots))
        scale = down[1:2] if matrix == "w2" else gate_up[1, int(matrix == "w3")].view(1)
        scale *= 3.0

    found = run_changed(change)
    assert {where for _, where in places(found)} == {f"{EXPERTS}.1"}
    assert f"{matrix} is scaled by 3" in message(found, "K01", f"{EXPERTS}.1")


def test_a_product_one_percent_too_large(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        wrap(slots["layers.3.attn.wq_b"], lambda run, x: run(x) * 1.01)

    for dtype in (torch.float32, torch.bfloat16):
        assert ("K01", "layers.3.attn.wq_b") in places(run_changed(change, dtype=dtype))


def test_a_fused_products_module_is_named(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = run(x)
            y[..., -3] *= -1
            return y

        wrap(slots["layers.3.attn.wqa_wkv"], around)

    found = run_changed(change)
    assert places(found) == {("K01", "layers.3.attn.wkv")}
    assert "1 of 64 outputs are wrong, the first is 61" in message(found, "K01", "layers.3.attn.wkv")


def test_a_row_that_nobody_writes(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = run(x)
            found = torch.empty_like(y)
            found[:-1] = y[:-1]
            return found

        wrap(slots["layers.3.attn.wo_b"], around)

    found = run_changed(change)
    assert ("K02", "layers.3.attn.wo_b") in places(found)
    assert {where for _, where in places(found)} == {"layers.3.attn.wo_b"}


def test_rows_behind_the_input_are_read(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().nbytes() <= x.nbytes:
                return run(x)  # type: ignore[no-any-return]
            behind = x.as_strided((len(x) + 1, x.shape[1]), x.stride(), x.storage_offset())
            return run(x) + 0 * behind[-1:].sum()  # type: ignore[no-any-return]

        wrap(slots["layers.3.ffn.shared_experts.w13"], around)

    assert places(run_changed(change)) == {("K02", "layers.3.ffn.shared_experts.w13")}


def test_routed_experts_without_clamp(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        slots[EXPERTS].runner.swiglu_limit = 1e9  # type: ignore[attr-defined]

    found = run_changed(change)
    assert {check_id for check_id, _ in places(found)} == {"K06"}
    assert "the clamp is missing" in message(found, "K06", f"{EXPERTS}.0")


def test_shared_expert_without_clamp(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        slots["layers.3.ffn.shared_experts.swiglu"].runner.limit = 1e9  # type: ignore[attr-defined]

    shared = "layers.3.ffn.shared_experts"
    assert places(run_changed(change)) == {("K06", shared), ("K06", f"{shared}.swiglu")}


def test_the_other_kinds_theta(run_changed: Callable[..., list[Finding]]) -> None:
    def change(loaded: LoadedLayer, _: dict[str, Watched]) -> LoadedLayer:
        sliding = Rope.for_layer(loaded.plan.config, compressing=False, device=torch.device("cpu"))
        assert loaded.block.attn.compressor is not None
        object.__setattr__(loaded.block.attn.compressor, "rope", sliding)
        return replace(loaded, rope=sliding)

    # The output projection undoes whatever was done: it is right.
    assert places(run_changed(change)) == {
        ("K07", "layers.3.attn rotation"),
        ("K07", "layers.3.attn.compressor rotation"),
    }


def test_a_rotation_that_is_not_undone(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], o: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return run(o, (torch.ones_like(angles[0]), torch.zeros_like(angles[1])))

        wrap(slots["layers.3.attn.wo_a"], around)

    assert ("K07", "layers.3.attn.wo_a") in places(run_changed(change))


def test_a_router_without_its_bias(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        slots["layers.3.ffn.router"].runner.bias_E.zero_()  # type: ignore[attr-defined]

    assert places(run_changed(change)) == {("K05", "layers.3.ffn.router")}


def test_weights_that_do_not_sum_up(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        slots["layers.3.ffn.router"].runner.routed_scaling_factor = 1.0  # type: ignore[attr-defined]

    assert places(run_changed(change)) == {("K05", "layers.3.ffn.router")}


def test_a_token_table_moved_by_one(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        router: Any = slots["layers.0.ffn.router"].runner
        router.tid2eid_VK = router.tid2eid_VK.roll(1, 0)

    found = run_changed(change, layer_idx=HASH)
    assert places(found) == {("K05", "layers.0.ffn.router")}
    assert "tid2eid" in found[0].message


def test_a_dropped_sink(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        slots["layers.3.attn.core"].runner.layer.softmax.sink_N.fill_(-1e30)  # type: ignore[attr-defined]

    assert places(run_changed(change)) == {("K09", "layers.3.attn.core")}


@pytest.mark.parametrize("by", [-1, 1])
def test_a_window_off_by_one(by: int, run_changed: Callable[..., list[Finding]]) -> None:
    def change(loaded: LoadedLayer, _: dict[str, Watched]) -> None:
        backend: Any = loaded.block.attn.backend
        object.__setattr__(backend, "sliding_window", backend.sliding_window + by)

    assert places(run_changed(change)) == {("K09", "layers.3.attn.core")}


def test_keys_that_must_not_be_seen(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        softmax: Any = slots["layers.3.attn.core"].runner.layer.softmax  # type: ignore[attr-defined]
        run = softmax.run
        softmax.run = lambda q, keys, visible: run(q, keys, torch.ones_like(visible))

    assert ("K09", "layers.3.attn.core") in places(run_changed(change))


def test_a_transposed_sinkhorn(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], *args: Any) -> Any:
            out = run(*args)
            return replace(out, mix=replace(out.mix, comb_TSS=out.mix.comb_TSS.mT.contiguous()))

        wrap(slots["layers.3.hc_ffn"], around)

    assert places(run_changed(change)) == {("K08", "layers.3.hc_ffn")}


def test_streams_mixed_the_wrong_way(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], x: torch.Tensor, y: Any, mix: Any) -> Any:
            return run(x, y, mix and replace(mix, comb_TSS=mix.comb_TSS.mT))

        wrap(slots["layers.3.hc_attn"], around)

    assert ("K08", "layers.3.hc_attn") in places(run_changed(change))


def test_a_mix_that_is_not_float32(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], *args: Any) -> Any:
            out = run(*args)
            return replace(out, mix=replace(out.mix, comb_TSS=out.mix.comb_TSS.bfloat16()))

        wrap(slots["layers.3.hc_attn"], around)

    assert places(run_changed(change)) == {("K08", "layers.3.hc_attn")}


def test_a_quantiser_that_rounds_half_up(run_changed: Callable[..., list[Finding]]) -> None:
    """What lies halfway goes away from zero: values are made larger by less than their distance to any other middle."""

    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        linear: Any = slots["layers.3.attn.indexer.wq_b"].runner
        quantize = linear._quantize
        linear._quantize = lambda x: quantize(x * (1 + 2.0**-20))

    found = run_changed(change, official=OFFICIAL)
    assert ("K03", "layers.3.attn.indexer.wq_b") in places(found)


def test_a_kernel_that_raises_is_quoted(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        def around(run: Callable[..., Any], x: torch.Tensor) -> Any:
            if len(x) > 100:
                raise RuntimeError("no kernel image is available")
            return run(x)

        wrap(slots["layers.3.attn.wq_b"], around)

    found = run_changed(change)
    assert ("K01", "layers.3.attn.wq_b") in places(found)
    assert "RuntimeError: no kernel image is available" in message(found, "K01", "layers.3.attn.wq_b")


def test_a_runner_that_checks_nothing(run_changed: Callable[..., list[Finding]]) -> None:
    def change(_: LoadedLayer, slots: dict[str, Watched]) -> None:
        wrap(slots["layers.3.attn.wq_b"], lambda run, x: run(x.float()))

    found = run_changed(change)
    assert places(found) == {("K10", "layers.3.attn.wq_b")}
    assert "integer activations: not refused" in message(found, "K10", "layers.3.attn.wq_b")


def test_a_layer_that_cannot_be_loaded_is_a_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(of: Subject, layer_idx: int) -> LoadedLayer:
        raise ValueError("layers.3.attn.wq_b.weight: not where the index says")

    monkeypatch.setattr(stage, "load_layer", load)
    (found,) = stage.kernel_stage(subject(folder, CSA))
    assert (found.id, found.where, found.verdict) == ("K01", "layers.3", Verdict.FAIL)
    assert "layers.3.attn.wq_b.weight" in found.message
