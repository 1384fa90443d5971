"""Places to wait in, for requests beyond those that run, shared by what is left of them. Pure bookkeeping.

Turns (``turns``) are of no use to a client whose request finds no place to wait for its turn. So of the requests that
wait, a client has at most three times as many as places are left. Alone it so gets three quarters of all places. Of
two that send without end each gets three sevenths, and a seventh is left; of ten each gets 3/31. The more come, the
less everybody may hold, so that another one finds places while there are two, and nobody who waits is sent away.

Example: 256 for a client that is alone, 342 in all. One sends without end and has its 256. Another one sends a body of
64 answers: it is taken, and 22 are left.
"""

from collections.abc import Collection, Sequence

from ownpath.engine.request import Request

_TIMES_LEFT = 3
"""Places of a client, as a multiple of those that are left."""


class EngineOverloaded(RuntimeError):
    """Too many requests are open; none of this call was accepted."""


class WaitingPlaces:
    """The places of one engine. max_num_seqs: requests that run. most_of_one: that wait of a client that is alone."""

    def __init__(self, max_num_seqs: int, most_of_one: int) -> None:
        self._max_num_seqs = max_num_seqs
        self.count = most_of_one - (-most_of_one // _TIMES_LEFT)
        """The places in all."""

    def check(self, opened: Collection[Request], coming: Sequence[Request]) -> None:
        """Checks that there are places for all of one client's next requests. Errors: EngineOverloaded.

        opened: all that run or wait. How many of whose run is the scheduler's affair; those of the client count here as
        waiting as long as so many wait.
        """
        num_open = len(opened) + len(coming)
        num_waiting = num_open - self._max_num_seqs
        if num_waiting <= 0:
            return
        num_left = self.count - num_waiting
        if num_left < 0:
            most = self._max_num_seqs + self.count
            raise EngineOverloaded(f"{len(opened)} of at most {most} requests are open")
        client = coming[0].client
        num_own = sum(request.client == client for request in opened)
        if min(num_own + len(coming), num_waiting) > _TIMES_LEFT * num_left:
            text = f"{num_own} requests of this client are open; the places that are left to wait in are for others"
            raise EngineOverloaded(text)
