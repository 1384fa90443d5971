"""Every order in which ranks that run one after the other may push and read."""

from collections.abc import Iterator

Event = tuple[str, int, int]
"""push or sum, rank, exchange."""


def orders(size: int, steps: int) -> Iterator[tuple[Event, ...]]:
    """Yields every order of pushes and sums: a rank's own in turn, a sum behind all pushes of its exchange."""

    def go(done: tuple[Event, ...], at: tuple[int, ...]) -> Iterator[tuple[Event, ...]]:
        if all(position == 2 * steps for position in at):
            yield done
        for rank, position in enumerate(at):
            step, is_sum = divmod(position, 2)
            is_free = step < steps and (not is_sum or all(other > 2 * step for other in at))
            if is_free:
                event = ("sum" if is_sum else "push", rank, step)
                yield from go((*done, event), (*at[:rank], position + 1, *at[rank + 1 :]))

    return go((), (0,) * size)
