"""Torch definition of what ends a step with drafts.

Legend: R requests of a call, T their rows, W rows that there is room for, N numbers of a row's results.
"""

import torch

from ownpath.kernels.drafts.types import ACCEPTED, GUESS, ROWS, DraftRows
from ownpath.kernels.reference import Reference


def accept_drafts(rows: DraftRows, num_requests: int, *, is_judged: bool = False) -> None:
    """Compares each request's guess with the token drawn before it. See ``AcceptKernel``."""
    num_rows = ROWS * num_requests
    drawn_T, pad_T, known_T = rows.results_NW[0, :num_rows], rows.pad_W[:num_rows], rows.known_W[:num_rows]
    is_there_R, accepted_R = pad_T[::ROWS] + 1, rows.results_NW[ACCEPTED, :num_rows:ROWS]
    right_R = accepted_R.bool() if is_judged else drawn_T[::ROWS] == rows.token_W[1:num_rows:ROWS]
    right_R = (right_R | (known_T[::ROWS] >= 0)) * is_there_R
    accepted_R.copy_(right_R)
    torch.bitwise_or(torch.where(known_T >= 0, known_T, drawn_T), pad_T, out=rows.following_W[:num_rows])
    rows.place_R[:num_requests] = right_R + ROWS * torch.arange(num_requests, device=right_R.device)
    rows.index_R[:num_requests] = (rows.counts_2W[1, :num_rows:ROWS] + 1 + right_R) * is_there_R


def go_on_drafting(rows: DraftRows, num_requests: int) -> None:
    """Writes the rows of the next step and the host's results. See ``GoOnKernel``."""
    num_rows, place_R = ROWS * num_requests, rows.place_R[:num_requests].long()
    pad_RG, token_RG = (part[:num_rows].view(num_requests, ROWS) for part in (rows.pad_W, rows.token_W))
    token_RG[:, 0] = rows.following_W[place_R]
    token_RG[:, 1] = rows.results_NW[GUESS, place_R] | pad_RG[:, 1]
    moved_R = (pad_RG[:, 0] + 1) * (1 + rows.results_NW[ACCEPTED, :num_rows:ROWS])
    rows.counts_2W[:, :num_rows].view(2, num_requests, ROWS).add_(moved_R.unsqueeze(-1))
    turn_T = rows.turn_W[:num_rows]
    results_NT, host_T = rows.results_NW[:, :num_rows], turn_T.long().to(rows.shared_2NW.device)
    columns_T = torch.arange(num_rows, device=host_T.device)
    rows.shared_2NW[host_T, :, columns_T] = results_NT.T.to(host_T.device)
    turn_T.copy_(1 - turn_T)
    rows.known_W[:num_rows] = -1


class AcceptReference(Reference):
    """``accept_drafts`` as a kernel without an operand."""

    def prepare(self) -> None:
        """Returns ``None``: nothing is shared between calls."""

    def variant(self, rows: DraftRows, num_requests: int, operand: None) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, rows: DraftRows, num_requests: int, operand: None, *, is_judged: bool = False) -> None:
        """Computes ``accept_drafts``."""
        accept_drafts(rows, num_requests, is_judged=is_judged)


class GoOnReference(Reference):
    """``go_on_drafting`` as a kernel without an operand."""

    def prepare(self) -> None:
        """Returns ``None``: nothing is shared between calls."""

    def variant(self, rows: DraftRows, num_requests: int, operand: None) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, rows: DraftRows, num_requests: int, operand: None) -> None:
        """Computes ``go_on_drafting``."""
        go_on_drafting(rows, num_requests)


ACCEPT_DRAFTS = AcceptReference()
GO_ON_DRAFTING = GoOnReference()
