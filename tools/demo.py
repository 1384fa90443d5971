"""Demonstrates serving: starts the server on the embedded model, asks over HTTP, prints the streamed answer.

    python tools/demo.py [--question TEXT]

Exit code 0 when the answer came and, for the default question, says Paris; 1 otherwise.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

QUESTION, EXPECTED = "The capital of France is", "Paris"
START_TIMEOUT_S = 120


def main() -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    question = parser.parse_args().question
    command = [sys.executable, "-m", "ownpath", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = _wait_for_url(server)
            print(f"> {question}\n< ", end="", flush=True)
            answer = ""
            for piece in _stream(url, question):
                answer += piece
                print(piece, end="", flush=True)
            print("\n")
        finally:
            server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=START_TIMEOUT_S)
        print(rest.strip())
    return 0 if answer and (question != QUESTION or EXPECTED in answer) else 1


def _wait_for_url(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        print(line.rstrip())
        found = re.search(r"http://\S+/v1", line)
        if found:
            return found[0]
    raise SystemExit(f"the server ended with code {server.wait()} before it listened")


def _stream(url: str, question: str) -> Iterator[str]:
    """Yields the answer's text, piece by piece, as the server sends it."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 32, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
        for raw in response:
            data = raw.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["delta"].get("content") or ""


if __name__ == "__main__":
    sys.exit(main())
