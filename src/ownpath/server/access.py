"""API keys, names of the server, addresses it listens on: who may send requests, and from where. Imports nothing
heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ownpath.server.admin_key import MIN_KEY_CHARS

API_KEYS_VARIABLE = "OWNPATH_API_KEYS"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_MAX_KEY_FILE_BYTES = 2**20


@dataclass(frozen=True, repr=False)
class AccessPolicy:
    """Decides who may send requests.

    keys: API keys; none: everybody may. hosts: names that ``Host`` may have, ``*.example.com`` for all below one; none:
    any. origins: web pages' origins that browsers may let read answers; none: no page's.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def api_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the keys of the file (one a line, ``#`` begins a comment) and of the environment (between commas).

    Errors: ValueError naming the place, without the key, for one that is short or that no header can carry, and for a
    file without keys; OSError.
    """
    keys: dict[str, None] = {}
    if file is not None:
        for number, line in enumerate(_lines_of(file), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                keys[_required(line.strip(), f"{file}: line {number}")] = None
        if not keys:
            raise ValueError(f"{file}: holds no API key; one a line is expected")
    words = environment.get(API_KEYS_VARIABLE, "").split(",")
    for number, word in enumerate(filter(str.strip, words), start=1):
        keys[_required(word.strip(), f"{API_KEYS_VARIABLE}: key {number}")] = None
    return tuple(keys)


def _lines_of(file: Path) -> list[str]:
    with file.open("rb") as stream:
        data = stream.read(_MAX_KEY_FILE_BYTES + 1)
    if len(data) > _MAX_KEY_FILE_BYTES:
        raise ValueError(f"{file}: larger than {_MAX_KEY_FILE_BYTES} bytes; a file of API keys is expected")
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8; a file of API keys is expected") from None


def _required(key: str, place: str) -> str:
    if len(key) < MIN_KEY_CHARS or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{place}: a key must be at least {MIN_KEY_CHARS} printable ASCII characters without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches an address that a socket is bound to."""
    address = ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def access_policy(
    bound_host: str, keys: tuple[str, ...], hosts: tuple[str, ...], origins: tuple[str, ...], *, is_insecure: bool
) -> AccessPolicy:
    """Returns the policy of a server that is bound to an address.

    Without keys a server on loopback answers to loopback's names alone: a web page cannot reach it by another name.
    Errors: ValueError for a server that other machines reach and that asks for no key, unless ``is_insecure``.
    """
    if not keys and not is_insecure and not is_loopback(bound_host):
        raise ValueError(
            f"--host: other machines reach {bound_host}, and no API key is asked for: give --api-key-file or "
            f"{API_KEYS_VARIABLE}, or --insecure if everybody there may use the model"
        )
    if not hosts and not keys and is_loopback(bound_host):
        hosts = LOOPBACK_NAMES
    return AccessPolicy(keys, hosts, origins)
