"""Every order in which ranks that run one after the other may push and read."""

import random
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


def random_order(size: int, steps: int, seed: int) -> tuple[Event, ...]:
    """Draws one of ``orders``; each next event is as likely as any other that is possible."""
    drawn, at, done = random.Random(seed), [0] * size, list[Event]()
    while any(position < 2 * steps for position in at):
        free = []
        for rank, position in enumerate(at):
            step, is_sum = divmod(position, 2)
            if step < steps and (not is_sum or all(other > 2 * step for other in at)):
                free.append(("sum" if is_sum else "push", rank, step))
        done.append(drawn.choice(free))
        at[done[-1][1]] += 1
    return tuple(done)
