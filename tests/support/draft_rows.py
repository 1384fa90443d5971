"""Arrays in which steps with drafts go on, and the same in plain Python."""

import torch

from ownpath.bench.draft_ends import copied
from ownpath.kernels.drafts.types import ACCEPTED, GUESS, DraftRows

__all__ = ["assert_same", "copied", "draft_rows", "ended"]


def draft_rows(count: int, num_fields: int, device: torch.device | None = None, width: int = 96) -> DraftRows:
    """Rows of ``count`` requests behind the sampler, of which about half have a right guess and the last is padded; the
    tokens behind some are known.
    What no request of the step has is marked."""
    device = device or torch.device("cpu")
    g = torch.Generator().manual_seed(count)

    def drawn(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

    results, token, counts = drawn(0, 2, num_fields, width), drawn(0, 2, width), drawn(0, 900, 2, width)
    results[GUESS] = drawn(0, 1000, width)
    token, pad, turn = torch.where(token > 0, results[0].roll(1), 77), torch.zeros_like(token), drawn(0, 2, width)
    turn[1::2], known = turn[::2], torch.where(drawn(0, 3, width) > 0, -1, drawn(0, 900, width))
    pad[2 * count - 2 :], token[2 * count - 2 :] = -1, -1
    shared = torch.full((2, num_fields, width), -9, dtype=torch.int32, pin_memory=device.type == "cuda")
    marked = (torch.full((size,), -9, dtype=torch.int32, device=device) for size in (width, width // 2, width // 2))
    return DraftRows(*(one.to(device) for one in (token, pad, known, counts, turn, results)), shared, *marked)


def ended(rows: DraftRows, count: int, is_judged: bool = False) -> DraftRows:
    """The rows behind both ends of a step, request by request, with guesses as they are in the results."""
    lists = [one.tolist() for one in rows]
    token, pad, known, (position, drawn), turn, results, shared, following, place, index = lists
    for r in range(count):
        t = 2 * r
        is_there = pad[t] == 0
        is_right = results[ACCEPTED][t] == 1 if is_judged else results[0][t] == token[t + 1]
        accepted = int(is_there and (is_right or known[t] >= 0))
        results[ACCEPTED][t] = accepted
        behind = [known[t + i] if known[t + i] >= 0 else results[0][t + i] for i in range(2)]
        following[t : t + 2] = behind if is_there else [-1, -1]
        place[r], index[r] = t + accepted, drawn[t] + 1 + accepted if is_there else 0
        for n, row in enumerate(results):
            shared[turn[t]][n][t : t + 2] = row[t : t + 2]
        token[t : t + 2] = [behind[accepted], results[GUESS][t + accepted]] if is_there else [-1, -1]
        for i in (t, t + 1):
            position[i] += (1 + accepted) * is_there
            drawn[i] += (1 + accepted) * is_there
            turn[i], known[i] = 1 - turn[i], -1
    return DraftRows(*(torch.tensor(one, dtype=torch.int32) for one in lists))


def assert_same(found: DraftRows, wanted: DraftRows) -> None:
    """All arrays, what no request has among them."""
    for name, one, other in zip(DraftRows._fields, found, wanted, strict=True):
        assert torch.equal(one.cpu(), other.cpu()), name
