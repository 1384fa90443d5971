"""``MegaMoE``: several ranks compute what one does, send what arithmetic says, and refuse by name what does not fit."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ownpath import MegaMoE, Nvfp4MoE
from ownpath.conformance.bounds import assert_allowed
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens, exact_mixture
from ownpath.kernels.exchange.spec import SPECS
from ownpath.ops import OpKind
from ownpath.plan.sharding import ShardingError
from ownpath.ranks.group import join, leave
from ownpath.ranks.peers import Alone, Peers, RanksDiffer
from ownpath.ranks.start import RankFailed
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.runners import Nvfp4Linear, SwigluMlp
from ownpath.runners.mega_moe import rows_by_rank

CPU, LIMIT = torch.device("cpu"), 10.0
NUM_EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 32, 128, 3
TOLERANCE = 1e-9
"""Of float64: sums of 128 terms of about 1 in another order differ by 1e-14; weights are decoded alike."""
FORMS = (
    {"attention": "data", "experts": "ids", "dispatch": "all"},
    {"attention": "data", "experts": "ids", "dispatch": "routed"},
    {"attention": "data", "experts": "width"},
    {"attention": "heads", "experts": "ids"},
    {"attention": "heads", "experts": "width"},
)
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def stacks() -> ExpertStacks:
    """Routed experts, and behind them the shared one, as ``Nvfp4MoE`` has it."""
    torch.manual_seed(5)
    return ExpertStacks.draw(NUM_EXPERTS + 1, HIDDEN, WIDTH, CPU)


def routed_and_shared(stacks: ExpertStacks) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [part[:NUM_EXPERTS] for part in stacks.tensors()], [part[NUM_EXPERTS:] for part in stacks.tensors()]


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Given:
    torch.manual_seed(count)
    drawn = RoutedTokens.draw(count, HIDDEN, NUM_EXPERTS, TOP_K, CPU)
    return drawn.x.to(dtype), drawn.ids, drawn.weights


def of_rank(given: Given, counts: Sequence[int], rank: int) -> Given:
    x, ids, weights = (part.split(list(counts))[rank] for part in given)
    return x, ids, weights


def of_ranks(
    stacks: ExpertStacks, given: Given, counts: Sequence[int], times: int = 1, **form: str
) -> list[list[torch.Tensor]]:
    """Every rank's answers to so many calls. counts: tokens of each rank, by data."""
    routed, shared = routed_and_shared(stacks)

    def work(peers: VirtualPeers) -> list[torch.Tensor]:
        moe = MegaMoE.cut(routed, LIMIT, peers, shared=shared, **form)
        own = given if form["attention"] == "heads" else of_rank(given, counts, peers.rank)
        return [moe(*own) for _ in range(times)]

    return run_virtual(len(counts), work)


def whole(form: dict[str, str], answers: Sequence[torch.Tensor]) -> torch.Tensor:
    return answers[0] if form["attention"] == "heads" else torch.cat(list(answers))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_equal_one(size: int, form: dict[str, str], stacks: ExpertStacks) -> None:
    """Rank 1 has no token, the last most of them. Twice, the same bits; by heads the same on all ranks."""
    counts = [2, 0, *[1] * (size - 2)]
    counts[-1] += 3
    given = tokens(sum(counts))
    alone = Nvfp4MoE(*stacks.clone().tensors(), swiglu_limit=LIMIT)
    wanted = alone(*given, num_shared=1)
    ranks = of_ranks(stacks, given, counts, **form)
    assert (whole(form, [answer for (answer,) in ranks]) - wanted).abs().max() <= TOLERANCE
    narrow = of_ranks(stacks, (given[0].bfloat16(), *given[1:]), counts, times=2 if size == 4 else 1, **form)
    assert all(torch.equal(first, again) for first, *rest in narrow for again in rest), "other bits from call to call"
    if form["attention"] == "heads":
        for answers in (ranks, narrow):
            assert all(torch.equal(first, answers[0][0]) for first, *_ in answers), "other bits from rank to rank"


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[3]], ids=lambda form: "-".join(form.values()))
def test_bfloat16_is_as_exact_as_one_rank(form: dict[str, str], stacks: ExpertStacks) -> None:
    """By ids, a rank rounds the sum of its experts, where the bounds of one rank let each expert be rounded."""
    routed, given, counts = routed_and_shared(stacks)[0], tokens(16, torch.bfloat16), (4, 4, 4, 4)

    def work(peers: VirtualPeers) -> torch.Tensor:
        own = given if form["attention"] == "heads" else of_rank(given, counts, peers.rank)
        return MegaMoE.cut(routed, LIMIT, peers, **form)(*own)

    assert_allowed(whole(form, run_virtual(4, work)), exact_mixture(ExpertStacks(*routed), RoutedTokens(*given), LIMIT))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[3]], ids=lambda form: "-".join(form.values()))
