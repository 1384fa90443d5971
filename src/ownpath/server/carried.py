"""Reasoning that a client carries without showing it, so that a server that keeps nothing gets it back.

It is no secret: whoever carries it could have asked for the text. The form only says that it is ownpath's own.
"""

import base64
import binascii
import hashlib

_MARK = "ownpath1."


def carry(text: str) -> str:
    """Returns a text in one word that clients pass on as it is."""
    return _MARK + base64.urlsafe_b64encode(text.encode()).decode()


def carried(word: str) -> str | None:
    """Returns the text that ``carry`` was given; None for another server's word."""
    if not word.startswith(_MARK):
        return None
    try:
        return base64.b64decode(word.removeprefix(_MARK), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def sign(text: str) -> str:
    """Returns the mark of a text that is shown: clients want one and send it back, and nothing depends on it."""
    return _MARK.replace("1", "0") + hashlib.sha256(text.encode()).hexdigest()
