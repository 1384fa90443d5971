"""The pages at ``/``, which chats and shows what runs, and ``/docs``: one file each, which holds nothing of the model.

A browser cannot send a key with an address that is typed, so a file is given to everybody; what it shows, it asks for
with the keys that its reader types. The policy lets nothing run but the file's own script, nothing be asked but this
server, and no text become markup.
"""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from ownpath.files import read_bytes

_MAX_BYTES = 64 * 2**10
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


class StaticPage:
    """A file of this folder and its headers, read once."""

    def __init__(self, name: str) -> None:
        self._content = read_bytes(Path(__file__).with_name(name), _MAX_BYTES)
        policy = _POLICY.format(script=_source(self._content, b"script"), style=_source(self._content, b"style"))
        self._headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }

    async def show(self, request: Request) -> Response:
        """Answers with the file."""
        return Response(self._content, headers=self._headers, media_type="text/html")


def _source(content: bytes, tag: bytes) -> str:
    """Returns the only element of this kind as a policy names it: by the digest of its text."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"
