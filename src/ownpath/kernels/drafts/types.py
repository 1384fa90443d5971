"""Arguments of what ends a step with drafts.

Request r has rows 2 r and 2 r + 1: its last token, and the guess behind it.

Legend: R requests of a call, W rows that there is room for, N numbers of a row's results.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.kernels.contract import Kernel, Operand

ROWS = 2
"""Rows of a request."""
ACCEPTED, GUESS = 3, 4
"""Rows of the results behind token, fault and log-prob: in a request's first column whether its guess is right, 1 or 0,
and in the column of its last token that counts the guess behind it."""


class DraftRows(NamedTuple):
    """The arrays in which a step with drafts goes on, all int32.

    Shapes: token_W, the token that each row reads, -1 in a padded row. pad_W: -1 in a padded row, else 0. known_W:
        the token that follows the row where it is known, as in a prompt, else -1: then it is drawn. counts_2W:
        the row's position and the number of tokens drawn before it. turn_W, 0 or 1: the copy of the results that this
        step writes. results_NW: token, fault and log-prob of each row, what ``ACCEPTED`` and ``GUESS`` name, then what
        other kernels of the step have written. shared_2NW: two copies of the results, in memory that the host reads
        too.
        following_W: the token behind each row, -1 behind a padded one. place_R: each request's last row that counts.
        index_R: tokens drawn before the one behind that row's own.
    """

    token_W: Tensor
    pad_W: Tensor
    known_W: Tensor
    counts_2W: Tensor
    turn_W: Tensor
    results_NW: Tensor
    shared_2NW: Tensor
    following_W: Tensor
    place_R: Tensor
    index_R: Tensor


class AcceptKernel(Kernel[Operand], Protocol[Operand]):
    """The judgement of guesses by the tokens drawn."""

    def prepare(self) -> Operand:
        """Makes the operand."""

    def variant(self, rows: DraftRows, num_requests: int, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, rows: DraftRows, num_requests: int, operand: Operand, *, is_judged: bool = False) -> None:
        """Writes ``ACCEPTED``, following_W, place_R and index_R of the first requests, behind the sampler of their
            rows. A padded request has no right guess and index 0; where the token behind a request's first row is
            known, the second row has it. Tokens and counts stay: the module of drafts reads them.

        is_judged: ``ACCEPTED`` is there already, 1 or 0 by another judgement.
        Errors: ValueError naming an array that does not fit.
        """


class GoOnKernel(Kernel[Operand], Protocol[Operand]):
    """The last of a step with drafts."""

    def prepare(self) -> Operand:
        """Makes the operand."""

    def variant(self, rows: DraftRows, num_requests: int, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, rows: DraftRows, num_requests: int, operand: Operand) -> None:
        """Writes the first requests as the next step finds them, behind the sampler of their guesses: the last token
            that counts and the guess, positions and numbers of drawn tokens further by the tokens that count, but in
            padded rows, and no token known behind them. Copies their results to the host's copy of the turn, and turns
            to the other.

        Errors: ValueError naming an array that does not fit.
        """