def test_sums_are_added_in_the_order_of_ranks(form: dict[str, str], stacks: ExpertStacks) -> None:
    """In float32, whose bits show the order: each rank's sum, added one by one, rank 0's first."""
    routed, given, counts = routed_and_shared(stacks)[0], tokens(12, torch.float32), (3, 3, 3, 3)
    total = torch.zeros(12, HIDDEN)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        local = Nvfp4MoE(*(part[mine].clone() for part in routed), swiglu_limit=LIMIT)
        expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.tensor([0, 1], dtype=torch.int32)
        total += local(*given, expert_map=expert_map)

    def work(peers: VirtualPeers) -> torch.Tensor:
        own = given if form["attention"] == "heads" else of_rank(given, counts, peers.rank)
        return MegaMoE.cut(routed, LIMIT, peers, **form)(*own)

    assert torch.equal(whole(form, run_virtual(4, work)), total)


@pytest.mark.parametrize(("size", "dtype"), [(4, torch.float64), (8, torch.bfloat16)])
def test_routed_rows_give_the_bits_of_all_rows(size: int, dtype: torch.dtype, stacks: ExpertStacks) -> None:
    """All tokens at one expert, then ids of no expert among others; equal to one rank."""
    counts = [2] * size
    x, ids, weights = tokens(sum(counts), dtype)
    lonely = torch.full_like(ids, NUM_EXPERTS - 1)
    nobody = torch.where(torch.arange(len(ids))[:, None] % 2 == 0, torch.full_like(ids, -1), ids + NUM_EXPERTS // 2)
    alone = Nvfp4MoE(*stacks.clone().tensors(), swiglu_limit=LIMIT)
    for chosen in (lonely, nobody) if size == 4 else (nobody,):
        given = x, chosen, weights
        every, some = (
            of_ranks(stacks, given, counts, attention="data", experts="ids", dispatch=way) for way in ("all", "routed")
        )
        assert all(torch.equal(first, other) for (first,), (other,) in zip(every, some, strict=True))
        if dtype == torch.float64:
            wanted = alone(*given, num_shared=1)
            assert (torch.cat([answer for (answer,) in some]) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_no_tokens_anywhere(form: dict[str, str], stacks: ExpertStacks) -> None:
    for (answer,) in of_ranks(stacks, tokens(0), [0, 0], **form):
        assert answer.shape == (0, HIDDEN)


def test_one_rank_has_all_the_work_and_one_rank_is_enough(stacks: ExpertStacks) -> None:
    routed, shared = routed_and_shared(stacks)
    given = tokens(6)
    wanted = Nvfp4MoE(*stacks.clone().tensors(), swiglu_limit=LIMIT)(*given, num_shared=1)
    for form in FORMS:
        assert (MegaMoE.cut(routed, LIMIT, Alone(), shared=shared, **form)(*given) - wanted).abs().max() <= TOLERANCE


def test_a_rank_may_bring_its_own_tensors(stacks: ExpertStacks) -> None:
    """Without a whole stack anywhere: each rank's experts, and a shared expert made of linears."""
    routed, shared = routed_and_shared(stacks)
    given, counts = tokens(8), (3, 5)

    def work(peers: VirtualPeers) -> torch.Tensor:
        first = peers.rank * NUM_EXPERTS // 2
        local = Nvfp4MoE(*(part[first : first + NUM_EXPERTS // 2].clone() for part in routed), swiglu_limit=LIMIT)
        w13, s13, g13, w2, s2, g2 = (part[0] for part in shared)
        gate_up = Nvfp4Linear([*w13.chunk(2)], [*s13.chunk(2)], [*g13])
        mlp = SwigluMlp(gate_up, Nvfp4Linear(w2, s2, g2), LIMIT)
        return MegaMoE(local, peers, dispatch="routed", shared=mlp)(*of_rank(given, counts, peers.rank))

    wanted = Nvfp4MoE(*stacks.clone().tensors(), swiglu_limit=LIMIT)(*given, num_shared=1)
    assert (torch.cat(run_virtual(2, work)) - wanted).abs().max() <= TOLERANCE


def test_whole_stacks_stay_as_they_are(stacks: ExpertStacks) -> None:
    routed, _ = routed_and_shared(stacks)
    before = [part.clone() for part in routed]
    moe = run_virtual(2, lambda peers: MegaMoE.cut(routed, LIMIT, peers, experts="width"))[1]
    kept = moe.local.stored_expert(0)[0].qdata.untyped_storage().data_ptr()
    assert kept not in {part.untyped_storage().data_ptr() for part in routed}
    assert all(torch.equal(*(x.view(torch.uint8) for x in pair)) for pair in zip(routed, before, strict=True))
    gate, up, down = moe.local.stored_expert(3)
    half = WIDTH // 2
    assert torch.equal(gate.qdata, routed[0][3, half:WIDTH])
    assert torch.equal(up.qdata, routed[0][3, WIDTH + half :])
    assert torch.equal(down.qdata, routed[3][3, :, half // 2 :])


class CountingPeers:
    """Counts rows and bytes that go to other ranks, by exchange."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self.rank, self.size = peers, peers.rank, peers.size
        self.rows, self.bytes = dict[str, int](), dict[str, int]()

    def swap(self, slot: str, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        self._count(slot, [tensors] * self.size)
        return self._peers.swap(slot, tensors)

    def trade(self, slot: str, parts: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        self._count(slot, parts)
        return self._peers.trade(slot, parts)

    def _count(self, slot: str, parts: Sequence[Sequence[torch.Tensor]]) -> None:
        sent = [tensors for rank, tensors in enumerate(parts) if rank != self.rank]
        self.rows[slot] = sum(len(tensors[0]) for tensors in sent)
        self.bytes[slot] = sum(tensor.numel() * tensor.itemsize for tensors in sent for tensor in tensors)


BY_HAND = (
    # 4 ranks of 2 experts each. Token -> ranks that have its experts:
    [[0, 1, -1], [0, 2, 6], [2, 3, 5]],  # 0; 0 1 3; 1 2 -> rank 0 sends 0 + 2 + 2 rows
    [[1, 0, -1]],  # 0 -> 1 row
    [],
    [[6, 7, -1], [0, 7, 99]],  # 3; 0 3 -> 0 + 1 rows
)
DISPATCHED, COMBINED = (4, 1, 0, 1), (2, 2, 1, 1)
"""Sums that come back: rank 0 sends one to rank 1 and one to rank 3; rank 1 two to rank 0, ranks 2 and 3 one each."""


@pytest.mark.parametrize("way", ["all", "routed"])
def test_ranks_send_what_arithmetic_by_hand_says(way: str, stacks: ExpertStacks) -> None:
    routed, shared = routed_and_shared(stacks)
    ids = [torch.tensor(rows, dtype=torch.int32).reshape(-1, TOP_K) for rows in BY_HAND]
    row, routing = HIDDEN * 2, TOP_K * (4 + 4)

    def work(peers: VirtualPeers) -> tuple[dict[str, int], dict[str, int], Any]:
        counting, own = CountingPeers(peers), ids[peers.rank]
        moe = MegaMoE.cut(routed, LIMIT, counting, dispatch=way, shared=shared)
        moe(torch.ones(len(own), HIDDEN, dtype=torch.bfloat16), own, torch.ones(own.shape))
        return counting.rows, counting.bytes, moe.sent(ids, torch.bfloat16)

    gone, back = ("moe.dispatch", "moe.combine") if way == "routed" else ("moe.gather", "moe.scatter")
    for rank, (rows, sent_bytes, told) in enumerate(run_virtual(4, work)):
        mine, total = len(BY_HAND[rank]), sum(map(len, BY_HAND))
        wanted = (DISPATCHED[rank], COMBINED[rank]) if way == "routed" else (3 * mine, total - mine)
        assert (rows[gone], rows[back]) == (told.dispatched, told.combined) == wanted
        assert (sent_bytes[gone], sent_bytes[back]) == (told.dispatched_bytes, told.combined_bytes)
        assert (told.dispatched_bytes, told.combined_bytes) == (wanted[0] * (row + routing), wanted[1] * row)


@pytest.mark.parametrize("with_shared", [False, True])
def test_by_heads_each_rank_sends_its_sums_to_all(with_shared: bool, stacks: ExpertStacks) -> None:
    routed, shared = routed_and_shared(stacks)
    x, ids, weights = tokens(3, torch.bfloat16)

    def work(peers: VirtualPeers) -> tuple[int, Any]:
        counting = CountingPeers(peers)
        moe = MegaMoE.cut(routed, LIMIT, counting, attention="heads", shared=shared if with_shared else None)
        moe(x, ids, weights)
        return counting.bytes["moe.reduce"], moe.sent([ids] * 4, torch.bfloat16)

    for sent_bytes, told in run_virtual(4, work):
        assert sent_bytes == told.combined_bytes == 3 * 3 * HIDDEN * 2
        assert (told.dispatched, told.dispatched_bytes) == (0, 0)


@pytest.mark.parametrize(("size", "wanted"), [(2, 0.985), (4, 2.48), (8, 3.89)])
def test_tokens_of_v4_flash_visit_so_many_other_ranks(size: int, wanted: float) -> None:
    """6 of 256 experts, all sets alike: N - 1 ranks, each with the chance that not all 6 are elsewhere."""
    expected = (size - 1) * (1 - comb(256 - 256 // size, 6) / comb(256, 6))
    assert expected == pytest.approx(wanted, abs=0.005)
    torch.manual_seed(size)
    count = 4000
    goes = rows_by_rank(torch.rand(count, 256).topk(6).indices, 256, size)
    visited = goes[1:].sum().item() / count
    assert visited == pytest.approx(expected, abs=4 * (size / 4 / count) ** 0.5 * size**0.5)


def refused(size: int, make: Callable[[VirtualPeers], object]) -> list[Exception | None]:
    """Returns each rank's error."""

    def work(peers: VirtualPeers) -> Exception | None:
        try:
            make(peers)
        except (ValueError, RanksDiffer) as error:
            return error
        return None

    return run_virtual(size, work)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"dispatch": "some"}, "moe: dispatch is 'some', which is none of all, routed"),
        ({"dispatch": "routed", "attention": "heads"}, "moe: dispatch is routed, but with attention by heads"),
        ({"dispatch": "routed", "experts": "width"}, "moe: dispatch is routed, but with experts by width"),
        ({"experts": "rows"}, "experts is 'rows', which is none of width, ids"),
    ],
)
def test_forms_that_do_not_fit_are_refused(form: dict[str, str], words: str, stacks: ExpertStacks) -> None:
    routed, _ = routed_and_shared(stacks)
    for error in refused(2, lambda peers: MegaMoE.cut(routed, LIMIT, peers, **form)):
        assert words in str(error)


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    torch.manual_seed(2)
    six = ExpertStacks.draw(6, HIDDEN, 48, CPU).tensors()
    for error in refused(4, lambda peers: MegaMoE.cut(six, LIMIT, peers, slot="layers.3.ffn")):
        assert isinstance(error, ShardingError)
        assert str(error) == "layers.3.ffn.experts: 6 experts do not divide into 4 ranks"
    for error in refused(2, lambda peers: MegaMoE.cut(six, LIMIT, peers, experts="width")):
        assert "moe.ffn.experts.0.w2: 48 columns do not divide into 2 ranks of whole 16s" in str(error)
    for error in refused(2, lambda peers: MegaMoE.cut(six, LIMIT, peers, shared=six)):
        assert "moe: the shared expert must be a stack of 1, found 6" in str(error)


def test_stacks_are_six(stacks: ExpertStacks) -> None:
    routed, shared = routed_and_shared(stacks)
    with pytest.raises(ValueError, match="stacks must be the six tensors of Nvfp4MoE, found 5"):
        MegaMoE.cut(routed[:5], LIMIT, Alone())
    with pytest.raises(ValueError, match="shared must be the six tensors of Nvfp4MoE, found 2"):
        MegaMoE.cut(routed, LIMIT, Alone(), shared=shared[:2])


def test_a_wrong_stack_of_one_rank_is_told_to_all(stacks: ExpertStacks) -> None:
    routed, _ = routed_and_shared(stacks)
    wrong = [*routed[:4], routed[4].float(), routed[5]]
    first, second = refused(2, lambda peers: MegaMoE.cut(wrong if peers.rank else routed, LIMIT, peers))
    assert isinstance(first, RankFailed)
    assert str(first).startswith("rank 1: w2_scale must be torch.float8_e4m3fn")
    assert str(second).startswith("w2_scale must be")


def test_ranks_that_do_not_fit_each_other_are_named(stacks: ExpertStacks) -> None:
    routed, shared = routed_and_shared(stacks)
    fewer = [part[:4] for part in routed]

    def differ(**fields: Any) -> Callable[[VirtualPeers], MegaMoE]:
        both = {"stacks": routed, "swiglu_limit": LIMIT}
        return lambda peers: MegaMoE.cut(peers=peers, **(both | (fields if peers.rank == 1 else {})))

    for fields, words in (
        ({"stacks": fewer}, "rank 1 has another moe: experts than rank 0: 2 of 32, not 4 of 32"),
        ({"swiglu_limit": 7.0}, "rank 1 has another moe: SwiGLU limit than rank 0: 7.0, not 10.0"),
        ({"dispatch": "routed"}, "rank 1 has another moe: division than rank 0: data, ids, routed, not data, ids, all"),
        ({"shared": shared}, "rank 1 has another moe: shared expert than rank 0: one, not none"),
    ):
        for error in refused(2, differ(**fields)):
            assert isinstance(error, RanksDiffer)
            assert str(error) == words


@pytest.mark.parametrize("form", FORMS[:4], ids=lambda form: "-".join(form.values()))
def test_rows_that_do_not_fit_each_other_are_named(form: dict[str, str], stacks: ExpertStacks) -> None:
    """Two experts a token on rank 1, or another dtype of x; by heads other numbers of tokens."""
    routed, _ = routed_and_shared(stacks)
    x, ids, weights = tokens(4)
    is_heads = form["attention"] == "heads"
    other = (x[:1], ids[:1], weights[:1]) if is_heads else (x, ids[:, :2], weights[:, :2])
    for wrong in (other, (x.float(), ids, weights)):
        given = (x, ids, weights), wrong

        def call(given: Sequence[Given], peers: VirtualPeers) -> torch.Tensor:
            return MegaMoE.cut(routed, LIMIT, peers, **form)(*given[peers.rank])

        for error in refused(2, partial(call, given)):
            assert isinstance(error, RanksDiffer)
            assert "rank 1" in str(error)
            assert "moe." in str(error)


def test_arguments_of_a_call_are_checked_before_anything_is_sent(stacks: ExpertStacks) -> None:
    routed, _ = routed_and_shared(stacks)
    x, ids, weights = tokens(4)
    peers = CountingPeers(Alone())
    moe = MegaMoE.cut(routed, LIMIT, peers)
    for given, words in (
        ((x[:, :16], ids, weights), "x has 16 features, the experts take 32"),
        ((x[0], ids, weights), "x must have 2 dimensions"),
        ((x.long(), ids, weights), "x must be floating point"),
        ((x, ids[:3], weights), "topk_ids must have shape"),
        ((x, ids, weights.bfloat16()), "topk_weights must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            moe(*given)
    assert not {slot for slot in peers.rows if slot.startswith("moe.")}


def test_a_call_says_whether_a_graph_can_hold_it(stacks: ExpertStacks) -> None:
    """Torch's exchanges wait for other ranks on the host; kernels of exchanges are chosen by kind."""
    routed, _ = routed_and_shared(stacks)
    moe = MegaMoE.cut(routed, LIMIT, Alone(), dispatch="routed")
    assert moe.reads_host
    assert [leaf.spec.name for leaf in moe.leaves] == ["ref.nvfp4_moe", "ref.routed_dispatch", "ref.routed_combine"]
    assert all(spec.reads_host != spec.is_pushed for spec in SPECS)
    chosen = {OpKind.REDUCE: next(spec for spec in SPECS if spec.kind is OpKind.REDUCE and spec.is_torch)}
    assert MegaMoE(moe.local, Alone(), attention="heads", kernels=chosen).leaves[1].spec is chosen[OpKind.REDUCE]
    with pytest.raises(ValueError, match="there is no kernel 'other'"):
        MegaMoE(moe.local, Alone(), attention="heads", kernels={OpKind.REDUCE: "other"})


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "parallel.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert sum(map(bool, snippet.splitlines())) == 6
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(snippet, "docs/parallel.md", "exec"), names)
    alone = Nvfp4MoE(*sum(names["experts"], ()), swiglu_limit=LIMIT)(*names["tokens"])
    for found in (names["first"], names["second"]):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    assert alone.any()


SCRIPT = """
import os, sys, torch
from ownpath import MegaMoE
from ownpath.ranks.group import join, leave
stacks, shared, forms, calls = torch.load(sys.argv[1])
group = join(os.environ)
answers = []
for form in forms:
    moe = MegaMoE.cut(stacks, 10.0, group, shared=shared, **form)
    answers.append([moe(*call[form["attention"]][1]) for call in calls])
torch.save(answers, sys.argv[2])
leave()
"""


def test_two_processes_equal_one(stacks: ExpertStacks, tmp_path: Path) -> None:
    """Over gloo, one or the other rank without tokens. The second rank is another process."""
    routed, shared = routed_and_shared(stacks)
    calls = []
    for dtype, counts in ((torch.float64, (3, 2)), (torch.float64, (0, 3)), (torch.bfloat16, (4, 0))):
        given = tokens(sum(counts), dtype)
        calls.append({"heads": [given] * 2, "data": [of_rank(given, counts, rank) for rank in range(2)]})
    torch.save((routed, shared, FORMS, calls), tmp_path / "given.pt")
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "given.pt"), str(tmp_path / "answers.pt")]
    second = subprocess.Popen(command, env=os.environ | ranks | {"RANK": "1", "OMP_NUM_THREADS": "1"})
    try:
        group, answers = join(ranks | {"RANK": "0"}, store), []
        for form in FORMS:
            moe = MegaMoE.cut(routed, LIMIT, group, shared=shared, **form)
            answers.append([moe(*call[form["attention"]][0]) for call in calls])
        assert second.wait(60) == 0
    finally:
        second.kill()
        second.wait()
        leave()
    alone = Nvfp4MoE(*stacks.clone().tensors(), swiglu_limit=LIMIT)
    for form, own, others in zip(FORMS, answers, torch.load(tmp_path / "answers.pt"), strict=True):
        for call, first, other in zip(calls, own, others, strict=True):
            if form["attention"] == "heads":
                assert torch.equal(first, other), "not the same bits on both ranks"
            if first.dtype == torch.float64:
                wanted = alone(*call["heads"][0], num_shared=1)
                assert ((whole(form, [first, other]) - wanted).abs() <= TOLERANCE).all()
