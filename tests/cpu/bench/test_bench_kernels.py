"""The benches of a decode step's kernels and of the step itself, on the CPU with the twins."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ownpath.bench import rotation
from ownpath.bench.attend import bind
from ownpath.bench.benches import BENCHES
from ownpath.bench.cases import cases_of
from ownpath.bench.contender import Missing
from ownpath.bench.floor import H200, NVFP4_BYTES_PER_PARAM, Work
from ownpath.bench.kernel import Bound, FilledTimer, KernelProblem, NotApplicable, case_of, contenders_of, run_kernels
from ownpath.bench.measure import Settings
from ownpath.bench.peers.deepgemm import DeepGemm
from ownpath.bench.peers.flashmla import FlashMla
from ownpath.bench.peers.topk import PersistentTopk, TorchTopk
from ownpath.bench.request import BenchRequest, StepOptions
from ownpath.bench.row import Row, Timing
from ownpath.bench.select import SelectInputs
from ownpath.bench.step import StepBench, StepModel, dense_bytes, step_config, step_work
from ownpath.bench.step_ranks import group_of, with_slots
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.cli import main
from ownpath.config import Parallel
from ownpath.inspect.memory import KINDS
from ownpath.kernels.attend.cases import CASES
from ownpath.kernels.registry import SPECS
from ownpath.kernels.scores.types import PagedRows
from ownpath.official import Step
from ownpath.ops import OpKind
from ownpath.plan.exports import drawn_checkpoint, headers
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.splits import AttentionSplit, ExpertSplit
from ownpath.trace.launches import DeviceLaunch

SETTINGS = Settings.of("cpu", seed=1, budget_s=0.0)
SHAPES = {
    "attend": "tiny embedded SWA",
    "scores": "tiny",
    "select": "tiny",
    "angles": "tiny",
    "entries": "tiny csa narrow",
    "sample": "tiny",
    "accept_drafts": "tiny",
    "go_on_drafting": "tiny",
}


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks whether a CPU's caches are cold."""
    monkeypatch.setattr(rotation, "COLD_BYTES", 1_000_000)


def measured(bench: str, **asked: object) -> list[Row]:
    return list(BENCHES[bench].load()(BenchRequest(SETTINGS, (SHAPES[bench],), (1, 3), **asked)))  # type: ignore[arg-type]


@pytest.mark.parametrize("bench", SHAPES)
def test_ours_is_right_and_timed(bench: str) -> None:
    own = [row for row in measured(bench) if not row.is_peer]
    assert len(own) >= 2
    assert [(row.case.shape, row.status, row.reason) for row in own if row.status != "ok"] == []
    for row in own:
        assert row.timing is not None
        assert row.timing.us > 0
        assert row.timing.num_calls >= 2
        assert row.case.bench == bench
        assert row.case.num_bytes > 0


@pytest.mark.parametrize("bench", SHAPES)
def test_a_kernel_takes_part_by_its_name(bench: str) -> None:
    name = next(spec.name for spec in SPECS if spec.kind is BENCHES[bench].kind and spec.name.startswith("ref."))
    assert {(row.contender, row.status) for row in measured(bench, contenders=name)} == {(name, "ok")}
    with pytest.raises(ValueError, match="marlin not among ownpath"):
        measured(bench, contenders="marlin")


def test_official_scores_are_judged_as_such() -> None:
    assert {row.status for row in measured("scores", contenders="ref.index_scores_fp4")} == {"ok"}


def test_every_bench_of_the_table_loads_and_has_kernels() -> None:
    for bench in BENCHES.values():
        assert callable(bench.load())
        taken = [
            spec for spec in SPECS if spec.kind is bench.kind and (not bench.stored or bench.stored in spec.formats)
        ]
        assert taken or bench.kind is None


def test_peers_say_why_they_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in (FlashMla(None), PersistentTopk(None), DeepGemm()):
        assert peer.missing("cpu") == Missing("not applicable", "needs a CUDA device")
    assert FlashMla(None).missing("cuda") == Missing(
        "not installed", "no _flashmla_C.abi3.so: --library flashmla=FILE, or OWNPATH_BENCH_FLASHMLA"
    )
    gone = tmp_path / "gone.so"
    assert PersistentTopk(gone).missing("cuda") == Missing("not installed", f"{gone} is no file")
    assert DeepGemm().missing("cuda") == Missing("not installed", "no package deep_gemm")
    monkeypatch.setenv("OWNPATH_BENCH_VLLM", str(gone))
    assert BenchRequest(SETTINGS).library("vllm") == gone
    assert BenchRequest(SETTINGS, libraries={"vllm": tmp_path}).library("vllm") == tmp_path
    assert BenchRequest(SETTINGS).library("flashmla") is None


