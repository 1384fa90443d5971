"""The open connections: how many, from where, and which of them have waited longest for their client."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from typing import Protocol


class OpenConnection(Protocol):
    """A connection as the roster sees it."""

    def drop(self) -> None:
        """Closes it at once, whatever is still to be written."""

    def check(self, now: float) -> None:
        """Ends it if it takes too long. now: the event loop's time."""


class Roster:
    """Counts connections, and keeps those that wait for their client in the order in which they began to.

    A connection waits from its first moment until a whole request is there, and again once that is answered. Bytes of
    a request that is not whole change nothing, so who sends one byte a second grows as old as who sends none.
    """

    def __init__(self) -> None:
        self._sites: dict[OpenConnection, str] = {}
        self._counts: Counter[str] = Counter()
        # The value: since when, in seconds of the caller's clock. The order is that of the values.
        self._waiting: dict[OpenConnection, float] = {}
        self._waiting_at: defaultdict[str, dict[OpenConnection, float]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[OpenConnection]:
        return iter(list(self._sites))

    def count_at(self, site: str) -> int:
        """Returns the number of connections from one site."""
        return self._counts[site]

    def add(self, connection: OpenConnection, site: str, now: float) -> None:
        """Takes a new connection, which waits for its client."""
        self._sites[connection] = site
        self._counts[site] += 1
        self.wait(connection, now)

    def remove(self, connection: OpenConnection) -> None:
        """Forgets a connection; one that is forgotten already is fine."""
        site = self._sites.pop(connection, None)
        if site is None:
            return
        self._counts[site] -= 1
        if not self._counts[site]:
            del self._counts[site]
        self._unlist(connection, site)

    def wait(self, connection: OpenConnection, now: float) -> None:
        """Lists a connection as one that waits for its client from now on."""
        if connection in self._sites:
            site = self._sites[connection]
            self._unlist(connection, site)
            self._waiting[connection] = self._waiting_at[site][connection] = now

    def work(self, connection: OpenConnection) -> None:
        """Notes that a whole request of this connection is there: it is not dropped for others any more."""
        if connection in self._sites:
            self._unlist(connection, self._sites[connection])

    def waits_since(self, site: str | None = None) -> float | None:
        """Returns since when the one waits that has waited longest, at one site or anywhere; None if none waits."""
        return next(iter(self._waiting_of(site).values()), None)

    def drop_oldest(self, site: str | None = None) -> bool:
        """Drops the connection that has waited longest, at one site or anywhere. Returns False if none waits."""
        oldest = next(iter(self._waiting_of(site)), None)
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.drop()
        return True

    def _waiting_of(self, site: str | None) -> dict[OpenConnection, float]:
        return self._waiting if site is None else self._waiting_at.get(site, {})

    def _unlist(self, connection: OpenConnection, site: str) -> None:
        self._waiting.pop(connection, None)
        if site in self._waiting_at:
            self._waiting_at[site].pop(connection, None)
            if not self._waiting_at[site]:
                del self._waiting_at[site]


def site_of(host: str) -> str:
    """Returns whose address this is: one of IPv4 is one site, and so are all of an IPv6 network of 64 bits."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
