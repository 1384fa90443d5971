"""Decoders of several ranks: rank 0 says which step it launches, and the others launch the same.

The ranks' graphs hold the same exchanges in the same order. All gather the logits and draw from the same bits with the
same rows, so each has the tokens, and no other rank reads any. Rank 0 tells of a step right before it launches its own:
of the same rows once more a few bytes; of other rows also the arrays, as they are uploaded (``RowArrays``). What an
answer's grammar and penalties change is known to rank 0 alone. It draws those rows again, behind the graph, and all
ranks take its tokens: they are sent as the sum of its bytes and zeros.

Another rank also runs at most two steps ahead of its device: it waits for the one whose buffers come next, as rank 0
does. Whoever waits for a step then asks whether its exchanges were whole (``Window.check``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ownpath.engine.decoder import Decoder, DecodingModel, StepBegun
from ownpath.engine.rows import Staged, StepTokens
from ownpath.kernels.sample.types import SampleRows
from ownpath.ranks.control import DATA, Leader, RankMessage
from ownpath.ranks.peers import PeerLost, RanksDiffer
from ownpath.splits import DRAWN_MULTIPLE

if TYPE_CHECKING:
    from ownpath.kernels.exchange.window import Window

DECODE, REDRAW = "decode", "redraw"
"""Kinds of messages, see ``engine.following``."""
_TOKEN_BYTES = 4


class SharingModel(DecodingModel, Protocol):
    """The model as a rank's decoder uses it. share: adds up tensors over ranks."""

    @property
    def share(self) -> Callable[[torch.Tensor], torch.Tensor] | None: ...

    @property
    def window(self) -> "Window | None": ...


@contextmanager
def running_together(leader: Leader, message: RankMessage) -> Iterator[None]:
    """Tells the other ranks what to run, for a block in which this one does. Errors: PeerLost; RanksDiffer where it
    fails on this rank, as it may not on the others."""
    with leader.running(message):
        try:
            yield
        except (PeerLost, RanksDiffer):
            raise
        except Exception as error:
            raise RanksDiffer(f"a step failed on rank 0, others may have run it: {error}") from error


class RankDecoder(Decoder):
    """A decoder of one of several ranks; see ``Decoder``. gives_tokens: rank 0 alone has tokens for the others."""

    gives_tokens = True

    def __init__(self, model: SharingModel, max_rows: int, num_vocab: int) -> None:
        super().__init__(model, max_rows, num_vocab)
        assert model.share is not None, "no exchange of tokens is planned"
        self._share, self._window, self._dtype = model.share, model.window, self.pool.spec.dtype
        num_bytes = self.num_parts * max_rows * _TOKEN_BYTES
        num_rows = -(-num_bytes // DRAWN_MULTIPLE) * DRAWN_MULTIPLE // _TOKEN_BYTES
        self._given_R = torch.zeros(num_rows, dtype=torch.int32, device=self.pool.spec.device)
        self._orders: dict[int, Sequence[str]] = {}

    def check_ranks(self) -> None:
        """Checks that no exchange was given up, of steps that this rank has waited for. Errors: PeerLost."""
        if self._window is not None:
            self._window.check()

    def launch(self, count: int) -> torch.Tensor:
        """See ``Decoder``."""
        if self._window is not None and count in self._orders:
            self._window.order.replayed(self._orders[count])
        return super().launch(count)

    def _capture(self, count: int, memory: Any) -> Any:
        captured = super()._capture(count, memory)
        self.check_ranks()
        if self._window is not None:
            self._orders[count] = self._window.order.take_captured()
        return captured

    def warm_up_rest(self, logits_TV: torch.Tensor) -> None:
        """See ``Decoder``."""
        super().warm_up_rest(logits_TV)
        with self._model.ledger.counting_apart():
            self._share_tokens(self.num_parts * self.buckets[-1])

    def _num_shared(self, begun: StepBegun) -> int:
        """Returns the number of rows whose tokens are given."""
        return begun.num_rows

    def _share_tokens(self, count: int) -> None:
        """Gives the others the tokens that the first rows go on with, or takes rank 0's."""
        tokens = self._rows.columns.tokens[:count]
        if self.gives_tokens:
            self._given_R[:count] = tokens
        found = self._share(self._given_R.view(torch.uint8).view(-1, DRAWN_MULTIPLE).to(self._dtype))
        if not self.gives_tokens:
            tokens.copy_(found.to(torch.uint8).flatten().view(torch.int32)[:count])
            self._results.drawn_R[:count] = tokens


class LeadingDecoder(RankDecoder):
    """Rank 0's."""

    def __init__(self, model: SharingModel, max_rows: int, num_vocab: int, leader: Leader) -> None:
        super().__init__(model, max_rows, num_vocab)
        self._leader = leader

    def finish(self, begun: StepBegun) -> StepTokens:
        """See ``Decoder``. Errors: PeerLost."""
        self._marks[begun.turn].wait()
        self.check_ranks()
        return super().finish(begun)

    def _launch_whole(self, begun: StepBegun, count: int, staged: Staged | None) -> None:
        told: RankMessage = {"kind": DECODE, "rows": count, "turn": begun.turn}
        if staged is not None:
            some = staged.blocks
            told["blocks"] = None if some is None else (some.start, some.stop)
            told[DATA] = self._rows.copied(staged)
        with running_together(self._leader, told):
            super()._launch_whole(begun, count, staged)

    def _launch_redraw(self, begun: StepBegun, adjusted: SampleRows | None) -> None:
        if adjusted is None:
            super()._launch_redraw(begun, None)
            return
        count = self._num_shared(begun)
        with running_together(self._leader, {"kind": REDRAW, "rows": count, "turn": begun.turn}):
            super()._launch_redraw(begun, adjusted)
            self._share_tokens(count)


class FollowingDecoder(RankDecoder):
    """Another rank's. It keeps no books: rank 0's arrays name slots, blocks and positions."""

    gives_tokens = False

    def follow(self, told: RankMessage) -> None:
        """Launches the step that a message tells of. Does not wait for it. Errors: PeerLost."""
        turn, staged = told["turn"], None
        self._marks[turn].wait()  # the step before the last: its buffers are free
        self.check_ranks()
        if DATA in told:
            some = told["blocks"]
            staged = self._rows.paste(told[DATA], Staged(turn, None if some is None else slice(*some)))
        begun = StepBegun(told["rows"], turn)
        self._marks[turn] = self._enqueue(lambda: self._launch_whole(begun, told["rows"], staged), turn)

    def take_tokens(self, told: RankMessage) -> None:
        """Has the last step's rows go on with the tokens that rank 0 has drawn again. Does not wait."""
        turn = told["turn"]
        self._marks[turn] = self._enqueue(lambda: self._share_tokens(told["rows"]), turn)