@dataclass
class Peer:
    """A contender whose calls do what a test says."""

    does: object
    name: str = "peer"
    is_peer: bool = True
    max_rel_l2: float = 0.0

    def missing(self, device: str) -> Missing | None:
        return None

    def bind(self, sets: object) -> Bound:
        def fail() -> None:
            if isinstance(self.does, Exception):
                raise self.does

        if isinstance(self.does, NotApplicable):
            fail()
        return Bound([lambda: None] if isinstance(self.does, AssertionError) else [fail], fail)


@pytest.mark.parametrize(
    ("does", "status", "reason"),
    [
        (None, "ok", ""),
        (AssertionError("row 3:\n is off"), "wrong", "row 3: is off"),
        (AssertionError(), "wrong", "its result is not what the operation defines"),
        (NotApplicable("takes 64 heads"), "not applicable", "takes 64 heads"),
        (RuntimeError("no kernel\nhere"), "failed", "RuntimeError: no kernel here"),
    ],
)
def test_what_a_contender_does_is_a_row(does: object, status: str, reason: str) -> None:
    problem = KernelProblem(case_of(SETTINGS, "attend", "tiny", 1, Work(100, 0)), [None])
    (row,) = run_kernels([problem], [Peer(does)], SETTINGS, SETTINGS.timer)
    assert (row.status, row.reason) == (status, reason)
    assert row.counts is (status == "ok")


def test_a_twin_that_waits_for_the_device_is_in_no_graph() -> None:
    (twin,) = contenders_of(BenchRequest(SETTINGS, contenders="ref.attend"), OpKind.ATTEND, bind, [])
    assert twin.missing("cpu") is None
    found = twin.missing("cuda")
    assert found is not None
    assert "no graph can hold it" in found.reason


def test_shapes_are_words_of_a_case() -> None:
    def labels(*shapes: str) -> list[str]:
        return [case.label for case in cases_of(shapes, CASES)]

    assert labels("flash SWA fp8") == ["flash SWA fp8"]
    assert labels("pro fp8", "pro SWA") == ["pro SWA fp8", "pro CSA 8k fp8", "pro HCA 128k fp8", "pro SWA bf16"]
    assert labels() == [case.label for case in CASES if case.bench]
    assert all(case.tiny for case in cases_of(["tiny"], CASES))


def test_fills_are_not_counted() -> None:
    class Counting:
        """Every call takes as long as it says."""

        name = "counting"

        def time(self, calls):
            us = statistics.mean(7.0 if call is inner else 100.0 for call in calls)
            return Timing(us, us - 1, us + 1, len(calls), 5)

    inner = object()
    found = FilledTimer(Counting(), "cpu").time([inner] * 3)  # type: ignore[list-item]
    assert found == Timing(pytest.approx(7), pytest.approx(5), pytest.approx(9), 3, 5)


@pytest.fixture
def select_inputs() -> SelectInputs:
    scores = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    rows = PagedRows(torch.full((3,), 8191, dtype=torch.int32), torch.ones(3, 32, dtype=torch.int32))
    return SelectInputs(scores, rows, 512)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """vLLM's operation with the schema of its library, on the CPU."""
    given: list[object] = []
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "persistent_topk(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()"
    )

    def fake(logits, lengths, output, workspace, k, max_seq_len) -> None:
        given[:] = [lengths.tolist(), workspace.numel(), k, max_seq_len]
        output.copy_(logits.topk(k).indices.flip(1))

    library.impl("persistent_topk", fake, "CPU")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    yield given
    library._destroy()


