"""The admin key, which opens ``/debug/plan``: where it comes from, and what may be one."""

from collections.abc import Mapping

ADMIN_KEY_VARIABLE = "OWNPATH_ADMIN_KEY"
MIN_KEY_CHARS = 16


def admin_key(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Returns the key of the argument or else of the environment; None where neither holds one.

    Errors: ValueError, as ``require_admin_key``.
    """
    key = environment.get(ADMIN_KEY_VARIABLE) or None if given is None else given
    return None if key is None else require_admin_key(key)


def require_admin_key(key: str) -> str:
    """Returns the key. Errors: ValueError, without the key in it, for one that is short or that no header can carry."""
    if len(key) < MIN_KEY_CHARS or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"the admin key must be at least {MIN_KEY_CHARS} printable ASCII characters without spaces")
    return key
