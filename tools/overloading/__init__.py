"""Parts of ``tools/overload.py``: a client that can misbehave, the mix of requests, and a watch on the server."""