def test_persistent_topk_is_called_as_its_library_asks(fake_vllm: list[object], select_inputs: SelectInputs) -> None:
    bound = PersistentTopk(Path("_C.abi3.so")).bind([select_inputs])
    bound.calls[0]()
    bound.judge()
    assert fake_vllm == [[2048] * 3, 1 << 20, 512, 2048]
    select_inputs.scores_TC[1, :7] = 9.0  # what was chosen before is not the best any more
    with pytest.raises(AssertionError, match="other scores than the best"):
        bound.judge()
    with pytest.raises(NotApplicable, match="512, 1024, 2048"):
        PersistentTopk(None).bind([SelectInputs(select_inputs.scores_TC, select_inputs.rows, 128)])


def test_torchs_topk_is_judged(select_inputs: SelectInputs) -> None:
    TorchTopk().bind([select_inputs]).judge()


STEP = StepOptions(context=130, layers=4, expert_sets=2)


@pytest.fixture(scope="module")
def step() -> StepBench:
    return StepBench.of(BenchRequest(SETTINGS, step=STEP), "small", 5)


def test_a_step_of_random_weights_is_measured(step: StepBench) -> None:
    one, five = step.measured((1, 5))
    assert (one.status, five.case.num_tokens, five.case.shape) == ("ok", 5, "small, 130 tokens")
    assert one.facts["distinct_experts_by_layer"] == [6.0] * 4  # six of a token are distinct
    # Every token's six of eight: one of eight is missed by all five with a probability of (2 / 8)^5.
    assert five.case.distinct_experts == pytest.approx(8, abs=0.5)
    assert five.facts["routing"] == "uniform, by token id"
    assert five.case.num_bytes > one.case.num_bytes


def test_the_bytes_of_a_step_are_weights_experts_and_caches(step: StepBench) -> None:
    made, config = step.made, step.made.model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * NVFP4_BYTES_PER_PARAM
    assert step_work(made, 1, 130, 6).num_bytes - step_work(made, 1, 130, 5).num_bytes == 4 * expert
    # float32 here. Four windows of 128 keys; of the CSA layer 32 entries and 32 index keys, of the HCA layer one entry.
    assert config.compress_ratios == (0, 0, 4, 128)
    row = 4 * (4 * 128 * 512 + 32 * (512 + 128) + 512)
    assert step_work(made, 3, 130, 5).num_bytes - step_work(made, 2, 130, 5).num_bytes == row
    assert step_work(made, 0, 130, 0).num_bytes == made.dense_bytes


@pytest.mark.parametrize(("attention", "experts"), [("heads", "width"), ("data", "ids")])
def test_ranks_measure_a_step_together(attention: str, experts: str) -> None:
    """Every rank has the same row, of its own bytes: half of the experts, and of the rows by data."""

    def work(peers: VirtualPeers) -> tuple[Row, int]:
        parallel = Parallel(peers.rank, 2, AttentionSplit(attention), ExpertSplit(experts))
        options = replace(STEP, expert_sets=None, slots=True)
        bench = StepBench.of(BenchRequest(SETTINGS, step=options, parallel=parallel, peers=peers), "small", 4)
        (row,) = bench.measured((4,))
        return row, len(bench.caches)

    (first, rows), (second, _) = run_virtual(2, work)
    assert first.timing == second.timing
    assert rows == (2 if attention == "data" else 4)
    assert (first.case.num_tokens, first.facts["ranks"], first.facts["experts"]) == (4, 2, experts)
    assert first.case.shape == f"small, 130 tokens, 2 ranks, {attention} + {experts}"
    per_layer = first.facts["distinct_experts_by_layer"]
    assert isinstance(per_layer, list)
    assert len(per_layer) == 4
    assert all(count <= (4 if experts == "ids" else 8) for count in per_layer)


def test_a_replayed_steps_kernels_have_the_slots_of_an_eager_ones() -> None:
    def launches(*pairs: tuple[str | None, str]) -> list[DeviceLaunch]:
        return [DeviceLaunch(slot, kernel, 10.0 * at, 1.0) for at, (slot, kernel) in enumerate(pairs)]

    eager = launches(("layers.0.attn.reduce", "exchange_rows"), (None, "copy"))
    found, same = with_slots(launches((None, "exchange_rows"), (None, "copy")), eager)
    assert same
    assert [launch.slot for launch in found] == ["layers.0.attn.reduce", None]
    assert with_slots(launches((None, "copy")), eager) == (eager, False)
    kinds = ["attn.reduce", "ffn.experts", "hc_ffn", "attn.decode.attend", "attn.wqa_wkv", "(glue)"]
    assert [group_of(kind) for kind in kinds] == ["exchange", "experts", "hyper", "attention", "dense", "rest"]


def test_routing_by_token_id_is_uniform() -> None:
    """As many distinct experts as V4-Flash's 8 and 32 rows choose if each token draws 6 of 256: 44.2 and 136."""
    config = step_config("flash", StepOptions(layers=2))
    assert config.num_hash_layers == 2
    assert step_config("flash", StepOptions(layers=5, by_gate=True)).num_hash_layers == 3
    index = drawn_checkpoint(config)
    assert index.drawn is not None
    table = index.drawn.rows(index["layers.1.ffn.gate.tid2eid"], 0, 4096, torch.device("cpu"))
    assert all(len(set(row)) == 6 for row in table[:100].tolist())
    g = torch.Generator().manual_seed(1)
    for num_rows in (8, 32):
        drawn = [len(table[torch.randint(0, 4096, (num_rows,), generator=g)].unique()) for _ in range(300)]
        # A step's number has a standard deviation below 6: the mean of 300 is within 1.5 but once in 10^5 times.
        assert statistics.mean(drawn) == pytest.approx(256 * (1 - (1 - 6 / 256) ** num_rows), abs=1.5)


def test_the_command_writes_a_line_and_a_table_for_a_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "step", "--shape", "small", "--layers", "3", "--tokens", "2", "--device", "cpu"]
    arguments += ["--context", "130", "--expert-sets", "1", "--seconds", "0", "--out", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 0
    assert "routing uniform, by token id" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert (record["tokens"], record["layers"], record["context"]) == (2, 3, 130)
    assert record["command"].endswith("--seed 0 --seconds 0.0 --context 130 --layers 3 --expert-sets 1")


def test_the_command_writes_a_line_for_a_prompt_of_each_length_and_chunk(tmp_path: Path) -> None:
    arguments = ["bench", "prompt", "--shape", "small", "--layers", "3", "--tokens", "9,20", "--chunks", "8,512"]
    arguments += ["--device", "cpu", "--expert-sets", "1", "--seconds", "0", "--out", str(tmp_path / "rows.jsonl")]
    arguments += ["--numerics", "fp8_inputs"]
    assert main(arguments) == 0
    records = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["tokens"], one["chunk"]) for one in records] == [(9, 8), (9, 9), (20, 8), (20, 20)]
    assert {one["status"] for one in records} == {"ok"}
    for one in records:
        assert one["tokens_per_s"] == pytest.approx(1e6 * one["tokens"] / one["us"], abs=1)
        assert [*one["host_layer_us"]] == ["ratio 0", "ratio 4"]
    assert records[0]["command"].endswith("--layers 3 --expert-sets 1 --chunks 8,512 --numerics fp8_inputs")


def test_a_prompts_fp8_path_is_one_of_mxfp4_experts_and_fp8_products() -> None:
    index = headers(step_config("flash", StepOptions(layers=1)), "native")
    demands = Demands("bfloat16", official=frozenset({Step.FP8_INPUTS}))
    plan = make_plan(step_config("flash", StepOptions(layers=1)), index, KINDS[1], demands)
    kernels = {op.spec.slot: op.choice.kernel.name for op in plan.ops}
    assert kernels["layers.0.ffn.experts"] == "cute.fp8_experts"
    assert kernels["layers.0.attn.wo_b"] == "cute.fp8_linear_sm90"


def test_the_floor_of_v4_flashs_step_is_the_known_one() -> None:
    """In milliseconds on an H200, as counted by hand from the checkpoint's sizes: 43 layers, uniform routing."""
    config = step_config("flash", StepOptions())
    index = headers(config, "nvidia")
    pool = CachePool(CacheSpec(config, 1024, torch.bfloat16, torch.device("meta")))
    made = StepModel(SimpleNamespace(config=config, caches=pool), dense_bytes(index, {}))  # type: ignore[arg-type]
    for num_rows, ms in ((1, 2.6), (8, 7.9), (32, 20.6), (128, 35.7)):
        distinct = 256 * (1 - (1 - 6 / 256) ** num_rows)
        assert step_work(made, num_rows, 1024, distinct).floor_us(H200) / 1e3 == pytest.approx(ms, rel=0.02)
